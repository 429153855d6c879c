"""Makes files of outputs, inside the engine: raw frames and samples stay in its memory.

A film's frames are a hundred times its file, and all that an engine sends goes through one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace

from backend.adapters.base import too_late
from backend.engine.calls import Answer, Call, Event, Job
from backend.errors import CraneError, InternalError
from backend.tasks import TASKS

logger = logging.getLogger("crane.engine")

THREADS = 4
MAX_WAITING = 8  # answers, as arrays; beyond them the model's own thread encodes, and so waits

Tell = Callable[[Event | Answer | CraneError], None]


class Encoder:
    """Threads that make of each output what its task says: ``Task.dump``.

    A model's thread hands its answer over and goes on with the next batch.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="encoder")
        self._waiting: set[Future[None]] = set()

    def job(self, call: Call, type_: str, tell: Tell) -> Job:
        """A job for ``call`` whose answer is encoded before it is told."""
        task = TASKS[type_]
        if task.dump is None:
            return Job(call, tell)

        def encoded(answer: Answer) -> Answer | CraneError:
            def check() -> None:
                if job.cancelled:
                    raise too_late()

            assert task.dump is not None
            try:
                outputs = [task.dump(one, call.options, check) for one in answer.outputs]
            except CraneError as error:
                return error
            except Exception:
                logger.exception("%s made an output that cannot be encoded", call.model_id)
                return InternalError()
            return replace(answer, outputs=outputs)

        def tell_encoded(told: Event | Answer | CraneError) -> None:
            if not isinstance(told, Answer):
                tell(told)
            elif not self._hand_over(lambda: tell(encoded(told))):
                tell(encoded(told))

        job = Job(call, tell_encoded)
        return job

    def _hand_over(self, encode: Callable[[], None]) -> bool:
        """Have a thread of ours do it; false where too much is waiting, or ``close`` was called."""
        if len(self._waiting) >= MAX_WAITING:
            return False
        with suppress(RuntimeError):
            future = self._pool.submit(encode)
            self._waiting.add(future)
            future.add_done_callback(self._waiting.discard)
            return True
        return False

    def close(self, timeout_s: float) -> None:
        """Finish what is waiting, within a time; what comes after is for who hands it over."""
        wait(set(self._waiting), timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)
