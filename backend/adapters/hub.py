"""From a registry entry to files, a device and a dtype."""

from __future__ import annotations

import glob
import hashlib
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.adapters import footprint
from backend.engine import libraries
from backend.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch


LOOK_UP_S = 10.0  # that the Hub has to say which files a repository has
# Weights that nothing here reads, and files that a load has no use for.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".pb")
_MORE_WEIGHTS = (".onnx", ".onnx_data", ".tflite", ".gguf", ".mlmodel", ".nemo", ".zip")
_OF_NO_USE = (".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".wav", ".mp3")


def fetch_snapshot(repository: str, revision: str | None = None, **load: Any) -> Path:
    """The folder of a Hub repository's files on this machine: those that a load reads.

    ``load`` are the keywords of ``from_pretrained`` that choose files: ``variant``,
    ``use_safetensors``, ``subfolder``, ``gguf_file``. What is in the cache is not downloaded again,
    and is all there is where the Hub does not answer. Raises what ``huggingface_hub`` raises.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        found = HfApi().model_info(repository, revision=revision, timeout=LOOK_UP_S)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:
        # The Hub does not answer, or may not be called.
        any_of = ["config.json", "model_index.json", "modules.json"]
        try:
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=any_of, local_files_only=True
            )
        except LocalEntryNotFoundError:
            raise error from None
        return Path(folder)
    names = files_to_fetch([one.rfilename for one in found.siblings or ()], load)
    return Path(
        snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            etag_timeout=LOOK_UP_S,
        )
    )


def files_to_fetch(names: list[str], load: Mapping[str, Any]) -> list[str]:
    """Of a repository's files those that a load with such keywords reads, or may read."""
    with_weights = names
    if load.get("use_safetensors") is False:
        with_weights = [name for name in names if not name.endswith(".safetensors")]
    inside = load.get("subfolder")
    weights = set(footprint.weight_files(with_weights, load.get("variant"), inside))
    return [
        name
        for name in names
        if name in weights
        or name.endswith(str(load.get("gguf_file", "\0")))
        or not name.lower().endswith(_OTHER_WEIGHTS + _MORE_WEIGHTS + _OF_NO_USE)
    ]


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise ``ModelUnavailable`` that names a file which does not have its ``sha256``."""
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or sha256(file) != digest.lower():
            raise ModelUnavailable(f"Its file {name} does not match the sha256 in models.yaml.")


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
