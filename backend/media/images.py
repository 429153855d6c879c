"""Pictures: bytes to pixels, checked by content, and pixels to bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.cores import all_cores
from backend.media import NO_MEMORY, Media, Refused
from backend.media.bounds import bound_image

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("crane.media")

# What is read. Fewer kinds are fewer parsers for a hostile file to meet.
_READ = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}

# What is written: the option `format`, and its media type.
IMAGE_FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

# Pillow's own, less the loss that can be seen: its defaults are 75 and 80. A PNG of level 1 takes
# a third of the time of Pillow's level 6, and is some percent larger.
_WRITE: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95},
    "webp": {"quality": 95},
}

CLEAR = "clear"  # a mode of ours: white where a picture is see-through, black where it is not


@all_cores()
def decode_image(
    data: bytes, *, mode: str, mime_type: str | None, claim: Callable[[int], None]
) -> np.ndarray:
    """The pixels of a picture, upright as its EXIF says: uint8, ``(height, width[, channels])``.

    ``mime_type`` is what the caller says it is, if anything; ``claim`` is asked for its number of
    pixels before any of them is decoded. Raises ``Refused``.
    """
    from PIL import Image, UnidentifiedImageError

    bound_image(data)

    # Pillow would warn of many pixels, or refuse them with its own words: claim() decides here.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(BytesIO(data), formats=list(_READ))
    except UnidentifiedImageError:
        kinds = ", ".join(_READ)
        raise Refused(f"is no picture of a kind that is read here: {kinds}") from None
    except Exception:  # a parser may stumble over a hostile file in any way
        logger.debug("a picture's head", exc_info=True)
        raise Refused("is damaged: its head cannot be read") from None
    with image:
        # An MPO is a phone's JPEG with a second picture in it.
        real = "image/jpeg" if image.format == "MPO" else _READ[str(image.format)]
        if mime_type not in (None, real, "application/octet-stream"):
            raise Refused(f"is {real}, and its label says {mime_type}")
        claim(image.width * image.height)
        if mode == CLEAR and not image.has_transparency_data:
            raise Refused("has nothing see-through, which is where a mask lets paint")
        try:
            return _pixels(image, mode)
        except MemoryError:
            raise Refused(NO_MEMORY) from None
        except Exception:
            logger.debug("a picture's pixels", exc_info=True)
            raise Refused("is damaged or cut short") from None


def _pixels(image: Image, mode: str) -> np.ndarray:
    from PIL import ImageOps

    image.load()
    upright = ImageOps.exif_transpose(image)
    if mode == CLEAR:
        return 255 - np.asarray(upright.convert("RGBA").getchannel("A"))
    if upright.mode.startswith("I;16"):
        # Pillow cuts 16 bits off at 255; their upper half is the picture.
        return _pixels_of(upright, mode)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return np.asarray(upright.convert(mode))


def _pixels_of(image: Image, mode: str) -> np.ndarray:
    grey = (np.asarray(image) >> 8).astype(np.uint8)
    return grey if mode == "L" else np.repeat(grey[:, :, None], 3, axis=2)


@all_cores()
def encode_image(pixels: np.ndarray, format_: str) -> Media:
    """Write pixels ``(height, width, 3)`` as ``png``, ``jpeg`` or ``webp``."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, format_.upper(), **_WRITE[format_])
    return Media(IMAGE_FORMATS[format_], file.getvalue())
