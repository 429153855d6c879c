"""Bytes to pictures and back: the only place where a caller's media are decoded or fetched."""

from __future__ import annotations

import base64
from dataclasses import dataclass

MAX_KEPT_RATE = 48_000  # samples a second: above what anybody hears, and no sound is kept at more

# libav finds too little memory for what a damaged file asks, too.
NO_MEMORY = "is damaged, or takes more memory to decode than is allowed"


@dataclass(frozen=True, slots=True)
class Media:
    """An output that is bytes: a JSON answer has them in base64, a bare answer as they are."""

    mime_type: str
    data: bytes

    def to_json(self) -> dict[str, str]:
        return {"mime_type": self.mime_type, "data": base64.b64encode(self.data).decode()}


class Refused(Exception):
    """Media that are not taken. The message ends a sentence that begins with the field's name.

    It says nothing of our network or files. ``too_large`` is true where size was the reason.
    """

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large
