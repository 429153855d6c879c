"""From what callers send as media to what models take, within limits."""

from __future__ import annotations

import binascii
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import unquote_to_bytes

from backend.config import Config
from backend.errors import MAX_FAULTS, InvalidRequest, Overloaded, PayloadTooLarge
from backend.media import Refused
from backend.media.decoders import Caller, decoders_for
from backend.media.fetch import fetch
from backend.media.images import CLEAR
from backend.media.parts import (
    AudioField,
    ImageField,
    Source,
    Upload,
    VideoField,
)

FETCH_TIMEOUT_S = 10.0  # for all URLs of a call together
MEDIA_PER_INPUT = 2  # on average, of as many inputs as a call may have: a picture and its mask


class MediaReader:
    """Reads the media of calls; what all calls of this process hold together is bounded."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.decoders = decoders_for(config)
        self._bytes_left = config.max_media_bytes
        self._lock = threading.Lock()  # so that the bound holds when many calls come at once

    @contextmanager
    def reading(
        self, caller: str = "", caller_socket: socket.socket | None = None
    ) -> Iterator[Reading]:
        """Read one call's media; what it holds is counted until the block ends.

        ``CRANE_REQUEST_TIMEOUT`` begins now. What is read for a ``caller_socket`` whose other end
        is closed is read no further.
        """
        deadline = time.monotonic() + self.config.request_timeout_s
        reading = Reading(self, Caller(deadline, caller, caller_socket))
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

    def __init__(self, reader: MediaReader, caller: Caller) -> None:
        self._reader = reader
        self._caller = caller
        self._fetching_s = 0.0
        self.bytes = 0
        self._pixels = 0
        self._seconds = self._cost_s = 0.0  # of sounds: how long they last, and cost as much as

    def left_s(self) -> float:
        """How long the call may still take; raises ``DeadlineExceeded``."""
        return self._caller.left_s()

    def read(self, value: Any, at: str) -> Any:
        """``value`` with every ``Source`` in it read.

        Raises ``InvalidRequest`` or ``PayloadTooLarge`` that names each field at fault by its path
        below ``at``; ``Overloaded`` where this process holds too much already;
        ``DeadlineExceeded``; ``ClientClosedRequest``.
        """
        # Before the first name is looked up, or anything is decoded.
        count, most = _count_media(value), MEDIA_PER_INPUT * self._reader.config.max_batch
        if count > most:
            raise PayloadTooLarge.of({at: f"has {count} media; a call may have {most}"})
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
        decode = partial(
            self._reader.decoders.decode, data=data, mime_type=mime_type, caller=self._caller
        )
        if isinstance(field, AudioField):
            return self._decode_audio(field, decode)
        if isinstance(field, VideoField):
            return decode("video", max_frames=field.max_frames, claim=self.claim_pixels)
        assert isinstance(field, ImageField)
        clear = isinstance(source.given, Upload) and source.given.see_through_is_white
        return decode("image", mode=CLEAR if clear else field.mode, claim=self.claim_pixels)

    def _decode_audio(self, field: AudioField, decode: Callable[..., Any]) -> Any:
        before_s, before = self._seconds, self.bytes
        left_s = max(0.0, self._reader.config.max_audio_s - before_s)
        audio = decode(
            "audio",
            rate=field.rate,
            claim=partial(self.claim_samples, before_s=before_s),
            audio_left_s=left_s,
            max_cost_s=max(0.0, self._reader.config.max_audio_s - self._cost_s),
        )
        self._cost_s += audio.pop("cost_s")
        # What was claimed beyond what there was.
        samples = audio["samples"]
        surplus = self.bytes - before - samples.nbytes
        self._reader.give_back(surplus)
        self.bytes -= surplus
        self._seconds = before_s + len(samples) / audio["rate"]
        return audio

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
        deadline = min(started + FETCH_TIMEOUT_S - self._fetching_s, self._caller.deadline)
        try:
            return fetch(
                url,
                hosts=config.media_hosts,
                max_bytes=config.max_body,
                deadline=deadline,
            )
        finally:
            self._fetching_s += time.monotonic() - started


def _count_media(value: Any) -> int:
    if type(value) is dict:
        return sum(map(_count_media, value.values()))
    if type(value) is list:
        return sum(map(_count_media, value))
    return type(value) is Source


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
