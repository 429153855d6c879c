"""Which errors of a library are about the device, and not about the call."""

from __future__ import annotations

import sys


class DeviceBroken(BaseException):
    """The device's context is lost: nothing in this process will run on it again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once, or with other models gone, might do."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    # PyTorch's CPU allocator and MPS have no class of their own for it.
    told = ("can't allocate memory", "MPS backend out of memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def is_broken_device(error: BaseException) -> bool:
    """Whether an error sticks: after an illegal access every later call to CUDA fails too."""
    torch = sys.modules.get("torch")
    if torch is None or is_out_of_memory(error):
        return False
    kind = getattr(torch, "AcceleratorError", None)
    if kind is not None and isinstance(error, kind):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(("CUDA error:", "HIP error:"))
