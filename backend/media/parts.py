"""What stands for media on their way in and out."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from backend.schemas import StrictField


@dataclass(frozen=True, slots=True)
class Media:
    """An output that is bytes: a JSON answer has them in base64, a bare answer as they are."""

    mime_type: str
    data: bytes

    def to_json(self) -> dict[str, str]:
        return {"mime_type": self.mime_type, "data": base64.b64encode(self.data).decode()}


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a multipart request; ``mime_type`` is what the caller calls it, if anything."""

    data: bytes
    mime_type: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """A field's media before they are read: a text that holds or names them, or a file.

    ``mode`` is Pillow's for the pixels that the task wants: ``RGB``, or ``L`` for a mask.
    """

    given: str | Upload
    mode: str


class ImageField(StrictField):
    """A picture; ``MediaReader`` makes pixels of it, a uint8 array ``(height, width, 3)``.

    With ``mode="L"``, a mask's for example, the array is ``(height, width)``.
    """

    type_name = "image"
    expected = "a picture: base64, a data: URL, an https URL, or a file of a multipart request"

    def __init__(self, *, mode: str = "RGB", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mode = mode

    def accepts(self, value: Any) -> bool:
        return type(value) in (str, Upload)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        return Source(super()._deserialize(value, attr, data, **kwargs), self.mode)
