"""What travels through an engine: a call on its way in, an answer on its way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


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
    time since its last use; ``window`` is how many tokens of a text it reads at most, if that is
    bounded; ``error`` is the last one that it refused calls with.
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
    window: int | None = None
    error: str | None = None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


def total(usages: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The usage of several inputs together."""
    counts: Counter[str] = Counter()
    for usage in usages:
        counts.update(usage)
    return dict(counts)
