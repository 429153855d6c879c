"""Decodes media in a process of its own, which can be ended: a file may be made to hang a parser.

Run as ``python -m backend.media.decoder FD MEMORY`` by ``backend.media.decoders``, with its end of
a socket and the bytes of memory that it may map. It answers one request at a time. It ends with
the process that started it, whatever that dies of and whatever a decoder is doing.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import av  # noqa: F401  # here, while nobody waits
import PIL.Image  # noqa: F401
from PIL import features

from backend.channel import Channel
from backend.media import Refused
from backend.media.audio import decode_audio
from backend.media.images import decode_image
from backend.media.video import decode_video
from backend.messages import Part, pack, unpack

MAX_MESSAGE = 2**40  # its parent's bound is in the settings; what it makes, MEMORY bounds
BLOCK_S = 30.0  # of a sound whose length is not known: how much is claimed at once

DECODE: dict[str, Callable[..., Any]] = {
    "image": decode_image,
    "audio": decode_audio,
    "video": decode_video,
}


class Denied(Refused):
    """Its claim was not granted; the other end knows why."""


class Decoder:
    """One end of the socket: a request comes in, and claims and a result go out."""

    def __init__(self, end: socket.socket) -> None:
        self._channel = Channel(end, max_bytes=MAX_MESSAGE)
        self._poll = select.poll()
        self._came: list[list[Part]] = []

    def serve(self) -> None:
        """Answer until the other end is closed, which is an ``EOFError``."""
        while True:
            request = self._receive()
            # Should the process that started this one be gone, nobody else would end it. This needs
            # no thread of Python's, which a decoder may keep from running.
            faulthandler.dump_traceback_later(request["timeout_s"], exit=True, file=self._nowhere)
            self._send(self._answer(request))
            faulthandler.cancel_dump_traceback_later()

    _nowhere = open(os.devnull, "wb")  # noqa: SIM115  # for as long as the process lives

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        claim: Callable[..., None] = self._claim
        if request["kind"] == "audio":
            claim = in_blocks(self._claim, request["audio_left_s"])
        decode = DECODE[request["kind"]]
        try:
            data = memoryview(request["data"]).tobytes()
            return {"result": decode(data, **request["options"], claim=claim)}
        except Refused as refused:
            return {"refused": str(refused), "too_large": refused.too_large}

    def _claim(self, *amounts: int) -> None:
        self._send({"claim": amounts})
        if not self._receive():
            raise Denied("is not granted")

    def _send(self, message: Any) -> None:
        sent = self._channel.send(pack(message))
        while not sent:
            self._wait(select.POLLOUT)
            sent = self._channel.flush()

    def _receive(self) -> Any:
        while not self._came:
            self._wait(select.POLLIN)
            self._came = self._channel.receive()
        return unpack(self._came.pop(0))

    def _wait(self, what: int) -> None:
        self._poll.register(self._channel, what)
        self._poll.poll()


def in_blocks(claim: Callable[..., None], left_s: float) -> Callable[[int, int], None]:
    """Claim samples ``BLOCK_S`` at a time: a frame has some milliseconds of them.

    No more is claimed than the ``left_s`` that are allowed, while that is enough.
    """
    granted = used = 0

    def claim_samples(samples: int, rate: int) -> None:
        nonlocal granted, used
        used += samples
        if used > granted:
            wanted = max(used, min(used + int(BLOCK_S * rate), int(left_s * rate)))
            claim(wanted - granted, rate)
            granted = wanted

    return claim_samples


def end_with_parent(end: socket.socket) -> None:
    """End this process when the other end of the socket is closed, in the midst of a file too."""
    poll = select.poll()
    poll.register(end, getattr(select, "POLLRDHUP", select.POLLHUP))
    poll.poll()
    os._exit(0)


def main() -> None:
    fd, memory = int(sys.argv[1]), int(sys.argv[2])
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    for codec in ("jpg", "zlib", "webp"):
        features.check(codec)
    with suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end = socket.socket(fileno=fd)
    threading.Thread(target=end_with_parent, args=(end,), daemon=True).start()
    with suppress(EOFError, OSError):
        Decoder(end).serve()


if __name__ == "__main__":
    main()
