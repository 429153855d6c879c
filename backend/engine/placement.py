"""On which engine a call runs, where there are several."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from backend.engine import file_lock
from backend.engine.calls import PRESENT, State
from backend.engine.devices import Devices
from backend.errors import ModelUnavailable
from backend.registry import ModelSpec

ABOUT = 0.9  # of the most room is as good
LOCK_S = 10.0  # longer than it takes to ask several engines that do not answer
LOOK_EVERY_S = 0.25  # at the engines, for what other HTTP workers have there


class Link(Protocol):
    """The way to one engine."""

    index: int

    def look(self) -> dict[str, Any]:
        """What the engine says of itself; ``ModelUnavailable`` where it does not."""

    def control(self, order: str, model_id: str) -> None:
        """Have the engine do something with a model."""


def homes(spec: ModelSpec, registry: Iterable[ModelSpec], engines: Sequence[str]) -> list[int]:
    """The places of the ``engines`` on which a model may live: those with its device.

    A pinned one has as many as it has ``replicas``, and all processes find the same ones: the
    engines get such models in turns, in the order of ``models.yaml``.
    """
    able = _able(spec, engines)
    if not spec.pinned:
        return able
    before = sum(
        other.replicas for other in _until(spec, registry) if _able(other, engines) == able
    )
    return [able[(before + turn) % len(able)] for turn in range(min(spec.replicas, len(able)))]


def _until(spec: ModelSpec, registry: Iterable[ModelSpec]) -> Iterator[ModelSpec]:
    for other in registry:
        if other.id == spec.id:
            return
        if other.pinned:
            yield other


def _able(spec: ModelSpec, engines: Sequence[str]) -> list[int]:
    """All, where none has the device: each says what is wrong better than nobody does."""
    everywhere = list(range(len(engines)))
    if spec.device == "auto" and "device_map" in spec.load_kwargs:
        most = max(name.count("+") for name in engines)
        return [index for index in everywhere if engines[index].count("+") == most]
    if spec.device in ("auto", "cpu"):
        return everywhere
    if spec.device == "cuda":
        found = [index for index in everywhere if engines[index].startswith("cuda")]
    else:
        found = [index for index in everywhere if spec.device in engines[index].split("+")]
    return found or everywhere


class Placement:
    """Chooses an engine for each call, so that no model has more copies than its ``replicas``.

    A call goes to the copy with the least to do. Where there is none, the engine with the most room
    is told to load one; so is another, where all copies have more to do than one batch takes. One
    process at a time places models, by a lock on a file, and looks anew before it does.
    """

    def __init__(
        self,
        links: Sequence[Link],
        names: tuple[str, ...],
        registry: Iterable[ModelSpec],
        lock: Path,
    ) -> None:
        """``links`` go to engines with the devices ``names``, in that order."""
        self._links = links
        self._devices = [Devices(names, index) for index in range(len(names))]
        self._registry = registry
        self._homes = {
            spec.id: [links[index] for index in homes(spec, registry, names)] for spec in registry
        }
        self._file = lock
        self._engines: dict[int, dict[str, Any]] = {}  # by index, those that answered
        self._looked_at = -math.inf
        # What this process has on each engine, and what of it the engines had counted.
        self._mine: Counter[tuple[int, str]] = Counter()
        self._counted: Counter[tuple[int, str]] = Counter()
        self._lock = threading.Lock()  # of all of the above
        self._looking = threading.Lock()

    @contextmanager
    def place(self, spec: ModelSpec, inputs: int) -> Iterator[Link]:
        """The engine for a call of so many inputs, which counts as being there meanwhile."""
        link = self._choose(spec)
        key = link.index, spec.id
        with self._lock:
            self._mine[key] += inputs
        try:
            yield link
        finally:
            with self._lock:
                self._mine[key] -= inputs

    def look(self) -> dict[int, dict[str, Any]]:
        """Ask all engines how they are; those that do not answer are left out."""
        with self._lock:
            mine = self._mine.copy()
        engines = {}
        for link in self._links:
            with suppress(ModelUnavailable):
                engines[link.index] = link.look()
        # One that drains takes no calls: what it has is there no more for whoever chooses.
        taking = {index: told for index, told in engines.items() if not told.get("draining")}
        with self._lock:
            self._engines, self._counted = taking, mine
            self._looked_at = time.monotonic()
        return engines

    def copies(self, spec: ModelSpec) -> list[Link]:
        """The engines that have a model, or are to have it; after a ``look``."""
        return [link for link in self._homes[spec.id] if self._state(link, spec) in PRESENT]

    def load(self, spec: ModelSpec) -> None:
        """Have a model on as many engines as it has ``replicas``, though a load failed just now."""
        self._grow(spec, spec.replicas, "load")

    def unload(self, spec: ModelSpec) -> None:
        """Have every engine unload a model."""
        with self._alone():
            self.look()
            for link in self.copies(spec):
                link.control("unload", spec.id)

    def _grow(self, spec: ModelSpec, copies: int, order: str) -> list[Link]:
        """Have a model on so many engines, as far as they are there; return them all."""
        with self._alone():
            self.look()
            have = self.copies(spec)
            while len(have) < copies and (link := self._roomiest(spec, have)):
                link.control(order, spec.id)
                have.append(link)
            self.look()
            return have

    def _choose(self, spec: ModelSpec) -> Link:
        able = self._homes[spec.id]
        if len(able) == 1:
            return able[0]
        self._look_now_and_then()
        have = self.copies(spec)
        most = min(spec.replicas, len(able))
        if len(have) < most and all(self._load(link, spec) > spec.max_batch_size for link in have):
            failed = [link for link in able if self._state(link, spec) is State.FAILED]
            if not have and failed:  # whose answer says why, or which tries again
                return failed[0]
            try:
                have = self._grow(spec, len(have) + 1, "prepare")
            except ModelUnavailable:
                have = have or self.copies(spec)
        ready = [link for link in have if self._state(link, spec) is State.READY]
        answering = [link for link in able if link.index in self._engines]
        among = ready or have or answering or able
        return min(among, key=lambda link: self._load(link, spec))

    def _look_now_and_then(self) -> None:
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        # One thread looks; the others go by what was seen before, if anything was.
        if self._looking.acquire(timeout=0 if self._engines else LOCK_S):
            try:
                if time.monotonic() - self._looked_at >= LOOK_EVERY_S:
                    self.look()
            finally:
                self._looking.release()

    def _known(self, link: Link, spec: ModelSpec) -> dict[str, Any]:
        known: dict[str, Any] = self._engines.get(link.index, {}).get("models", {}).get(spec.id, {})
        return known

    def _state(self, link: Link, spec: ModelSpec) -> State:
        return State(self._known(link, spec).get("state", State.UNLOADED))

    def _load(self, link: Link, spec: ModelSpec) -> int:
        """A model's inputs on an engine: of others as they were seen last, and this process's."""
        known, key = self._known(link, spec), (link.index, spec.id)
        there: int = known.get("queue", 0) + (known.get("running") or {}).get("inputs", 0)
        with self._lock:
            return self._mine[key] + max(0, there - self._counted[key])

    def _roomiest(self, spec: ModelSpec, besides: list[Link]) -> Link | None:
        """Where the weights are already, for another entry; else where there is most room.

        Of engines with about as much, the one with the fewest models.
        """
        others = [link for link in self._homes[spec.id] if link not in besides]
        answering = [link for link in others if link.index in self._engines]
        same = [other.id for other in self._registry if _same_weights(spec, other)]
        if having := [link for link in answering if self._present(link) & set(same)]:
            return having[0]
        rooms = {link.index: self._room(link, spec) for link in answering}
        most = max(rooms.values(), default=0)
        roomy = [link for link in answering if rooms[link.index] >= most * ABOUT]
        return min(roomy, key=lambda link: len(self._present(link)), default=None)

    def _present(self, link: Link) -> set[str]:
        models = self._engines[link.index]["models"]
        return {model_id for model_id, model in models.items() if model["state"] in PRESENT}

    def _room(self, link: Link, spec: ModelSpec) -> float:
        """The bytes that a model may still take of an engine's device."""
        place = self._devices[link.index]
        try:
            device = place.memory(place.local(spec.device))
        except ModelUnavailable:  # it is not its
            return 0
        memory = self._engines[link.index]["memory"].get(device)
        # One that has never loaded has not looked at its memory, and has all of it.
        return memory["budget_bytes"] - memory["held_bytes"] if memory else math.inf

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with file_lock.held(self._file, LOCK_S):
                yield
        except TimeoutError:  # it is stopped, or waits for engines that hang
            raise ModelUnavailable(
                "Another process has been choosing an engine for a model all the time.",
                retry_after_s=LOCK_S,
            ) from None


def _same_weights(one: ModelSpec, other: ModelSpec) -> bool:
    named = [(spec.hf_model, spec.revision, spec.mirror, spec.dtype) for spec in (one, other)]
    return one.hf_model is not None and named[0] == named[1]
