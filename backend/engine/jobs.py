"""A call inside the engine: its items, each an input in a worker's queue, and its one answer."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import orjson

from backend.adapters.base import Prediction, too_late
from backend.adapters.numbers import has_nan, not_numbers
from backend.engine.calls import Answer, Call, Event, total
from backend.errors import CraneError, InternalError, InvalidRequest, PayloadTooLarge
from backend.messages import weight

logger = logging.getLogger("crane.engine")

# Makes of an output what its caller gets: of the output, the options, and what raises once nobody
# waits any more.
Dump = Callable[[Any, Mapping[str, Any], Callable[[], None]], Any]


class Job:
    """A call inside the engine, until its last input is answered.

    Its items may be answered in any thread, and so may ``cancel`` and ``fail`` be called.
    """

    def __init__(
        self,
        call: Call,
        tell: Callable[[Event | Answer | CraneError], None],
        *,
        dump: Dump | None = None,
        beside: Callable[[Callable[[], None], Any], None] = lambda work, output: work(),
        max_output: float = math.inf,
    ) -> None:
        """``tell`` gets the call's answer or error, once and last, and before it its events.

        ``dump`` is ``Task.dump``, which ``beside`` may run in another thread, of which output it is
        told. ``max_output`` bounds all outputs, with what is told about them, in bytes as
        ``weight`` has them.
        """
        self.call = call
        self._tell = tell
        self._dump = dump
        self._beside = beside
        self._max_output = max_output
        self._output_bytes = 0
        self._begun = False
        self.queued_at = time.monotonic()
        self.deadline = self.queued_at + call.timeout_s
        # Items with equal keys may share a batch.
        self.key = call.model_id, orjson.dumps(call.options, option=orjson.OPT_SORT_KEYS)
        self.items = [Item(self, index) for index in range(len(call.inputs) * call.repeat)]
        self._cancelled = False
        self._open = len(self.items)
        self.ended = False  # whether its answer or error was told, or is just being told
        self._lock = threading.Lock()  # so that a job ends once, and each item counts

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more: the caller said so, or the deadline has passed."""
        return self._cancelled or time.monotonic() > self.deadline

    def cancel(self) -> None:
        self._cancelled = True

    def fail(self, error: CraneError) -> None:
        """Answer the whole call with an error, unless it is answered already."""
        self._cancelled = True
        self._end(error)

    def begin(self, about: Mapping[str, Any], timings_ms: Mapping[str, float]) -> None:
        """Tell a call that streams that the first of its inputs begins to run."""
        begun, self._begun = self._begun, True
        if self.call.stream and not begun:
            self.tell("start", {**about, "timings_ms": timings_ms})

    def tell(self, kind: str, data: dict[str, Any]) -> None:
        if not self._cancelled:
            self._tell(Event(kind, data))

    def _end(self, answer: Answer | CraneError) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended = True
        if isinstance(answer, CraneError) and self._begun:
            answer = copy(answer)  # which may be that of other calls, too
            answer.usage = self.usage
        self._tell(answer)

    @property
    def usage(self) -> dict[str, float] | None:
        """That of the inputs that were run by now; None where none has begun to run."""
        if not self._begun:
            return None
        return total([item.prediction.usage for item in self.items if item.prediction])

    def answer(self, work: Callable[[], None], result: Any) -> None:
        """Have an item answered: here, or where its output is to be made into files."""
        if self._dump is None or not isinstance(result, Prediction):
            work()
        else:
            self._beside(work, result.output)

    def made(self, prediction: Prediction) -> Prediction:
        """A prediction with the output that the caller gets.

        Raises ``PayloadTooLarge`` where all outputs so far are more than a call may have.
        """
        if self._dump is not None:
            self._check()
            output = self._dump(prediction.output, self.call.options, self._check)
            prediction = replace(prediction, output=output)
        size = weight([prediction.output, prediction.facts])
        with self._lock:
            self._output_bytes += size
            left = self._max_output - self._output_bytes
        if left < 0:
            raise PayloadTooLarge(
                f"The outputs of this call come to more than {self._max_output} bytes, the most "
                "allowed (CRANE_MAX_OUTPUT). Send fewer inputs in one call, or ask for less of "
                "each."
            )
        return prediction

    def _check(self) -> None:
        if self.cancelled:
            raise too_late()

    def _item_done(self, about: Mapping[str, Any]) -> None:
        with self._lock:
            self._open -= 1
            if self._open:
                return
        if errors := [(item, item.error) for item in self.items if item.error]:
            self._end(self._error(errors))
            return
        predictions = [item.prediction for item in self.items if item.prediction]
        self._end(
            Answer(
                outputs=[prediction.output for prediction in predictions],
                usage=[prediction.usage for prediction in predictions],
                facts=[prediction.facts for prediction in predictions],
                applied=[prediction.applied for prediction in predictions],
                batch_size=max(item.batch_size for item in self.items),
                timings_ms={
                    # The items of a call may run in several batches: the longest of each counts.
                    name: max(item.timings_ms[name] for item in self.items)
                    for name in ("queue", "load", "inference")
                },
                **about,
            )
        )

    def _error(self, errors: list[tuple[Item, CraneError]]) -> CraneError:
        faults: dict[str, str] = {}
        for item, error in errors:
            if not isinstance(error, InvalidRequest):
                return error
            at = f"input[{item.place}]" if len(self.call.inputs) > 1 else "input"
            for path, fault in error.details.items():
                faults[path.replace("input", at, 1)] = fault
        return InvalidRequest.of(faults)


