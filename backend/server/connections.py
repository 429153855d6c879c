"""Connections that wait for their clients: what has come of a request, and until when."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Self

from gunicorn.http.errors import LimitRequestHeaders, NoMoreData

from backend.config import Config
from backend.server.requests import READ, Parser, Request, Unreader
from backend.server.sockets import ClientSocket, Pace

HEAD_END = b"\r\n\r\n"
MAX_HEAD = 2**15  # bytes; nginx has as much for large ones
# Bytes of a body that come before a thread does. A larger one is read by the thread, for its caller
# may be refused before: no more is read of a refused body either.
MAX_HELD_BODY = 2**16
# What is read and forgotten of a client that still sends when it is answered, or it would be cut
# off before it has read the answer; and for how long.
MAX_LINGERED = 2**20
LINGER_S = 2.0


class State(StrEnum):
    """What a connection waits for."""

    SILENT = "silent"  # the first byte
    IDLE = "idle"  # the first byte of another request
    HEAD = "head"
    BODY = "body"
    KEPT = "kept"  # nothing: its response is sent later
    UNSENT = "unsent"  # the client to take its response
    CLOSING = "closing"  # the client to close


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds, and bytes/s, that clients have; see the settings of the same names."""

    pace: Pace
    head_timeout_s: float
    body_timeout_s: float
    idle_timeout_s: float
    max_body: int

    @classmethod
    def of(cls, config: Config, idle_timeout_s: float) -> Self:
        return cls(
            pace=Pace(config.client_timeout_s, config.min_rate),
            head_timeout_s=config.head_timeout_s,
            body_timeout_s=config.request_timeout_s,
            idle_timeout_s=idle_timeout_s,
            max_body=config.max_body,
        )


