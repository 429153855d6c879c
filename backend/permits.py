"""How many calls an HTTP worker has at once, and how many of them whose bodies are on their way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore, Lock

from backend.errors import Overloaded


class Permits:
    """``CRANE_THREADS`` permits, of which one caller's bodies hold half at most as they come.

    So a caller that sends its bodies slowly leaves permits to others, and to its own small calls.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = BoundedSemaphore(count)
        self._max_coming = max(1, count // 2)
        self._coming: Counter[str] = Counter()
        self._lock = Lock()  # so that a count and its check are one step

    def take(self) -> None:
        """Take a permit; raises ``Overloaded`` at once where none is free.

        A call has one before its body is read: bodies take threads, and memory. The server has a
        few threads more, for all that is no call.
        """
        if not self._free.acquire(blocking=False):
            raise Overloaded(
                f"This worker has {self.count} calls already; try again in 1 s.", retry_after_s=1
            )

    def release(self) -> None:
        self._free.release()

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
