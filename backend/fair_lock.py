"""A lock that callers have in turn, whoever of them has most threads that wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock


class FairLock:
    """Let one thread at a time do what keeps all of Python's threads from running.

    Many at once would take turns every few milliseconds, and what is short would wait for all.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._held = False
        self._waiting: dict[str, deque[Event]] = {}  # by caller; the first one is next

    @contextmanager
    def hold(self, caller: str) -> Iterator[None]:
        """Wait for it, and hold it: only to compute, as who waits has no deadline."""
        with self._lock:
            turn = None
            if self._held:
                turn = Event()
                self._waiting.setdefault(caller, deque()).append(turn)
            self._held = True
        if turn is not None:
            turn.wait()
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._held = bool(self._waiting)
            if self._held:
                caller = next(iter(self._waiting))
                turns = self._waiting.pop(caller)
                turns.popleft().set()
                if turns:
                    self._waiting[caller] = turns  # behind all others
