"""Pictures for the tests: made of numbers, written and read as callers do."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture, so that resizing it changes little; the same for the same seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int, height: int) -> Image.Image:
    """White in its left half."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


def written(image: Image.Image, format_: str = "PNG", **how) -> bytes:
    file = BytesIO()
    image.save(file, format_, **how)
    return file.getvalue()


def base64_of(image: Image.Image | bytes, **how) -> str:
    data = image if isinstance(image, bytes) else written(image, **how)
    return base64.b64encode(data).decode()


def read(output: dict | bytes) -> np.ndarray:
    """The pixels of an answer's ``{"mime_type", "data"}``, or of a bare answer."""
    data = output if isinstance(output, bytes) else base64.b64decode(output["data"])
    return np.asarray(Image.open(BytesIO(data)))


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of any channel of any pixel."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())
