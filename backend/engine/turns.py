"""Fair turns of the models of a process on the cores of its CPU.

Each model has a thread of its own, and OpenMP gives each thread that computes a team of threads.
Where the teams together have more threads than there are cores, libgomp no longer spins at its
barriers, even if all teams but one sleep: the one that computes then takes 1.5 to 3 times as long.
So one model computes at a time, and a thread that has computed ends its team before another's turn,
and once it is idle. To start a team again takes some 0.2 ms.

A thread holds the turn while it runs its model, and offers it where it can be interrupted: after
each token, denoising step, chunk and batch. So a turn lasts ``SLICE_S`` and the rest of a step,
and where a step takes longer than ``OVERDUE_S``, or never ends, others compute beside it from then
on. The process has one turn, as it has one set of cores. Models on a GPU need none.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backend.engine import libraries

# Shorter turns are not handed over: to end a team and to start it costs up to 0.7 ms.
SLICE_S = 0.03
# An idle thread keeps its team for so long, as its next call may come at once, unless other models
# have computed within the last second.
LINGER_S = 0.1
CROWDED_S = 1.0
# So long a turn may last where others wait: a step of any model that suits a CPU is shorter, and no
# one hangs for another.
OVERDUE_S = 2.0
CHECK_S = 0.5  # between looks whether a turn is overdue
SOFT_PAUSE = 1  # omp_pause_soft of OpenMP 5


MAX_CALLERS = 4096  # whose last turns are known; the one that is longest ago is forgotten

# Whose inputs a thread has; asked for as a turn is handed over.
Callers = Callable[[], Iterable[str]]


class _Waiter:
    __slots__ = ("called", "callers", "joined", "thread")

    def __init__(self, thread: threading.Thread, callers: Callers, joined: int) -> None:
        self.thread = thread
        self.callers = callers
        self.joined = joined  # how many turns there had been
        self.called = threading.Event()


class Turns:
    """One turn, handed from thread to thread: caller after caller, and else in order.

    So one caller's work on many models leaves others a turn after each of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # so that one thread at most has the turn
        self._line: deque[_Waiter] = deque()
        self._holder: threading.Thread | None = None
        self._last: threading.Thread | None = None  # that had it, whether or not it still does
        self._since = 0.0
        self._handed_over_at = float("-inf")
        self._overdue: set[threading.Thread] = set()  # that compute though their turn was taken
        self._callers: dict[threading.Thread, Callers] = {}
        self._count = 0  # of turns so far
        self._had: dict[str, int] = {}  # which was a caller's last one

    @contextmanager
    def hold(self, device: str = "cpu", callers: Callers = tuple) -> Iterator[None]:
        """Compute in here: wait for the turn, and hand it over in the end. Holds may be nested.

        ``callers`` says whose inputs wait for it. On a ``device`` that is no CPU it does nothing.
        """
        me = threading.current_thread()
        if device != "cpu" or self._holder is me or me in self._overdue:
            yield
            return
        self._callers[me] = callers
        self._wait(self._join(me))
        try:
            yield
        finally:
            del self._callers[me]
            if self._line or time.monotonic() - self._handed_over_at < CROWDED_S:
                end_team()
            with self._lock:
                self._overdue.discard(me)
                if self._holder is me:
                    self._hand_over()

    def offer(self) -> None:
        """Let those compute who wait, if this thread's turn was long enough; then come back.

        Does nothing in a thread that does not hold the turn, and next to nothing where none waits.
        """
        if not (self._line or self._overdue):
            return
        me = threading.current_thread()
        if self._holder is me:
            if not self._line or time.monotonic() - self._since < SLICE_S:
                return
        elif me not in self._overdue:
            return
        end_team()
        waiter = self._join(me)
        with self._lock:
            self._overdue.discard(me)
            if self._holder is me:
                self._hand_over()
        self._wait(waiter)

    def is_waiting(self, thread: threading.Thread) -> bool:
        """Whether a thread is kept waiting by others: it is not to blame for what takes long."""
        with self._lock:
            return any(waiter.thread is thread for waiter in self._line)

    def _join(self, thread: threading.Thread) -> _Waiter:
        with self._lock:
            waiter = _Waiter(thread, self._callers[thread], self._count)
            self._line.append(waiter)
            if self._holder is None:
                self._hand_over()
        return waiter

    def _wait(self, waiter: _Waiter) -> None:
        """Wait to be called: until then, or until the turn of who has it is overdue."""
        while not waiter.called.wait(CHECK_S):
            with self._lock:
                late = time.monotonic() - self._since >= OVERDUE_S
                if waiter.called.is_set():
                    return
                if late and self._holder is not None:
                    self._overdue.add(self._holder)
                    self._hand_over()

    def _hand_over(self) -> None:
        """Give the turn to who is next; the caller holds the lock."""
        self._holder = None
        if not self._line:
            return
        waiter = min(self._line, key=self._last_turn)
        self._line.remove(waiter)
        self._count += 1
        for caller in waiter.callers():
            self._had.pop(caller, None)
            self._had[caller] = self._count
            if len(self._had) > MAX_CALLERS:
                del self._had[next(iter(self._had))]
        self._holder, self._since = waiter.thread, time.monotonic()
        if self._last is not self._holder:
            if self._last is not None:
                self._handed_over_at = self._since
            self._last = self._holder
        waiter.called.set()

    def _last_turn(self, waiter: _Waiter) -> int:
        """The last turn of those callers of a waiter who have not had one for longest.

        Who never had one comes before those who have had the present one, and no sooner: many new
        callers must not keep the others waiting.
        """
        fresh = waiter.joined - 1
        return min((self._had.get(caller, fresh) for caller in waiter.callers()), default=fresh)


def end_team() -> None:
    """End this thread's OpenMP threads; its next parallel region starts them again.

    Does nothing where no OpenMP runtime is loaded, or one older than OpenMP 5.
    """
    for pause in _pauses():
        pause(SOFT_PAUSE)


_found: list[Callable[[int], int]] | None = None


def _pauses() -> list[Callable[[int], int]]:
    """``omp_pause_resource_all`` of each OpenMP runtime that this process has loaded."""
    global _found
    if _found is None:
        # PyTorch brings the runtime; without it nothing has computed yet.
        torch = libraries.imported("torch")
        if torch is None:
            return []
        _found = []
        for path in _runtimes(Path(torch.__file__).parent / "lib"):
            with suppress(OSError, AttributeError):
                library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
                _found.append(library.omp_pause_resource_all)
    return _found


def _runtimes(folder: Path) -> set[str]:
    maps = Path("/proc/self/maps")
    paths = maps.read_text().splitlines() if maps.exists() else map(str, folder.glob("*"))
    found = (re.search(r"/\S*/lib(?:gomp|omp|iomp5)\b[^/]*$", path) for path in paths)
    return {match.group() for match in found if match}


_turns = Turns()
hold = _turns.hold
offer = _turns.offer
is_waiting = _turns.is_waiting