class Item:
    """One input of a job, in a worker's queue."""

    __slots__ = (
        "_again",
        "_told",
        "alone",
        "asked_at",
        "batch_size",
        "error",
        "index",
        "job",
        "prediction",
        "prepared",
        "size",
        "timings_ms",
    )

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.index = index
        self.size = 1
        self.prepared: Any = None  # beside the model's thread, before it could run
        self.alone = False  # whether it runs by itself, after it failed with others
        self.asked_at = float("-inf")  # when its run last asked whether anybody waits for it
        self._told: dict[str, str] = {}  # of each kind of text
        self._again: dict[str, str] = {}  # what of that another run still has to repeat
        self.prediction: Prediction | None = None
        self.error: CraneError | None = None
        self.batch_size = 0
        self.timings_ms: dict[str, float] = {}

    @property
    def place(self) -> int:
        """The index of its input, of which there may be several items."""
        return self.index // self.job.call.repeat

    @property
    def input(self) -> Any:
        return self.job.call.inputs[self.place]

    @property
    def options(self) -> Mapping[str, Any]:
        return self.job.call.options

    @property
    def listens(self) -> bool:
        """Whether its caller is told of its run."""
        return self.job.call.stream

    @property
    def caller(self) -> str:
        return self.job.call.caller

    def cancelled(self) -> bool:
        """For a run to ask, between its steps: one that asks does not hang."""
        self.asked_at = time.monotonic()
        return self.job.cancelled

    @property
    def seed(self) -> int | None:
        return self.job.call.seeds[self.index] if self.job.call.seeds else None

    def tell(self, kind: str, data: dict[str, Any]) -> None:
        """Tell a call that streams of this input's run."""
        if not self.listens:
            return
        if kind == "delta":
            text, sort = data["text"], data.get("kind", "")
            if again := self._again.get(sort):  # which the caller has
                known = min(len(text), len(again))
                if text[:known] != again[:known]:
                    raise RuntimeError("a run that was begun anew wrote another text")
                self._again[sort], text = again[known:], text[known:]
            if not text:
                return
            self._told[sort] = self._told.get(sort, "") + text
            data = {**data, "text": text}
        self.job.tell(kind, {"index": self.index, **data})

    def begin_again(self) -> None:
        """What a run that failed has told is not to be told twice."""
        self._again = dict(self._told)

    def answer(self, result: Prediction | CraneError, about: Mapping[str, Any]) -> None:
        """Take the input's result; a bug in an adapter's output fails its call, and no other."""

        def work() -> None:
            try:
                self._answer(result, about)
            except Exception:
                logger.exception("an output of %s cannot be used", self.job.call.model_id)
                self.prediction = None  # nor may its usage be
                self.job.fail(InternalError())

        self.job.answer(work, result)

    def _answer(self, result: Prediction | CraneError, about: Mapping[str, Any]) -> None:
        if isinstance(result, CraneError):
            self.error = result
        elif not isinstance(result, Prediction):
            self.error = InternalError()
        elif has_nan(result.output):
            self.error = not_numbers()
        else:
            self.prediction = result  # which has run, whatever becomes of its output
            try:
                self.prediction = self.job.made(result)
            except PayloadTooLarge as error:
                self.job.fail(error)  # and what has not run yet does not
            except CraneError as error:
                self.error = error
        self.job._item_done(about)
