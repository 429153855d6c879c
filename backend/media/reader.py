"""From what callers send as media to what models take, within limits."""

from __future__ import annotations

import binascii
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import unquote_to_bytes

from backend.config import Config
from backend.errors import MAX_FAULTS, InvalidRequest, Overloaded, PayloadTooLarge
from backend.media import Refused
from backend.media.audio import decode_audio
from backend.media.fetch import fetch
from backend.media.images import CLEAR, decode_image
from backend.media.parts import (
    AudioField,
    ImageField,
    Source,
    Upload,
    VideoField,
)
from backend.media.video import decode_video

FETCH_TIMEOUT_S = 10.0  # for all URLs of a call together
CALLS_OF_MOST_PIXELS = 8  # how many of the largest calls a process holds at once


class MediaReader:
    """Reads the media of calls; what all calls of this process hold together is bounded."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._bytes_left = CALLS_OF_MOST_PIXELS * 3 * config.max_pixels
        self._lock = threading.Lock()  # so that the bound holds when many calls come at once

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Read one call's media; what it holds is counted until the block ends."""
        reading = Reading(self)
        try:
            yield reading
        finally:
            self.give_back(reading.bytes)

    def take(self, size: int) -> None:
        """Count bytes that are about to be decoded; raises ``Overloaded``."""
        with self._lock:
            if size > self._bytes_left:
                raise Overloaded(
                    "This worker holds as many pictures and sounds as it may; try again in 1 s.",
                    retry_after_s=1,
                )
            self._bytes_left -= size

    def give_back(self, size: int) -> None:
        with self._lock:
            self._bytes_left += size


class Reading:
    """One call's media."""

    def __init__(self, reader: MediaReader) -> None:
        self._reader = reader
        self.fetching_s = 0.0
        self.bytes = 0
        self._pixels = 0
        self._seconds = 0.0

    def read(self, value: Any, at: str) -> Any:
        """``value`` with every ``Source`` in it read.

        Raises ``InvalidRequest`` or ``PayloadTooLarge`` that names each field at fault by its path
        below ``at``; ``Overloaded`` where this process holds too much already.
        """
        faults: dict[str, Refused] = {}
        read = self._walk(value, at, faults)
        if faults:
            details = {path: str(refused) for path, refused in faults.items()}
            too_large = any(refused.too_large for refused in faults.values())
            raise (PayloadTooLarge if too_large else InvalidRequest).of(details)
        return read

    def _walk(self, value: Any, at: str, faults: dict[str, Refused]) -> Any:
        if type(value) is dict:
            return {key: self._walk(one, f"{at}.{key}", faults) for key, one in value.items()}
        if type(value) is list:
            return [self._walk(one, f"{at}[{i}]", faults) for i, one in enumerate(value)]
        if len(faults) >= MAX_FAULTS:
            return value  # the call is refused; others are not read
        if type(value) is Upload:
            faults[at] = Refused("is a file, which this field does not take")
        if type(value) is not Source:
            return value
        try:
            return self._decode(value, *self._bytes(value.given))
        except Refused as refused:
            faults[at] = refused

    def _decode(self, source: Source, data: bytes, mime_type: str | None) -> Any:
        field = source.field
        if isinstance(field, AudioField):
            claim = partial(self.claim_samples, before_s=self._seconds)
            return decode_audio(data, rate=field.rate, mime_type=mime_type, claim=claim)
        if isinstance(field, VideoField):
            return decode_video(
                data, max_frames=field.max_frames, mime_type=mime_type, claim=self.claim_pixels
            )
        assert isinstance(field, ImageField)
        clear = isinstance(source.given, Upload) and source.given.see_through_is_white
        mode = CLEAR if clear else field.mode
        return decode_image(data, mode=mode, mime_type=mime_type, claim=self.claim_pixels)

    def claim_pixels(self, pixels: int) -> None:
        """Count pixels that are about to be decoded; raises ``Refused``, ``Overloaded``."""
        most = self._reader.config.max_pixels
        if self._pixels + pixels > most:
            so_far = f" after {self._pixels} in this call" if self._pixels else ""
            raise Refused(
                f"has {pixels} pixels{so_far}; at most {most} are allowed in a call", too_large=True
            )
        self._take(3 * pixels)
        self._pixels += pixels

    def claim_samples(self, samples: int, rate: int, before_s: float) -> None:
        """Count float32 samples that are about to be decoded; likewise.

        A sound whose length nobody knows comes in parts: ``before_s`` is what others had taken
        when it began.
        """
        most = self._reader.config.max_audio_s
        seconds = samples / rate
        if self._seconds + seconds > most:
            lasts = f"lasts {self._seconds + seconds - before_s:.1f} s or more"
            after = f" after {before_s:.1f} s in this call" if before_s else ""
            raise Refused(
                f"{lasts}{after}; at most {most:g} s are allowed in a call", too_large=True
            )
        self._take(4 * samples)
        self._seconds += seconds

    def _take(self, size: int) -> None:
        self._reader.take(size)
        self.bytes += size

    def _bytes(self, given: str | Upload) -> tuple[bytes, str | None]:
        """The media themselves, and what they are called, if anything."""
        if isinstance(given, Upload):
            return _unless_empty(given.data), given.mime_type
        scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", given[:64])
        if scheme is None:
            return _of_base64(given), None
        if scheme[1].lower() == "data":
            return _of_data_url(given.strip())
        return self._fetch(given.strip())

    def _fetch(self, url: str) -> tuple[bytes, str | None]:
        config = self._reader.config
        started = time.monotonic()
        most_s = min(FETCH_TIMEOUT_S, config.request_timeout_s)
        try:
            return fetch(
                url,
                hosts=config.media_hosts,
                max_bytes=config.max_body,
                deadline=started + most_s - self.fetching_s,
            )
        finally:
            self.fetching_s += time.monotonic() - started


def _of_base64(text: str) -> bytes:
    try:
        # The tools that write base64 break its lines; nothing else in it is forgiven.
        data = binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except (binascii.Error, ValueError):
        raise Refused("is neither base64 nor a data: or https URL") from None
    return _unless_empty(data)


def _of_data_url(url: str) -> tuple[bytes, str | None]:
    """``data:image/png;base64,…``, or percent-encoded without ``;base64`` (RFC 2397)."""
    head, comma, body = url[len("data:") :].partition(",")
    if not comma:
        raise Refused("is a data: URL without a comma before its data")
    mime_type, *parameters = (part.strip().lower() for part in head.split(";"))
    if "base64" in parameters:
        return _of_base64(body), mime_type or None
    return _unless_empty(unquote_to_bytes(body)), mime_type or None


def _unless_empty(data: bytes) -> bytes:
    if not data:
        raise Refused("is empty")
    return data
