"""Which errors of a library are about the device, and not about the call."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from backend.engine import libraries


class DeviceBroken(BaseException):
    """The device's context is lost: nothing in this process will run on it again."""


# Only torch.OutOfMemoryError has a class of its own. The others are a RuntimeError's text: of
# PyTorch's CPU allocator and MPS, of CUDA's and HIP's driver and runtime, and of the libraries on
# top of them (cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT, cuRAND, NCCL), which allocate workspaces.
_OUT_OF_MEMORY = re.compile(
    r"out[ _]of[ _]memory|ALLOC(ATION)?_FAILED|INSUFFICIENT_RESOURCES|ErrorMemoryAllocation"
    r"|bad_alloc|(can't|cannot|unable to|failed to)( \w+)? (alloc|calloc)|not enough memory",
    re.IGNORECASE,
)
_OF_DEVICE = re.compile(
    r"(CUDA|HIP|cuDNN|MIOpen|cuBLAS|cuSOLVER|cuSPARSE|cuFFT|cuRAND|NCCL)( driver)? error\b",
    re.IGNORECASE,
)
# What CUDA's documentation of cudaError says "leaves the process in an inconsistent state", in
# cudaGetErrorString's words, and what libraries make of it. All other errors, such as an invalid
# argument or a missing kernel image, end with the call that they are about.
_STICKY = re.compile(
    r"illegal memory access|device-side assert|unspecified launch (failure|error)|launch timed out"
    r"|misaligned address|illegal instruction|invalid program counter|hardware stack error"
    r"|not supported on global/shared address space|uncorrectable|context is destroyed"
    r"|unknown error|(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|EXEC_FAILED)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once, or with other models unloaded, might succeed."""
    torch = libraries.imported("torch")
    own = getattr(torch, "OutOfMemoryError", MemoryError)
    return any(
        isinstance(one, MemoryError | own)
        or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        or (isinstance(one, RuntimeError) and _OUT_OF_MEMORY.search(str(one)))
        for one in _chain(error)
    )


def is_broken_device(error: BaseException) -> bool:
    """Whether an error sticks: after an illegal access every later call to CUDA fails too.

    A device that is there is asked whether it still works; else the error's text decides.
    """
    torch = libraries.imported("torch")
    if torch is None or is_out_of_memory(error):
        return False
    kind = getattr(torch, "AcceleratorError", ())
    texts = [
        str(one)
        for one in _chain(error)
        if isinstance(one, kind) or (isinstance(one, RuntimeError) and _OF_DEVICE.match(str(one)))
    ]
    if not texts:
        return False
    if torch.cuda.is_initialized():
        return _fails(torch)
    return any(_STICKY.search(text) for text in texts)


def _fails(torch: object) -> bool:
    """Whether a device fails any call: a sticky error is told again by the next one."""
    cuda = torch.cuda  # type: ignore[attr-defined]
    try:
        for index in range(cuda.device_count()):
            cuda.synchronize(index)
    except RuntimeError as error:
        return not is_out_of_memory(error)
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that libraries raised it from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__
