"""From a registry entry to files, a device and a dtype."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.engine import libraries
from backend.errors import ModelUnavailable
from backend.registry import ModelSpec

if TYPE_CHECKING:
    import torch


def find_weights(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Return what ``from_pretrained`` takes: a folder or Hub id, and its keywords.

    Files that ``sha256`` names are checked first, and fetched first where they are on the Hub;
    raises ``ModelUnavailable`` that names one that differs.
    """
    weights = spec.weights()
    revision = {"revision": spec.revision} if spec.revision else {}
    folder = Path(weights) if Path(weights).is_absolute() else None
    for name, digest in spec.sha256.items():
        if folder is not None:
            file = folder / name
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(weights, name, **revision))
            # The snapshot's folder is named after its commit: load the very files just checked,
            # even if the branch moves on meanwhile.
            revision = {"revision": file.parents[len(Path(name).parts) - 1].name}
        if not file.is_file() or sha256(file) != digest.lower():
            raise ModelUnavailable(f"Its file {name} does not match the sha256 in models.yaml.")
    return weights, revision


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pick_device(wanted: str) -> str:
    """CUDA, else MPS, else CPU; a device by name must be there, or ``ModelUnavailable``."""
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    found = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if int(index or 0) >= found[kind]:
        raise ModelUnavailable(f"Its device {wanted} is not on this machine.")
    return f"cuda:{index or 0}" if kind == "cuda" else kind


def pick_dtype(wanted: str, device: str) -> torch.dtype | str:
    """bfloat16 where the hardware computes in it, else ``auto``: the weights' own."""
    import torch

    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = False
    return torch.bfloat16 if fast else "auto"


def release_memory(dropped: Collection[weakref.ref[Any]] = ()) -> None:
    """Give back what dropped models held: cycles, the heap's free pages, the device's cache.

    To look for cycles takes 0.15 s, for the libraries are some 400,000 objects; and is left out
    where all that was ``dropped`` is gone without it.
    """
    import ctypes
    import gc

    if not dropped or any(one() is not None for one in dropped):
        gc.collect()
    # Weights of up to 32 MB are on glibc's heap, which keeps for itself what is not at its end.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    torch = libraries.imported("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
