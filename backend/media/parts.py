"""What stands for media on their way in and out, and the fields that take them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.schemas import StrictField


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a multipart request; ``mime_type`` is what the caller calls it, if anything.

    Of a mask that is read with ``see_through_is_white``, only how clear it is counts.
    """

    data: bytes
    mime_type: str | None
    see_through_is_white: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A field's media before they are read: a text that holds or names them, or a file."""

    given: str | Upload
    field: MediaField


class MediaField(StrictField):
    """Media of one kind, loaded as a ``Source`` that ``MediaReader`` reads later."""

    forms = "base64, a data: URL, an https URL, or a file of a multipart request"

    def accepts(self, value: Any) -> bool:
        return type(value) in (str, Upload)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        return Source(super()._deserialize(value, attr, data, **kwargs), self)


class ImageField(MediaField):
    """A picture, read as a uint8 array ``(height, width, 3)``.

    With ``mode="L"``, a mask's for example, the array is ``(height, width)``.
    """

    type_name = "image"
    expected = f"a picture: {MediaField.forms}"

    def __init__(self, *, mode: str = "RGB", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mode = mode


class AudioField(MediaField):
    """Sound, read as ``{"samples", "rate"}``: mono float32 from -1 to 1, and samples a second.

    ``rate`` is what it is resampled to; None leaves it as it was recorded, up to 48,000.
    """

    type_name = "audio"
    expected = f"sound: {MediaField.forms}"

    def __init__(self, *, rate: int | None = 16_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate


class VideoField(MediaField):
    """A film, read as ``{"frames", "fps"}``: uint8 ``(frames, height, width, 3)``.

    Of a long one, ``max_frames`` are read, evenly spaced.
    """

    type_name = "video"
    expected = f"a film: {MediaField.forms}"

    def __init__(self, *, max_frames: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_frames = max_frames