class Connection:
    """One client's connection. It belongs to the poller while it waits, else to one thread."""

    def __init__(
        self, cfg: Any, sock: ClientSocket, client: Any, server: Any, limits: Limits
    ) -> None:
        self.cfg, self.sock, self.client, self.server = cfg, sock, client, server
        self.address = sock.address
        self.request: Request | None = None
        self.keep = True  # after the response
        self.surplus = False  # it came when there were too many, and all others were at work
        self.closed = False
        self.state = State.SILENT
        self._limits = limits
        self._reader = Unreader(sock, limits.pace, limits.body_timeout_s, limits.max_body)
        self.parser = Parser(cfg, sock, client, self._reader)
        self._head = bytearray()
        self._since = time.monotonic()  # in this state, or with this part of a request
        self._moved = 0  # bytes since then
        self._size = 0  # bytes, of what the client has to take
        self.deadline = self._since + limits.head_timeout_s

    def receive(self) -> bool:
        """Take what has come; whether a request is ready for a thread.

        Raises ``EOFError``, ``OSError``, or gunicorn's own error of a head that is malformed.
        """
        try:
            data = self.sock.recv(READ)
        except BlockingIOError:
            return False
        if not data:
            raise EOFError
        if self.request is None:
            return self._take_head(data)
        self._reader.feed(data)
        self._moved += len(data)
        return self._is_ready()

    def renew(self) -> bool:
        """Go on to the next request; whether it is here. Raises what ``receive`` raises."""
        self.parser.finish_body()  # all of which is here, or the connection would be closed
        self.request = None
        self._begin(State.IDLE, self._limits.idle_timeout_s)
        rest = self._reader.restart()
        return bool(rest) and self._take_head(rest)

    def wait_for_client_to_take(self) -> None:
        if self.sock.kept_for_s > 0:
            self._begin(State.KEPT, self.sock.kept_for_s)
            return
        self._begin(State.UNSENT, 0)
        self._size = self.sock.unsent
        self.flush()

    def flush(self) -> bool:
        """Send more of the response; whether that was all. Raises ``OSError``."""
        before = self.sock.unsent
        done = self.sock.flush()
        if before > self.sock.unsent or not self._moved:
            self._moved = self._size - self.sock.unsent
            self.deadline = self._limits.pace.deadline(self._since, self._moved)
        return done

    def linger(self) -> None:
        """Send no more, and have the client read what was sent; raises ``OSError``."""
        self._begin(State.CLOSING, LINGER_S)
        self.sock.shutdown(socket.SHUT_WR)

    def discard(self) -> bool:
        """Forget what has come of a client that was answered; whether to go on with that."""
        try:
            data = self.sock.recv(READ)
        except BlockingIOError:
            return True
        self._moved += len(data)
        return bool(data) and self._moved < MAX_LINGERED

    def _begin(self, state: State, timeout_s: float) -> None:
        self.state = state
        self._since = time.monotonic()
        self._moved = 0
        self.deadline = self._since + timeout_s

    def _take_head(self, data: bytes) -> bool:
        if self._head or HEAD_END not in data:
            searched = max(0, len(self._head) - len(HEAD_END) + 1)
            self._head += data
            if self._head.find(HEAD_END, searched) < 0:
                if self.state is not State.HEAD:
                    # From its first byte on a head has this long, however slowly it comes.
                    silent = self.state is State.SILENT
                    since = self._since if silent else time.monotonic()
                    self.state, self.deadline = State.HEAD, since + self._limits.head_timeout_s
                self._check_head()
                return False
            data = bytes(self._head)
            self._head.clear()
        self._reader.feed(data)
        self.request = next(self.parser)
        self._begin(State.BODY, 0)
        self._moved = self._reader.buffered
        return self._is_ready()

    def _check_head(self) -> None:
        """Refuse at once what can never become a head, as HTTP/0.9 and lines without CR cannot."""
        head = self._head
        line, ended, _ = head.partition(b"\r\n")
        bare = head.count(b"\n") != head.count(b"\r\n")
        if bare or (ended and line and line.count(b" ") != 2) or len(head) > MAX_HEAD:
            reader = Unreader(self.sock, self._limits.pace, 0, 0)
            reader.feed(head)
            try:
                Request(self.cfg, reader, self.client)
            except NoMoreData:
                if len(head) > MAX_HEAD:
                    raise LimitRequestHeaders("max buffer headers") from None

    def _is_ready(self) -> bool:
        assert self.request is not None
        missing = self.request.missing
        if not missing or missing > MAX_HELD_BODY or self._reader.expects_continue:
            return True
        body_deadline = self._limits.pace.deadline(self._since, self._moved)
        self.deadline = min(body_deadline, self._since + self._limits.body_timeout_s)
        return False


class Waiting:
    """The connections that wait, by address: who waits longest where most do leaves first."""

    def __init__(self) -> None:
        self._by_address: dict[str, dict[Connection, None]] = {}  # in order of their coming

    def __iter__(self) -> Iterator[Connection]:
        for connections in list(self._by_address.values()):
            yield from list(connections)

    def __len__(self) -> int:
        return sum(map(len, self._by_address.values()))

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._by_address.get(connection.address, ())

    def add(self, connection: Connection) -> None:
        self._by_address.setdefault(connection.address, {})[connection] = None

    def remove(self, connection: Connection) -> None:
        of_address = self._by_address[connection.address]
        del of_address[connection]
        if not of_address:
            del self._by_address[connection.address]

    def oldest(self, address: str | None = None) -> Connection | None:
        """Who waits longest of an address, or of the one that has most; None if nobody does."""
        if address is None:
            address = max(self._by_address, key=lambda one: len(self._by_address[one]), default="")
        return next(iter(self._by_address.get(address, ())), None)


@lru_cache(4096)
def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and not found.ipv4_mapped:
        return str(ipaddress.ip_network((found, 64), strict=False))  # what one customer has
    return address


def network_of(client: Any) -> str:
    """Whose connections are counted together; empty for a Unix socket's, which are a proxy's."""
    return _network(client[0]) if isinstance(client, tuple) else ""
