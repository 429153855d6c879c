"""How much memory a model takes: guessed from its files, counted once it is loaded."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backend.engine import libraries
from backend.registry import ModelSpec

logger = logging.getLogger("crane.engine")

# Bytes of a number, by the names that safetensors gives them.
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_WIDTHS |= {"I16": 2, "U16": 2}
_HALF = {"float16", "bfloat16"}
# How from_pretrained calls weights, and where sentence-transformers keeps those of its modules.
_NAMES = ("model.", "model-", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_OF_MODULE = re.compile(r"\d+_\w+/")
MARGIN = 0.1  # of what is free
MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
# Where weights may be in an object: ours and the libraries' own, not all that Python has.
_OURS = ("backend.", "diffusers.", "transformers.", "sentence_transformers.")


def find_files(spec: ModelSpec) -> dict[Path, int]:
    """The files of an entry's weights, with their bytes; empty where nothing is known of them.

    Of the files that from_pretrained may choose from, safetensors count before others, and a
    ``variant`` that the entry's ``load`` names before none. One that is still on the Hub is named
    as the Hub's cache will have it.
    """
    place, variant = spec.weights(), spec.load_kwargs.get("variant")
    try:
        if Path(place).is_absolute():
            return _in_folder(Path(place), variant)
        return _of_hub(place, spec.revision, variant)
    except Exception as error:  # whatever it is, loading will say it better
        logger.info("%s: its files are not known before it loads: %s", spec.id, error)
        return {}


def estimate(files: Mapping[Path, int], dtype: str) -> int:
    """Guess the bytes of the weights in such files, in ``dtype``; 0 where they tell nothing."""
    try:
        return sum(_of_file(file, size, dtype) for file, size in files.items())
    except Exception as error:
        logger.info("what a model takes is not known before it loads: %s", error)
        return 0


def _in_folder(folder: Path, variant: str | None) -> dict[Path, int]:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return {folder / name: (folder / name).stat().st_size for name in weight_files(names, variant)}


def _of_hub(repository: str, revision: str | None, variant: str | None) -> dict[Path, int]:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = snapshot_download(repository, revision=revision, local_files_only=True)
        if found := _in_folder(Path(folder), variant):
            return found
    except LocalEntryNotFoundError:
        pass
    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    files = {one.rfilename: one for one in info.siblings or ()}
    found = {}
    for name in weight_files(list(files), variant):
        one, file = files[name], cache / "snapshots" / str(info.sha) / name
        blob = one.lfs.sha256 if one.lfs else str(one.blob_id)
        found[file if file.exists() else cache / "blobs" / blob] = one.size or 0
    return found


def weight_files(names: list[str], variant: str | None, subfolder: str | None = None) -> list[str]:
    """Of a checkpoint's files those that from_pretrained would read."""
    chosen = []
    for folder in sorted({os.path.dirname(name) for name in names}):
        here = [name for name in names if os.path.dirname(name) == folder]
        for ending in (".safetensors", ".bin", ".pt", ".ckpt"):
            files = [name for name in here if name.endswith(ending)]
            of_variant = [name for name in files if f".{variant}" in os.path.basename(name)]
            plain = [name for name in files if "." not in os.path.basename(name)[: -len(ending)]]
            # Beside a model's own files there may be those of other programs, and of a training.
            named = [name for name in plain if os.path.basename(name).startswith(_NAMES)]
            if found := (of_variant if variant else []) or named or plain or files:
                chosen += found
                break
    # Beside the folders of its parts a diffusers checkpoint may have itself whole, in one file.
    if "model_index.json" in names:
        return [name for name in chosen if os.path.dirname(name)] or chosen
    # Elsewhere folders hold other copies of it, but those of sentence-transformers' modules.
    own = [name for name in chosen if _OF_MODULE.match(name) or os.path.dirname(name) == subfolder]
    top = [name for name in chosen if not os.path.dirname(name)]
    return (own if subfolder else top + own) or chosen


def _of_file(file: Path, size: int, dtype: str) -> int:
    if not file.exists():
        # How wide its numbers are is not told; most are published as they are computed with.
        return size
    if file.suffix != ".safetensors":
        return size // 2 if dtype in _HALF else size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
        if length > min(size, MAX_HEADER):
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            total += _in_memory(end - begin, tensor["dtype"], dtype)
    return total


def _in_memory(size: int, stored: str, dtype: str) -> int:
    if dtype == "auto" or stored not in ("F64", "F32", "F16", "BF16"):
        return size
    width = {"float32": 4, "float64": 8}.get(dtype, 2)
    return size * width // _WIDTHS[stored]


def count(adapter: object) -> int:
    """The bytes of all weights that an adapter has, each counted once."""
    if (torch := libraries.imported("torch")) is None:
        return 0

    sizes: dict[int, int] = {}
    for tensor in tensors(adapter):
        if tensor.layout is not torch.strided:  # such as oneDNN's, which has no storage to see
            sizes[id(tensor)] = tensor.numel() * tensor.itemsize
            continue
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tensors(adapter: object) -> Iterator[Any]:
    """The tensors that an adapter has."""
    if (torch := libraries.imported("torch")) is None:
        return

    seen: set[int] = set()
    left: list[Any] = [vars(adapter)]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if hasattr(value, "__tensor_flatten__"):  # torchao's: the numbers and their scales
                left += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
            else:
                yield value
        elif isinstance(value, torch.nn.Module):
            left += [*value.parameters(), *value.buffers()]
            left += [vars(part).get("packed") for part in value.modules()]
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif type(value).__module__.startswith(_OURS) and hasattr(value, "__dict__"):
            left += vars(value).values()


def free(device: str) -> int:
    """The bytes that are free on a device; of main memory, what its cgroup leaves."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _left_in_cgroup())


def spare(free: int) -> int:
    """What models may take of what is free: a margin is for what a run needs besides weights."""
    return int(free * (1 - MARGIN))


def _available() -> int:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # Not Linux: all there is, and the budget is its operator's to set.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves; files that were read may be dropped from its use."""
    for most, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = "".join(_lines(root / most))
        if limit.isdigit():
            stat = dict(line.split() for line in _lines((root / used).with_name("memory.stat")))
            return int(limit) - int("".join(_lines(root / used))) + int(stat.get(cached, 0))
    return sys.maxsize


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
