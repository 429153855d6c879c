"""Makes files of outputs, inside the engine: raw frames and samples stay in its memory.

A film's frames are a hundred times its file, and all that an engine sends goes through one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import numpy as np

from backend.engine.calls import Answer, Call, Event
from backend.engine.jobs import Job
from backend.errors import CraneError
from backend.tasks import TASKS

THREADS = 4
# Outputs, and their bytes as arrays; beyond them the model's own thread encodes, and so waits.
MAX_WAITING, MAX_WAITING_BYTES = 8, 2**28


class Encoder:
    """Threads that make of each output what its task says: ``Task.dump``.

    A model's thread hands each output over as it is made, and goes on.
    """

    def __init__(self, max_output: int) -> None:
        """``max_output`` bounds the outputs of a call, in bytes as ``weight`` has them."""
        self._max_output = max_output
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="encoder")
        self._waiting: dict[Future[None], int] = {}  # and its bytes

    def job(
        self, call: Call, type_: str, tell: Callable[[Event | Answer | CraneError], None]
    ) -> Job:
        """A job for ``call`` whose outputs are encoded before its answer is told."""
        dump = TASKS[type_].dump
        return Job(call, tell, dump=dump, beside=self._run, max_output=self._max_output)

    def _run(self, work: Callable[[], None], output: Any) -> None:
        """Have a thread of ours do it; or this one, where too much is waiting, or at the end."""
        size, waiting = _array_bytes(output), list(self._waiting.values())
        if len(waiting) < MAX_WAITING and sum(waiting) + size <= MAX_WAITING_BYTES:
            with suppress(RuntimeError):  # after ``close``
                future = self._pool.submit(work)
                self._waiting[future] = size
                future.add_done_callback(self._waiting.pop)
                return
        work()

    def close(self, timeout_s: float) -> None:
        """Finish what is waiting, within a time; what comes after is for who hands it over."""
        wait(set(self._waiting), timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _array_bytes(value: Any) -> int:
    """The bytes of all arrays in a value."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_array_bytes, value)) if isinstance(value, list) else 0
