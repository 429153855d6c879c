"""Looks from outside at what each model's thread does, and gives up what does not come back."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from backend.engine import turns
from backend.engine.jobs import Item

logger = logging.getLogger("crane.engine")

LOOK_S = 1.0  # between two looks; and less where the grace is short


class Watch:
    """What one model's thread is at: its load or unload, which have a limit, or a run.

    A run has no limit of its own, as its callers have theirs: it is overdue where all of them have
    been gone for the grace time, and the thread has neither answered nor taken any since, nor asked
    whether they wait: one that asks ends soon, be its steps ever so slow on a busy machine.
    """

    def __init__(
        self, model_id: str, grace_s: float, running: Callable[[], Sequence[Item]]
    ) -> None:
        """``running`` gives the items that are running: the same list, as long as none changes."""
        self._model_id = model_id
        self._grace_s = grace_s
        self._running = running
        self._task: tuple[str, float, float] | None = None  # what, its limit, when it ends
        self._gone: tuple[Sequence[Item], float] | None = None  # and since when

    @contextmanager
    def limit(self, task: str, limit_s: float) -> Iterator[None]:
        """Let the thread do what is in here in so many seconds at most."""
        self._task = task, limit_s, time.monotonic() + limit_s
        try:
            yield
        finally:
            self._task = None

    def overdue(self, thread: threading.Thread) -> str | None:
        """What the model's thread should have done by now, as an error says it."""
        now = time.monotonic()
        if turns.is_waiting(thread):  # for other models, so it is not to blame
            self._gone = None
            return None
        if (task := self._task) is not None and now > task[2]:
            return f"{self._model_id} did not {task[0]} in {task[1]:g} s."
        running = self._running()
        if not running or not all(item.job.cancelled for item in running):
            self._gone = None
        elif self._gone is None or self._gone[0] is not running:
            self._gone = running, now
        elif now - max(self._gone[1], *(item.asked_at for item in running)) > self._grace_s:
            return (
                f"{self._model_id} went on for {self._grace_s:g} s after the last of its callers "
                "was gone."
            )
        return None


class Watched(Protocol):
    """A model's worker."""

    def check(self) -> None:
        """Give the model up if its thread is overdue."""


class Watchdog:
    """One thread that looks at all models of an engine."""

    def __init__(self, models: Callable[[], Iterable[Watched]], grace_s: float) -> None:
        self._models = models
        self._every_s = min(LOOK_S, grace_s / 4)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Look from now on; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            for model in self._models():
                try:
                    model.check()
                except Exception:  # of one model: the others are looked at still
                    logger.exception("a model could not be looked at")


def stack_of(thread: threading.Thread) -> str:
    """Where a thread is just now, for the log."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
