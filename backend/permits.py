"""How many calls an HTTP worker has at once, and how many of them whose bodies are on their way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore, Lock

from backend.errors import ConcurrencyLimitExceeded, Overloaded

# Permits that a caller may have beside those of its calls at once: a stream's last byte may be
# read, and the next call sent, before the stream's thread is done.
SPARE = 8


class Permits:
    """``CRANE_THREADS`` permits, of which one caller's bodies hold half at most as they come.

    So a caller that sends its bodies slowly leaves permits to others, and to its own small calls.
    A stream has its permit until the last byte of it is read, which may be long after its lease.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = BoundedSemaphore(count)
        self._max_coming = max(1, count // 2)
        self._coming: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._lock = Lock()  # so that a count and its check are one step

    def take(self, caller: str, at_once: int) -> None:
        """Take a permit for a caller that may have so many calls at once.

        Raises ``Overloaded`` at once where none is free, and ``ConcurrencyLimitExceeded`` where the
        caller has ``SPARE`` more than its calls need: it reads its streams too slowly.

        A call has one before its body is read: bodies take threads, and memory. The server has a
        few threads more, for all that is no call.
        """
        with self._lock:
            held = self._held[caller]
            if held >= at_once + max(SPARE, at_once // SPARE):
                raise ConcurrencyLimitExceeded(
                    f"This worker has {held} calls of yours, some of them streams that are not "
                    f"read to their end, and your tier has {at_once} at once; read them first.",
                    details={"limit": "concurrency"},
                    retry_after_s=1,
                )
            if not self._free.acquire(blocking=False):
                raise Overloaded(
                    f"This worker has {self.count} calls already; try again in 1 s.",
                    retry_after_s=1,
                )
            self._held[caller] = held + 1

    def release(self, caller: str) -> None:
        with self._lock:
            self._free.release()
            self._held[caller] -= 1
            if not self._held[caller]:
                del self._held[caller]

    @contextmanager
    def body_of(self, caller: str) -> Iterator[None]:
        """Count a body that has not all come while its thread reads it; raises ``Overloaded``."""
        with self._lock:
            if self._coming[caller] >= self._max_coming:
                raise Overloaded(
                    f"{self._max_coming} bodies of yours are on their way to this worker, the most "
                    "at once; try again in 1 s.",
                    retry_after_s=1,
                )
            self._coming[caller] += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming[caller] -= 1
                if not self._coming[caller]:
                    del self._coming[caller]
