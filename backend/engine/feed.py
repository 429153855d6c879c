"""A model's queue as a run sees it that goes on: inputs as they come, an answer for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from backend import metrics
from backend.adapters.base import Prediction
from backend.engine.jobs import Item
from backend.errors import CraneError


class Feed:
    """Gives a run its inputs, and hands on its answers at once, whatever else is running."""

    def __init__(
        self,
        first: list[Item],
        *,
        join: Callable[[int], list[Item]],
        begin: Callable[[Item, int], None],
        answer: Callable[[Item, Prediction | CraneError, float], None],
        park: Callable[[Item, Future[Any]], None],
    ) -> None:
        """``join`` takes up to so many out of the queue that may run beside the others.

        ``begin`` is told of each item and how many run with it; ``answer`` also of the seconds
        since the last answer, or since the run was idle. ``park`` queues an item again, later.
        """
        self.left: list[Item] = []  # taken, and not answered
        self._first = first
        self._join = join
        self._begin = begin
        self._answer = answer
        self._park = park
        self._last_at = 0.0

    def take(self, most: int) -> list[Item]:
        items, self._first = self._first[:most], self._first[most:]
        if len(items) < most:
            items += self._join(most - len(items))
        if not items:
            return items
        now = time.monotonic()
        if not self.left:
            self._last_at = now
        self.left += items
        for item in items:
            self._begin(item, len(self.left))
        for item in self.left:
            item.batch_size = max(item.batch_size, len(self.left))
        return items

    def answer(self, item: Item, result: Prediction | CraneError) -> None:
        now = time.monotonic()
        self.left.remove(item)
        if item.job.cancelled:
            metrics.CANCELLED.labels(item.job.call.model_id, "running").inc()
        self._answer(item, result, now - self._last_at)
        self._last_at = now

    def park(self, item: Item, ready: Future[Any]) -> None:
        self.left.remove(item)
        self._park(item, ready)
