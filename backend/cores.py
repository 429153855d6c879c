"""Which processor cores a process runs on.

Python runs one thread of a process at a time. Where its threads are on several cores, each handover
is one between cores: on two, an HTTP worker with 32 clients answers 750 empty calls a second, and
1,300 where it stays on one. So a worker stays on one core, and leaves it for what needs no Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_all: set[int] | None = None


def allowed() -> set[int]:
    """The cores that this process may use; none where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def stay_on(core: int) -> None:
    """Keep this thread, and those that it starts, on one core."""
    global _all
    _all = allowed()
    os.sched_setaffinity(0, {core})


def take_turns() -> None:
    """Have this process's threads, and its children's, not interrupt each other when they wake.

    A call wakes a thread of the engine and then one of an HTTP worker. Where each at once pushes
    aside what its core is at, 32 clients get an eighth fewer answers, and one client a tenth.
    See SCHED_BATCH in sched(7).
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # some containers forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextmanager
def all_cores() -> Iterator[None]:
    """Let this thread, and those that it starts, use all cores: to decode a film, for example."""
    if _all is None:
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _all)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
