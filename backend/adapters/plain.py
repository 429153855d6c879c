"""Whatever a library gives back, as JSON values and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """``value`` as JSON values and arrays, which travel; raises ``TypeError`` for what is neither.

    Pictures and masks become arrays of uint8, and nothing else does. What is not a finite number
    is null once it is written as JSON.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return _array(value)
    if hasattr(value, "detach"):  # a tensor, of any dtype and on any device
        tensor = value.detach().cpu()
        half = tensor.is_floating_point() and tensor.element_size() < 4
        return _array((tensor.float() if half else tensor).numpy())
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if hasattr(value, "getbands"):  # a picture of Pillow's
        return np.asarray(value.convert("L" if value.mode in ("1", "L") else "RGB"))
    raise TypeError(f"{type(value).__name__} is nothing that travels")


def _array(array: np.ndarray) -> Any:
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        return plain(array.tolist())
    if array.dtype == np.bool_:
        # A mask is white where it is true.
        return array.astype(np.uint8) * 255 if array.ndim == 2 else array.tolist()
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    return np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32)
