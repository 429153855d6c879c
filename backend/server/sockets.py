"""A client's socket that nobody has to wait for, and what all clients may leave unread."""

from __future__ import annotations

import resource
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

from backend.channel import send_from

# Bytes of a stream that are kept for a client that is slower than the model.
MAX_KEPT = 2**16
MAX_FILES = 2**16
MAX_NOT_SENT = 2**17  # bytes that the kernel keeps beside those on their way


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow a client may be: ``timeout_s`` without a byte, else ``min_rate`` bytes/s on average.

    Without the average, a byte now and then would keep a connection for ever.
    """

    timeout_s: float
    min_rate: float

    def deadline(self, started: float, moved: int) -> float:
        """When to give up, after ``moved`` bytes since ``started``, if no other byte moves."""
        average = started + self.timeout_s + moved / self.min_rate
        return min(time.monotonic() + self.timeout_s, average)


class ClientSocket(socket.socket):
    """Never blocks: ``sendall`` keeps what the client does not take, for ``flush``.

    Only a stream, whose end is not known, waits for its client, once ``MAX_KEPT`` bytes are kept.
    """

    def __init__(
        self,
        accepted: socket.socket,
        pace: Pace,
        address: str = "",
        all_unsent: Unsent | None = None,
    ) -> None:
        """``address`` is whose connections are counted together in ``all_unsent``."""
        family, kind, proto = accepted.family, accepted.type, accepted.proto
        super().__init__(family, kind, proto, accepted.detach())
        self.setblocking(False)
        if family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Else a reader whose megabytes the kernel keeps seems to take nothing for minutes.
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_NOT_SENT)
        self.address = address
        self._all_unsent = all_unsent
        self.is_dropped = False  # and so at its end, soon
        self._pace = pace
        self._unsent: deque[memoryview] = deque()
        self._waited_s = 0.0
        self._taken = 0  # bytes, while we waited
        self.unsent = 0  # bytes
        self._kept_until = 0.0  # on the monotonic clock
        self._holds_head = False
        self._head = b""

    @cached_property
    def ends(self) -> tuple[Any, Any]:
        """The addresses of this end and of the client's; raises ``OSError`` where it is gone."""
        return self.getsockname(), self.getpeername()

    def keep_for(self, seconds: float) -> None:
        """Send nothing for so long. It is for a response that is known whole, and small."""
        self._kept_until = time.monotonic() + seconds

    @property
    def kept_for_s(self) -> float:
        return self._kept_until - time.monotonic() if self._kept_until else 0.0

    @property
    def held(self) -> int:
        """Bytes in memory: what was sent at once stays there whole until its last byte is taken."""
        if not self._unsent:
            return 0
        first = self._unsent[0]
        return self.unsent + memoryview(first.obj).nbytes - first.nbytes

    def hold_head(self) -> None:
        """Keep what is sent next, a response's head, until the first part of its body.

        Both in one packet are one system call, and one wake-up of the client.
        """
        self._holds_head = True

    def send_head(self) -> None:
        """Send the head if it is still held, as that of a response without a body."""
        self._holds_head = False
        if self._head:
            self.send_now(b"")

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send what goes at once and keep the rest; a head that is to be held is kept whole.

        Raises ``OSError`` where the client is gone, or ``TimeoutError`` where it takes too little.
        """
        if self._holds_head:
            self._head, self._holds_head = data, False
        else:
            self.send_now(data)

    def send_now(self, data: Any) -> None:
        """Send as ``sendall`` does, whatever is to be held."""
        if head := self._head:
            self._head = b""
            if len(data) > MAX_KEPT:  # which is not copied
                self.send_now(head)
            else:
                data = head + data
        full = self.unsent > MAX_KEPT
        if self._unsent or self._kept_until:
            self._keep(data, 0)
            self.flush()
        else:
            try:
                sent = self.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                self._keep(data, sent)
                self._count()
        if full:
            self._wait()

    def flush(self) -> bool:
        """Send what the client takes now; whether that is all. Raises ``OSError``."""
        if self.kept_for_s > 0:
            return False
        self._kept_until = 0.0
        with suppress(BlockingIOError):
            while self._unsent:
                self.unsent -= send_from(self, self._unsent)
        self._count()
        return not self._unsent

    def close(self) -> None:
        if self._all_unsent is not None:
            self._all_unsent.count(self, 0)
        super().close()

    def _keep(self, data: Any, sent: int) -> None:
        self._unsent.append(memoryview(data)[sent:])
        self.unsent += len(data) - sent

    def _count(self) -> None:
        if self._all_unsent is not None:
            self._all_unsent.count(self, self.held)

    def _wait(self) -> None:
        """Wait until no more than ``MAX_KEPT`` bytes are kept. Raises ``TimeoutError``."""
        self._kept_until = 0.0
        poll = select.poll()
        poll.register(self, select.POLLOUT)
        while self.unsent > MAX_KEPT:
            began, before = time.monotonic(), self.unsent
            until = self._pace.deadline(began - self._waited_s, self._taken)
            if not poll.poll(max(0.0, until - began) * 1e3):
                raise TimeoutError("the client takes too little of its response")
            self.flush()
            self._waited_s += time.monotonic() - began
            self._taken += before - self.unsent


class Unsent:
    """What a worker holds of responses that clients have not taken, in its threads or parked.

    Above ``max_bytes`` a connection is shut down, so that whoever waits for it sees its end: of the
    address that holds most the one that does, the oldest of equals. Never the only one.
    """

    def __init__(self, max_bytes: int, count_dropped: Callable[[], None]) -> None:
        self._max_bytes = max_bytes
        self._count_dropped = count_dropped
        self._held: dict[ClientSocket, int] = {}  # bytes, in the order of their coming
        self._total = 0
        # While a socket is in ``_held`` it is not closed, nor its number another's.
        self._lock = Lock()

    def count(self, sock: ClientSocket, size: int) -> None:
        """Note that so many bytes are held for a client now; none before its socket is closed."""
        if not size and sock not in self._held:  # which no other thread puts there
            return
        with self._lock:
            if sock.is_dropped:
                return
            self._total += size - self._held.get(sock, 0)
            if size:
                self._held[sock] = size
            else:
                self._held.pop(sock, None)
            while self._total > self._max_bytes and len(self._held) > 1:
                self._drop_one()

    def _drop_one(self) -> None:
        by_address: Counter[str] = Counter()
        for sock, size in self._held.items():
            by_address[sock.address] += size
        most = max(self._held, key=lambda sock: (by_address[sock.address], self._held[sock]))
        most.is_dropped = True
        with suppress(OSError):  # its client has gone
            most.shutdown(socket.SHUT_RDWR)
        self._total -= self._held.pop(most)
        self._count_dropped()


def max_files() -> int:
    """Files that this process may have open, having asked for as many as it can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(soft, wanted)
