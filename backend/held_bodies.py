"""How much of its callers' bodies an HTTP worker holds at once."""

from __future__ import annotations

from collections import Counter
from threading import Lock

from backend.errors import Overloaded

# Bytes. A body that is no larger is let in whatever is held, and parsed without waiting for others.
SMALL = 2**16


class HeldBodies:
    """The bytes of the bodies of all calls inside, ``CRANE_MAX_BODIES`` of them at most.

    A call's inputs take as much as its body until it has ended, and several times as much while
    they are parsed and passed on. One caller may hold half, and anybody one body at least.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()  # bytes, by caller
        self._lock = Lock()  # so that a sum and its check are one step

    def take(self, caller: str, size: int) -> int:
        """Count a body of ``size`` bytes before it is read; the bytes that were counted.

        Raises ``Overloaded``.
        """
        if size <= SMALL:
            return 0
        with self._lock:
            own, total = self._held[caller], self._held.total()
            if own and own + size > self._max_bytes // 2:
                raise Overloaded(
                    f"Your calls have sent {own} bytes to this worker that it still holds, and "
                    f"{self._max_bytes // 2} are the most at once; try again in 1 s.",
                    retry_after_s=1,
                )
            if total and total + size > self._max_bytes:
                raise Overloaded(
                    "This worker holds as large bodies as it may; try again in 1 s.",
                    retry_after_s=1,
                )
            self._held[caller] += size
        return size

    def release(self, caller: str, size: int) -> None:
        """Count ``size`` bytes less of those that were taken for a caller."""
        if not size:
            return
        with self._lock:
            self._held[caller] -= size
            if self._held[caller] <= 0:
                del self._held[caller]
