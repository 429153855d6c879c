"""What travels through an engine: a call on its way in, an answer on its way out."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import orjson

from backend.adapters.base import Prediction
from backend.adapters.numbers import has_nan, not_numbers
from backend.errors import CraneError, InternalError, InvalidRequest

logger = logging.getLogger("crane.engine")


class State(StrEnum):
    """Where a model is between asked for and gone."""

    UNLOADED = "unloaded"
    WAITING = "waiting"  # for memory
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DEFUNCT = "defunct"


COMING = {State.LOADING, State.WAITING}
PRESENT = COMING | {State.READY}  # on an engine, now or soon


@dataclass(slots=True)
class Event:
    """What a call that streams is told before its answer.

    ``start`` once, when its first input begins to run: ``revision``, ``device``, ``dtype`` and the
    ``timings_ms`` so far. Then, each with the ``index`` of the input that it is about, ``delta``
    with a ``text`` that goes on from the last of its ``kind`` (what the model thinks is of the kind
    ``reasoning``, its output of none), and ``progress`` with how many ``steps`` of how many
    are done (``step``), and sometimes a ``preview``.
    """

    kind: str
    data: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Call:
    """One request for a model: its inputs, and how long its caller waits."""

    request_id: str
    model_id: str
    inputs: list[Any]
    options: dict[str, Any]
    seeds: list[int] | None
    timeout_s: float
    keep_alive_s: float | None = None
    stream: bool = False  # whether to tell of it before its answer
    # Whose quota the call is on. Models are shared fairly between callers, prefixes not at all.
    caller: str = ""
    repeat: int = 1  # how often each input is run; its runs are the items one after another

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of a call. ``usage``, ``facts`` and ``applied`` have an entry for each input."""

    outputs: list[Any]
    usage: list[Mapping[str, int | float]]
    facts: list[dict[str, Any]]
    applied: list[dict[str, Any]]
    revision: str | None
    device: str
    dtype: str
    batch_size: int
    timings_ms: dict[str, float]

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, kw_only=True)
class ModelStatus:
    """What an engine knows of one model, as ``GET /crane/models`` shows it.

    ``progress`` is how far its load is, as ``LoadWatch.progress`` has it. ``running`` is its
    present batch: how many inputs it has, and how many steps of how many are done where the model
    tells. ``memory_bytes`` is what it holds, or held when it was loaded last; ``idle_s`` is the
    time since its last use; ``error`` is the last one that it refused calls with.
    """

    state: State = State.UNLOADED
    progress: dict[str, Any] | None = None
    queue: int = 0
    running: dict[str, int] | None = None
    device: str | None = None
    dtype: str | None = None
    memory_bytes: int | None = None
    load_s: float | None = None
    idle_s: float | None = None
    error: str | None = None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


class Job:
    """A call inside the engine, until its last input is answered.

    Only the model's worker answers its items, so counting them needs no lock; ``cancel`` and
    ``fail`` may come from any thread.
    """

    def __init__(self, call: Call, tell: Callable[[Event | Answer | CraneError], None]) -> None:
        """``tell`` gets the call's answer or error, once and last, and before it its events."""
        self.call = call
        self._tell = tell
        self._begun = False
        self.queued_at = time.monotonic()
        self.deadline = self.queued_at + call.timeout_s
        # Items with equal keys may share a batch.
        self.key = call.model_id, orjson.dumps(call.options, option=orjson.OPT_SORT_KEYS)
        self.items = [Item(self, index) for index in range(len(call.inputs) * call.repeat)]
        self._cancelled = False
        self._open = len(self.items)
        self._ended = False
        self._lock = threading.Lock()  # so that a job ends once, whoever ends it

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

    @property
    def begun(self) -> bool:
        """Whether any of its inputs began to run."""
        return self._begun

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
            if self._ended:
                return
            self._ended = True
        self._tell(self._with_usage(answer) if isinstance(answer, CraneError) else answer)

    def _with_usage(self, error: CraneError) -> CraneError:
        """An error that says what of the call was run; it may be that of other calls, too."""
        if not self._begun:
            return error
        usage: Counter[str] = Counter()
        for item in self.items:
            usage.update(item.prediction.usage if item.prediction else {})
        error = copy(error)
        error.usage = dict(usage)
        return error

    def _item_done(self, about: Mapping[str, Any]) -> None:
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
        try:
            self._answer(result, about)
        except Exception:
            logger.exception("an output of %s cannot be used", self.job.call.model_id)
            self.job.fail(InternalError())

    def _answer(self, result: Prediction | CraneError, about: Mapping[str, Any]) -> None:
        if isinstance(result, CraneError):
            self.error = result
        elif not isinstance(result, Prediction):
            self.error = InternalError()
        elif has_nan(result.output):
            self.error = not_numbers()
        else:
            self.prediction = result
        self.job._item_done(about)
