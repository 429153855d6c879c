"""gunicorn's parser, fed by whoever reads the connection, and its bodies with deadlines."""

from __future__ import annotations

import io
import math
import select
import threading
import time
from typing import Any

from gunicorn.http import body, message, parser, unreader
from gunicorn.http.errors import NoMoreData, ParseException

from backend.errors import InvalidRequest, RequestTimeout, body_too_large
from backend.server.sockets import ClientSocket, Pace

MAX_READ = 2**20  # bytes at a time of a large body
READ = 2**14
# Chunks that a body may have, and the bytes of each on average where there are more: each takes
# 7 µs to parse, while no other thread runs. nginx joins them.
MAX_CHUNKS = 4096
MIN_CHUNK = 512
# Threads that all receive at once what is sent quickly would keep all others from running.
_RECEIVING = threading.Lock()


class Unreader(unreader.Unreader):  # type: ignore[misc]
    """The bytes that have come. A head is parsed once it is whole; a body's rest is waited for."""

    def __init__(
        self, sock: ClientSocket, pace: Pace, body_timeout_s: float, max_body: int
    ) -> None:
        super().__init__()
        self.max_body = max_body
        self.expects_continue = False
        self.in_body = False
        self._sock = sock
        self._pace = pace
        self._body_timeout_s = body_timeout_s
        self._began: float | None = None
        self._received = 0

    @property
    def buffered(self) -> int:
        """Bytes."""
        return len(self.buf.getbuffer())

    def feed(self, data: bytes | bytearray) -> None:
        """Put what has come behind what is there."""
        self.buf.seek(0, io.SEEK_END)
        self.buf.write(data)

    def restart(self) -> bytes:
        """Forget the request before, and give what has come behind it."""
        self.expects_continue = self.in_body = False
        self._began, self._received = None, 0
        rest: bytes = self.take_buffered()
        return rest

    def chunk(self, size_hint: int | None = None) -> bytes:
        """More of a body. Raises ``InvalidRequest`` at the end, and ``RequestTimeout``."""
        if not self.in_body:
            raise NoMoreData()
        if self._began is None:
            self._began = time.monotonic()
            if self.expects_continue:
                self._sock.send_now(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = min(max(size_hint or 0, READ), MAX_READ)
        while True:
            try:
                with _RECEIVING:
                    data = self._sock.recv(size)
            except BlockingIOError:
                self._wait(self._began)
                continue
            if not data:
                raise cut_short("body")
            self._received += len(data)
            return data

    def _wait(self, began: float) -> None:
        until = min(self._pace.deadline(began, self._received), began + self._body_timeout_s)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1e3):
            raise too_slow("body")


def cut_short(part: str) -> InvalidRequest:
    return InvalidRequest.of({part: "ends before all of it has come"})


def too_slow(part: str) -> RequestTimeout:
    return RequestTimeout(
        f"The {part} of the request came too slowly, or not at all. Send it faster, or less of it."
    )


class Body(body.Body):  # type: ignore[misc]
    """A body whose faults are the caller's, in our words."""

    def __init__(self, reader: Any, unreader: Unreader) -> None:
        super().__init__(reader)
        self._unreader = unreader

    @property
    def is_read(self) -> bool:
        """Whether all of it was read, as far as that is known without a look."""
        return isinstance(self.reader, body.LengthReader) and not self.reader.length

    @property
    def missing(self) -> float:
        """Bytes that have not come; infinite where only the body's end will tell."""
        if isinstance(self.reader, body.LengthReader):
            left: int = self.reader.length
            return max(0, left - self._unreader.buffered) if left else 0
        return 0 if self.reader.parser is None else math.inf

    def _read_reader(self, size: int) -> bytes:
        try:
            data: bytes = self.reader.read(size)
        except Exception as error:
            self.failed = True
            if not isinstance(error, ParseException | NoMoreData):
                raise
            fault = f"is not sent as HTTP has it: {str(error)[:200] or type(error).__name__}"
            raise InvalidRequest.of({"body": fault}) from error
        return data


class Chunks(body.ChunkedReader):  # type: ignore[misc]
    """A body in chunks, which is refused as soon as their sizes say that it is too large."""

    def __init__(self, req: Any, unreader: Unreader) -> None:
        super().__init__(req, unreader)
        self._count = self._size = 0
        self._max_size = unreader.max_body

    def parse_chunk_size(self, unreader: Any, data: bytes | None = None) -> tuple[int, bytes]:
        size, rest = super().parse_chunk_size(unreader, data)
        self._count += 1
        self._size += size
        if self._size > self._max_size:
            raise body_too_large(self._max_size)
        if self._count > MAX_CHUNKS and self._size < self._count * MIN_CHUNK:
            fault = f"has over {MAX_CHUNKS} chunks of less than {MIN_CHUNK} bytes; send larger ones"
            raise InvalidRequest.of({"body": fault})
        return size, rest


class Request(message.Request):  # type: ignore[misc]
    """A request whose connection is closed after it where some of its body has not come by then.

    To wait for that, only to throw it away, would take a thread.
    """

    body: Any
    unreader: Any

    def set_body_reader(self) -> None:
        super().set_body_reader()
        reader = self.body.reader
        if isinstance(reader, body.ChunkedReader):
            reader = Chunks(self, self.unreader)
        self.body = Body(reader, self.unreader)
        # gunicorn would send its 100 at once, and so invite bodies that are refused unread.
        self.unreader.expects_continue = bool(self._expected_100_continue)
        self._expected_100_continue: bool = False
        self.unreader.in_body = True

    @property
    def missing(self) -> float:
        """Of the body, as it says."""
        missing: float = self.body.missing
        return missing

    def should_close(self) -> bool:
        body = self.body
        if body.failed or (not body.is_read and body.missing > 0):
            return True
        return bool(super().should_close())


class Parser(parser.RequestParser):  # type: ignore[misc]
    """The requests of a connection, one after the other."""

    mesg_class = Request

    def __init__(self, cfg: Any, sock: ClientSocket, client: Any, reader: Unreader) -> None:
        super().__init__(cfg, sock, client)
        self.unreader = reader

    def finish_body(self, deadline: float | None = None, max_bytes: int | None = None) -> bool:
        """Skip what the app did not read, which is here; gunicorn asks the socket twice before."""
        if self.mesg is None or self.mesg.body.is_read:
            return True
        return bool(super().finish_body(deadline, max_bytes))
