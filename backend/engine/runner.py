"""Runs of batches on a loaded model: like sizes together, by halves where it is too much."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from backend import metrics
from backend.adapters.base import Adapter, Batch, Prediction, too_late
from backend.engine import libraries, turns
from backend.engine.faults import DeviceBroken, is_broken_device, is_out_of_memory
from backend.engine.feed import Feed
from backend.engine.jobs import Item
from backend.errors import CraneError, InternalError, OutOfMemory

logger = logging.getLogger("crane.engine")

# A run of MiniLM costs 5 ms before its first token, and 20 to 60 µs for each: as much as 80 to 250
# tokens on a CPU. A GPU takes more tokens in that time, a larger model fewer.
RUN_COSTS_TOKENS = 128


class Runner:
    """Runs batches of one model, and of other entries with its weights, in the model's thread."""

    def __init__(
        self,
        adapters: dict[str, Adapter],
        *,
        threads: tuple[int, int],
        make_room: Callable[[], None],
        out_of_memory: Callable[[], OutOfMemory],
    ) -> None:
        """The first of ``adapters`` loads the weights, and the others take them over from it.

        ``threads`` are ``Config.engine_threads``; ``make_room`` has unused models leave the device,
        and ``out_of_memory`` is what is said where that was not enough.
        """
        self._threads = threads
        self._make_room = make_room
        self._out_of_memory = out_of_memory
        self.seconds_per_item = 0.0
        self.renew(adapters)

    def renew(self, adapters: dict[str, Adapter]) -> None:
        """Take adapters that have loaded nothing."""
        self.adapters = adapters
        self.first = next(iter(adapters.values()))
        self.progress: dict[str, int] = {}  # of the present batch, in steps
        self.most_at_once = sys.maxsize  # inputs that were not too much for the device
        self._loaded: set[str] = set()
        self._ready_at = float("inf")

    def loaded_at(self, when: float) -> None:
        """The first adapter has loaded."""
        self._loaded.add(self.first.spec.id)
        self._ready_at = when

    def loaded(self) -> list[Adapter]:
        """The adapters that have the weights."""
        return [self.adapters[model_id] for model_id in self._loaded]

    def run(
        self, adapter: Adapter, items: list[Item], about: Mapping[str, Any]
    ) -> list[tuple[Item, Prediction | CraneError]]:
        """Run a group of like size; the answers, each with its item, which has its times.

        ``about`` says what is true of all answers of the model.
        """
        if not items:
            return []
        started = time.monotonic()
        for item in items:
            self.begin(item, started, about)
        self.use_threads(len(items))
        results = self._predict(adapter, items)
        seconds = time.monotonic() - started
        self.timed(seconds / len(items))
        for place, item in enumerate(items):
            item.batch_size = len(items)
            item.timings_ms["inference"] = seconds * 1e3
            # What was broken off because nobody waited must not pass for an answer.
            if item.job.cancelled:
                metrics.CANCELLED.labels(item.job.call.model_id, "running").inc()
                results[place] = too_late()
        return list(zip(items, results, strict=True))

    def begin(self, item: Item, now: float, about: Mapping[str, Any]) -> None:
        """Note, and tell, that an item begins to run: it waited for others, and for the load."""
        queued_at = item.job.queued_at
        load = max(0.0, self._ready_at - queued_at)
        queue = max(0.0, now - queued_at - load)
        item.timings_ms = {"queue": queue * 1e3, "load": load * 1e3}
        item.job.begin(about, dict(item.timings_ms))

    def timed(self, seconds: float) -> None:
        """Learn how long an item takes of the model's time."""
        self.seconds_per_item += 0.2 * (seconds - self.seconds_per_item)

    def roll(self, adapter: Adapter, feed: Feed) -> list[Item]:
        """Run what is fed until nothing is left; the items of a run that failed, to run again.

        After too little memory fewer of them run at once, and else each by itself.
        """
        try:
            adapter.roll(feed, min(adapter.spec.max_batch_size, self.most_at_once))
        except Exception as error:
            if is_broken_device(error):
                raise DeviceBroken from error
            left = feed.left
            full = is_out_of_memory(error)
            if full:
                logger.warning("%s ran out of memory with %d at once", adapter.spec.id, len(left))
            else:
                self._log_failure(adapter, left)
            alone = len(left) == 1 and (left[0].alone or not full)
            refusal = error if isinstance(error, CraneError) else InternalError()
        else:
            return []
        # The error is gone by now, and what its frames held.
        if alone:
            feed.answer(left[0], self._out_of_memory() if full else refusal)
            return []
        if full:
            self._make_room()
            self.most_at_once = max(1, min(self.most_at_once, len(left) // 2))
        for item in left:
            item.alone = not full or len(left) == 1
        return left

    def _log_failure(self, adapter: Adapter, items: list[Item]) -> None:
        logger.exception(
            "%s failed a batch of %d",
            adapter.spec.id,
            len(items),
            extra={"fields": {"request_ids": [item.job.call.request_id for item in items]}},
        )

    def use_threads(self, items: int) -> None:
        """Run on all cores, but leave one to each HTTP worker where that is quicker.

        It is for a batch of several in half precision: its operations are so short that threads
        which the HTTP workers interrupt lose more by waiting for each other than they save. On two
        cores with 32 callers, one thread gives 559 texts/s in bfloat16 and two give 456; in
        float32 it is 274 and 332.
        """
        torch = libraries.imported("torch")
        if torch is None or self.first.device != "cpu":
            return
        all_cores, fewer = self._threads
        whole = items == 1 or self.first.dtype == "float32" or not self.first.spares_cores
        wanted = all_cores if whole else fewer
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def _predict(
        self, adapter: Adapter, items: list[Item], last: bool = False
    ) -> list[Prediction | CraneError]:
        """Run a batch; if it fails, run its items one by one, so that each fails for itself.

        ``last`` says that it was tried before, and ran out of memory.
        """

        def progress(done: int, of: int, previews: Mapping[int, Any] | None = None) -> None:
            self.progress = {"step": done, "steps": of}
            for place, item in enumerate(items):
                seen = {"preview": previews[place]} if previews and place in previews else {}
                item.tell("progress", {**self.progress, **seen})

        def cancelled(index: int) -> bool:
            turns.offer()  # an adapter asks between steps
            return items[index].cancelled()

        for item in items:
            item.begin_again()
        batch = Batch(
            inputs=[item.input for item in items],
            options=dict(items[0].options),
            seeds=[item.seed for item in items],
            cancelled=cancelled,
            progress=progress,
            listens=lambda index: items[index].listens,
            tell=lambda index, kind, data: items[index].tell(kind, data),
        )
        if batch.abandoned():  # while the batch failed of which this is one
            return [too_late()] * len(items)
        try:
            if adapter.spec.id not in self._loaded:
                adapter.load_beside(self.first)
                self._loaded.add(adapter.spec.id)
            results = adapter.predict(batch)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} inputs gave {len(results)} outputs")
        except Exception as error:
            if batch.abandoned():  # which an adapter may say by breaking off
                return [too_late()] * len(items)
            if is_broken_device(error):
                raise DeviceBroken from error
            if not is_out_of_memory(error):
                self._log_failure(adapter, items)
                if len(items) == 1:
                    return [error if isinstance(error, CraneError) else InternalError()]
                return [result for item in items for result in self._predict(adapter, [item])]
        else:
            return results
        # The error is gone by now, and what its frames held.
        return self._predict_less(adapter, items, last)

    def _predict_less(
        self, adapter: Adapter, items: list[Item], last: bool
    ) -> list[Prediction | CraneError]:
        """Run a batch that was too much for the device: when unused models have left, by halves."""
        logger.warning("%s ran out of memory with a batch of %d", adapter.spec.id, len(items))
        if last:
            return [self._out_of_memory()]
        self._make_room()
        half = len(items) // 2
        if not half:
            return self._predict(adapter, items, last=True)
        self.most_at_once = min(self.most_at_once, len(items) - half)
        return [
            result
            for part in (items[:half], items[half:])
            for result in self._predict(adapter, part)
        ]


def waited_for(items: Iterable[Item]) -> list[Item]:
    """Those that somebody waits for; the others are over before they began."""
    kept = []
    for item in items:
        if item.job.cancelled:
            metrics.CANCELLED.labels(item.job.call.model_id, "queued").inc()
            item.job.fail(too_late())
        else:
            kept.append(item)
    return kept


def group_of(batch: list[Item], max_tokens: int) -> list[Item]:
    """Those of a batch that run at once with its first: of like size, as ``of_like_size`` has it.

    The others run later, and whoever comes meanwhile has a turn before them.
    """
    return next(group for group in of_like_size(batch, max_tokens) if batch[0] in group)


def of_like_size(batch: list[Item], max_tokens: int) -> list[list[Item]]:
    """Split a batch by length where padding it whole would cost more than another run.

    No group passes ``max_tokens`` when padded.
    """
    groups: list[list[Item]] = []
    tokens = 0
    for item in sorted(batch, key=lambda item: item.size):
        padded = (len(groups[-1]) + 1) * item.size if groups else 0
        if not groups or padded > max_tokens or padded - tokens - item.size > RUN_COSTS_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(item)
        tokens += item.size
    return groups
