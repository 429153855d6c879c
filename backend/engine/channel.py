"""Messages over a Unix socket: four bytes say how long one is, then it comes."""

from __future__ import annotations

import socket
import struct
from collections import deque
from contextlib import suppress
from itertools import islice

_LENGTH = struct.Struct(">I")
READ = 65536  # bytes at a time; nearly all messages are smaller
MOST_PARTS = 1024  # of one sendmsg, as POSIX systems have it


class Channel:
    """One end of a connection. Nothing here waits: what the other end does not take yet is kept."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._in = bytearray()
        self._out: deque[memoryview] = deque()

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def closed(self) -> bool:
        return self._end.fileno() < 0

    def close(self) -> None:
        self._end.close()

    def send(self, message: bytes) -> bool:
        """Send a message; false where some of it is left for ``flush``. Raises ``OSError``."""
        if not self._out and len(message) < READ:  # as nearly always, and all of it goes at once
            data = _LENGTH.pack(len(message)) + message
            with suppress(BlockingIOError):
                sent = self._end.send(data)
                if sent == len(data):
                    return True
                self._out.append(memoryview(data)[sent:])
                return False
        self._out += (memoryview(_LENGTH.pack(len(message))), memoryview(message))
        return self.flush()

    def flush(self) -> bool:
        """Send what is left, as far as the other end takes it; whether that is all."""
        while self._out:
            try:
                sent = self._end.sendmsg(list(islice(self._out, MOST_PARTS)))
            except BlockingIOError:
                return False
            while self._out and sent >= len(self._out[0]):
                sent -= len(self._out.popleft())
            if sent:
                self._out[0] = self._out[0][sent:]
        return True

    def receive(self) -> list[bytes]:
        """The messages that have come whole by now. Raises ``EOFError`` at the end, ``OSError``."""
        try:
            data = self._end.recv(max(READ, self._missing()) if self._in else READ)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        if not self._in and len(data) == _first_end(data):
            return [data[_LENGTH.size :]]
        self._in += data
        messages = []
        while not self._missing():
            end = _first_end(self._in)
            messages.append(bytes(memoryview(self._in)[_LENGTH.size : end]))
            del self._in[:end]
        return messages

    def _missing(self) -> int:
        """How many bytes the first message still lacks, as far as is known."""
        return max(0, _first_end(self._in) - len(self._in))


def _first_end(data: bytes | bytearray) -> int:
    """Where the first message in ``data`` ends, as far as is known."""
    length: int = 0
    if len(data) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(data)
    return _LENGTH.size + length
