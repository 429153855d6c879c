"""A thread that owns one model: it loads it, runs its batches, and unloads it."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from backend import metrics
from backend.adapters.base import Adapter, Batch, Prediction, too_late
from backend.engine.calls import Item, Job, ModelStatus, State
from backend.errors import CraneError, InternalError, ModelUnavailable, Overloaded

logger = logging.getLogger("crane.engine")

# A run of MiniLM costs 5 ms before its first token, and 20 to 60 µs for each: as much as 80 to 250
# tokens on a CPU. A GPU takes more tokens in that time, a larger model fewer.
RUN_COSTS_TOKENS = 128


# transformers' from_pretrained changes functions of the process while it works and puts back what
# it found: two at once may leave them changed for good, and then nothing loads any more.
_LOADING = threading.Lock()


class Worker:
    """Runs one model's calls in batches, from the thread that loaded it.

    Several entries may share its weights: the first one's adapter loads them, and each other's
    takes them over before its first batch.

    It never waits for a batch to fill: when the model is free, all queued work with equal options
    goes together, up to ``max_batch_size`` inputs. A worker whose load failed refuses its callers
    until ``retry_at``; the next try is a new worker's.
    """

    def __init__(
        self, adapter: Adapter, *, queue_size: int, threads: tuple[int, int], retry_after_s: float
    ) -> None:
        self.model_id = adapter.spec.id
        self.adapters = {self.model_id: adapter}
        self.state = State.LOADING
        self.retry_at = 0.0
        self._retry_after_s = retry_after_s
        self._adapter = adapter
        self._loaded: set[str] = set()
        self._queue_size = queue_size
        self._threads = threads
        self._queue: deque[Item] = deque()
        self._running: list[Item] = []
        self._progress: dict[str, int] = {}
        # One lock, so that nothing is queued after the last drain.
        self._changed = threading.Condition()
        self._closing = False
        self._ready_at = float("inf")
        self._load_s: float | None = None
        self._over: str | None = None
        self._seconds_per_item = 0.0
        self._thread = threading.Thread(
            target=self._run, name=f"model {self.model_id}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue every input of a job, or refuse it whole: ``Overloaded``, ``ModelUnavailable``."""
        adapter = self.adapters[job.call.model_id]
        for item in job.items:
            item.size = adapter.size(item.input, job.call.options)
        with self._changed:
            if self._over is not None:
                raise self._refusal()
            if self._closing:
                raise ModelUnavailable("The service is shutting down.", retry_after_s=5)
            if len(self._queue) + len(job.items) > self._queue_size:
                self._drop_cancelled()
            if len(self._queue) + len(job.items) > self._queue_size:
                wait_s = max(1.0, len(self._queue) * self._seconds_per_item)
                raise Overloaded(
                    f"{self.model_id} has {len(self._queue)} inputs queued, and "
                    f"{self._queue_size} is the most; try again in {wait_s:.0f} s.",
                    retry_after_s=wait_s,
                )
            self._queue.extend(job.items)
            self._changed.notify()

    def close(self) -> None:
        """Take no more work; what is queued is still answered, then the model is unloaded."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; false if it has not ended by then."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def status(self, model_id: str) -> ModelStatus:
        loaded = self.state is State.READY
        running = list(self._running)
        mine = running and running[0].job.call.model_id == model_id
        return ModelStatus(
            state=self.state,
            queue=sum(item.job.call.model_id == model_id for item in list(self._queue)),
            running={"inputs": len(running), **self._progress} if mine else None,
            device=self._adapter.device if loaded else None,
            dtype=self._adapter.dtype if loaded else None,
            load_s=self._load_s,
            error=self._over,
        )

    def _run(self) -> None:
        if not self._load():
            return
        try:
            while batch := self._next_batch():
                self._answer(batch)
            for model_id in self._loaded:
                self.adapters[model_id].unload()
        except BaseException:
            # Not an error of a batch, which _answer keeps: this thread cannot go on.
            logger.exception("%s stopped working", self.model_id)
            self._stop(State.DEFUNCT, "The model stopped working and is being replaced.")
        else:
            self._stop(State.UNLOADED, "The model was unloaded.")

    def _load(self) -> bool:
        started = time.monotonic()
        try:
            self._adapter.check_entry()
            with _LOADING if self._adapter.loads_alone else nullcontext():
                self._adapter.load()
        except BaseException as error:
            logger.exception("%s did not load", self.model_id)
            self.retry_at = time.monotonic() + self._retry_after_s
            why = (
                error.message if isinstance(error, ModelUnavailable) else "The log has the reason."
            )
            self._stop(State.FAILED, f"{self.model_id} did not load. {why}")
            return False
        self._ready_at = time.monotonic()
        self._load_s = round(self._ready_at - started, 3)
        self._loaded.add(self.model_id)
        self.state = State.READY
        fields = {"device": self._adapter.device, "dtype": self._adapter.dtype}
        logger.info(
            "%s loaded", self.model_id, extra={"fields": {**fields, "load_s": self._load_s}}
        )
        return True

    def _stop(self, state: State, why: str) -> None:
        """Be over with: everyone who waits and everyone who comes is refused alike."""
        with self._changed:
            self.state, self._over = state, why
            left = [*self._running, *self._queue]
            self._queue.clear()
        for item in left:
            item.job.fail(self._refusal())

    def _refusal(self) -> ModelUnavailable:
        left_s = max(1.0, self.retry_at - time.monotonic())
        return ModelUnavailable(
            f"{self._over} Try again in {math.ceil(left_s)} s.", retry_after_s=left_s
        )

    def _drop_cancelled(self) -> None:
        """Take out of the queue what nobody waits for; the caller holds the lock."""
        if not any(item.job.cancelled for item in self._queue):
            return
        self._queue = deque(_waited_for(self._queue))

    def _next_batch(self) -> list[Item]:
        """Wait for work and take all that may run together; empty once closed and done."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._queue:
                    break
                if self._closing:
                    return []
                self._changed.wait()
            key = self._queue[0].job.key
            batch: list[Item] = []
            others: deque[Item] = deque()
            spec = self.adapters[self._queue[0].job.call.model_id].spec
            while self._queue and len(batch) < spec.max_batch_size:
                item = self._queue.popleft()
                (batch if item.job.key == key else others).append(item)
            # What was passed over keeps its place at the head.
            self._queue.extendleft(reversed(others))
            self._running, self._progress = batch, {}
        return batch

    def _answer(self, batch: list[Item]) -> None:
        adapter = self.adapters[batch[0].job.call.model_id]
        for group in _of_like_size(batch, adapter.max_batch_tokens):
            if not (items := _waited_for(group)):
                continue
            started = time.monotonic()
            self._use_threads(len(items))
            results = self._predict(adapter, items)
            seconds = time.monotonic() - started
            self._seconds_per_item += 0.2 * (seconds / len(items) - self._seconds_per_item)
            about: dict[str, Any] = {
                "revision": adapter.revision,
                "device": adapter.device,
                "dtype": adapter.dtype,
            }
            for item, result in zip(items, results, strict=True):
                queued_at = item.job.queued_at
                load = max(0.0, self._ready_at - queued_at)
                item.batch_size = len(items)
                item.timings_ms = {
                    "queue": max(0.0, started - queued_at - load) * 1e3,
                    "load": load * 1e3,
                    "inference": seconds * 1e3,
                }
                # What was broken off because nobody waited must not pass for an answer.
                if item.job.cancelled:
                    metrics.CANCELLED.labels(item.job.call.model_id, "running").inc()
                    result = too_late()
                item.answer(result, about)
        self._running = []

    def _use_threads(self, items: int) -> None:
        """Run on all cores, but leave one to each HTTP worker where that is quicker.

        It is for a batch of several in half precision: its operations are so short that threads
        which the HTTP workers interrupt lose more by waiting for each other than they save. On two
        cores with 32 callers, one thread gives 559 texts/s in bfloat16 and two give 456; in
        float32 it is 274 and 332.
        """
        torch = sys.modules.get("torch")
        if torch is None or self._adapter.device != "cpu":
            return
        all_cores, fewer = self._threads
        whole = items == 1 or self._adapter.dtype == "float32" or not self._adapter.spares_cores
        wanted = all_cores if whole else fewer
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def _predict(self, adapter: Adapter, items: list[Item]) -> list[Prediction | CraneError]:
        """Run a batch; if it fails, run its items one by one, so that each fails for itself."""

        def progress(done: int, of: int) -> None:
            self._progress = {"step": done, "steps": of}

        batch = Batch(
            inputs=[item.input for item in items],
            options=dict(items[0].job.call.options),
            seeds=[item.seed for item in items],
            cancelled=lambda index: items[index].job.cancelled,
            progress=progress,
        )
        if batch.abandoned():  # while the batch failed of which this is one
            return [too_late()] * len(items)
        try:
            if adapter.spec.id not in self._loaded:
                adapter.load_beside(self._adapter)
                self._loaded.add(adapter.spec.id)
            results = adapter.predict(batch)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} inputs gave {len(results)} outputs")
        except Exception as error:
            if batch.abandoned():  # which an adapter may say by breaking off
                return [too_late()] * len(items)
            request_ids = [item.job.call.request_id for item in items]
            logger.exception(
                "%s failed a batch of %d",
                adapter.spec.id,
                len(items),
                extra={"fields": {"request_ids": request_ids}},
            )
            if len(items) == 1:
                return [error if isinstance(error, CraneError) else InternalError()]
            return [result for item in items for result in self._predict(adapter, [item])]
        return results


def _waited_for(items: Iterable[Item]) -> list[Item]:
    """Those that somebody waits for; the others are over before they began."""
    kept = []
    for item in items:
        if item.job.cancelled:
            metrics.CANCELLED.labels(item.job.call.model_id, "queued").inc()
            item.job.fail(too_late())
        else:
            kept.append(item)
    return kept


def _of_like_size(batch: list[Item], max_tokens: int) -> list[list[Item]]:
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
