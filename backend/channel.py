"""Messages over a Unix socket: a head says how long the parts of one are, then they come."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import numpy as np

from backend.messages import BadMessage, Part

VERSION = 1  # of how messages look; one of another version is refused
_HEAD = struct.Struct(">BI")  # the version, and how many parts
_LENGTH = 8  # bytes, for how many each part has
_ONE = struct.Struct(">BIQ")  # the head of a message that has one part
READ = 65536  # bytes at a time; nearly all messages are smaller
MAX_PARTS = 250_000  # twice as many as a call may ever have inputs, and some
MAX_BUFFERS = 1024  # of one sendmsg, as POSIX systems have it


class MessageTooLarge(ValueError):
    """A message of ours is above the bound; none of it was sent."""


def send_from(end: socket.socket, buffers: deque[memoryview]) -> int:
    """Send what the other end takes at once, and drop it from the buffers; the bytes sent.

    Raises ``BlockingIOError`` where it takes nothing, or another ``OSError``.
    """
    sent = end.sendmsg(list(islice(buffers, MAX_BUFFERS)))
    left = sent
    while buffers and left >= len(buffers[0]):
        left -= len(buffers.popleft())
    if left:
        buffers[0] = buffers[0][left:]
    return sent


class Channel:
    """One end of a connection. Nothing here waits: what the other end does not take yet is kept."""

    def __init__(self, end: socket.socket, *, max_bytes: int) -> None:
        """``max_bytes`` bounds each message, both ways, and what is kept for the other end.

        Memory is taken as bytes come, not as a head says how many will.
        """
        end.setblocking(False)
        self._end = end
        self._max_bytes = max_bytes
        self._in = bytearray()
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        # Of the message that is coming: what each part will have, and those that are whole.
        self._lengths: tuple[int, ...] | None = None
        self._parts: list[Part] = []
        # A part that is longer than what is read at once goes where it is to stay.
        self._large: memoryview | None = None
        self._filled = 0

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def closed(self) -> bool:
        return self._end.fileno() < 0

    @property
    def has_unsent(self) -> bool:
        """Whether some of what was sent is left for ``flush``."""
        return bool(self._out)

    def close(self) -> None:
        self._end.close()

    def take_no_more(self) -> None:
        """Have the other end fail to send from now on; what it has sent can still be received."""
        with suppress(OSError):  # it has gone
            self._end.shutdown(socket.SHUT_RD)

    def send(self, message: Sequence[Part]) -> bool:
        """Send a message's parts; false where some of it is left for ``flush``.

        They must not change until then. Raises ``MessageTooLarge``; ``OSError`` where the other
        end has gone, or has left more than ``max_bytes`` of messages lying.
        """
        lengths = [len(part) for part in message]
        total = sum(lengths)
        if total > self._max_bytes or len(message) > MAX_PARTS:
            raise MessageTooLarge(f"a message has {total} bytes in {len(message)} parts")
        head = struct.pack(f">BI{len(lengths)}Q", VERSION, len(lengths), *lengths)
        if not self._out and total < READ:  # as nearly always, and all of it goes at once
            data = head + b"".join(message)
            with suppress(BlockingIOError):
                sent = self._end.send(data)
                if sent == len(data):
                    return True
                data = data[sent:]
            self._keep(data)
            return False
        if self._out_bytes > self._max_bytes:
            with suppress(OSError):
                self._end.shutdown(socket.SHUT_RDWR)  # for whoever waits on it to see its end
            raise ConnectionAbortedError("the other end does not read its messages")
        for part in (head, *message):
            self._keep(part)
        return self.flush()

    def _keep(self, part: Part) -> None:
        if len(part):
            self._out.append(memoryview(part))
            self._out_bytes += len(part)

    def flush(self) -> bool:
        """Send what is left, as far as the other end takes it; whether that is all."""
        while self._out:
            try:
                self._out_bytes -= send_from(self._end, self._out)
            except BlockingIOError:
                return False
        return True

    def receive(self) -> list[list[Part]]:
        """The messages that have come whole by now.

        Raises ``EOFError`` at the end, ``OSError``, and ``BadMessage``, after which the
        connection is of no use.
        """
        try:
            if self._large is not None:
                came = self._end.recv_into(self._large[self._filled :])
                self._filled += came
            else:
                data = self._end.recv(READ)
                came = len(data)
                if came > _ONE.size and self._lengths is None and not self._in:
                    # As nearly always: one message of one part, and all of it.
                    version, count, length = _ONE.unpack_from(data)
                    if (version, count, length) == (VERSION, 1, came - _ONE.size) and (
                        length <= self._max_bytes
                    ):
                        return [[memoryview(data)[_ONE.size :]]]
                self._in += data
        except BlockingIOError:
            return []
        if not came:
            raise EOFError
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def _next(self) -> list[Part] | None:
        """The next message, if all of it is here."""
        if self._lengths is None and not self._read_head():
            return None
        assert self._lengths is not None
        while len(self._parts) < len(self._lengths):
            part = self._part(self._lengths[len(self._parts)])
            if part is None:
                return None
            self._parts.append(part)
        message, self._parts, self._lengths = self._parts, [], None
        return message

    def _read_head(self) -> bool:
        """Whether a head is here; what it says is in ``_lengths`` then."""
        if len(self._in) < _HEAD.size:
            return False
        version, count = _HEAD.unpack_from(self._in)
        if version != VERSION:
            raise BadMessage(f"it is of version {version}, and {VERSION} is spoken here")
        if not 0 < count <= MAX_PARTS:
            raise BadMessage(f"it has {count} parts")
        end = _HEAD.size + count * _LENGTH
        if len(self._in) < end:
            return False
        lengths = struct.unpack_from(f">{count}Q", self._in, _HEAD.size)
        if sum(lengths) > self._max_bytes:
            raise BadMessage(f"it has {sum(lengths)} bytes, and {self._max_bytes} is the most")
        del self._in[:end]
        self._lengths = lengths
        return True

    def _part(self, length: int) -> Part | None:
        """The next part, if all of it is here."""
        if self._large is not None:
            if self._filled < length:
                return None
            part, self._large = self._large, None
            return part
        if len(self._in) >= length:
            part = memoryview(bytes(memoryview(self._in)[:length]))
            del self._in[:length]
            return part
        if length > READ:
            # Not bytearray, which would write zeros, and so take all of it, at once.
            self._large = np.empty(length, np.uint8).data
            self._filled = len(self._in)
            self._large[: self._filled] = self._in
            self._in.clear()
        return None
