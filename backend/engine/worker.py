"""A thread that owns one model: it loads it, runs its batches, and unloads it."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from enum import Enum, auto
from typing import Any

from backend import metrics
from backend.adapters import footprint
from backend.adapters.base import Adapter, Prediction, too_late
from backend.adapters.building import build_in_turns
from backend.adapters.hub import release_memory
from backend.adapters.progress import LoadWatch
from backend.engine import libraries, turns
from backend.engine.batch_queue import BatchQueue
from backend.engine.calls import COMING, ModelStatus, State
from backend.engine.devices import Devices
from backend.engine.faults import DeviceBroken, is_broken_device, is_out_of_memory
from backend.engine.feed import Feed
from backend.engine.fetch import Fetch
from backend.engine.jobs import Item, Job
from backend.engine.residency import Residency
from backend.engine.runner import Runner, group_of, waited_for
from backend.engine.stay import Stay
from backend.engine.watchdog import Watch, stack_of
from backend.errors import (
    CraneError,
    ModelUnavailable,
    OutOfMemory,
    Overloaded,
)
from backend.registry import ModelSpec

logger = logging.getLogger("crane.engine")

# A failed load is remembered for 10 s, doubling to 5 min: long enough not to load in a loop,
# short enough that a mended model comes back by itself.
FIRST_RETRY_S = 10.0
LAST_RETRY_S = 300.0
# For a batch that is too much only models leave that are of no use to anybody: a caller's input may
# be so large that no room is enough, and others would pay for it with a load.
UNUSED_S = 60.0
LONGEST_WAIT_S = 3600.0  # a lock's own wait has a limit, of some days


class Leaving(Enum):
    """Whether a loaded model is to unload, and when."""

    NO = auto()
    IF_IDLE = auto()  # unless work comes first
    WHEN_IDLE = auto()  # after all queued work
    NOW = auto()  # after the present batch, whatever is queued


class Worker:
    """Runs one model's calls in batches, from a thread that loads it and unloads it again.

    Several entries may share its weights: the first one's adapter loads them, and each other's
    takes them over before its first batch.

    It never waits for a batch to fill: when the model is free, all queued work with equal options
    goes together, up to ``max_batch_size`` inputs. A worker whose load failed refuses its callers
    for a while. Its thread lives as long as there is something to do or to keep loaded.
    """

    def __init__(
        self,
        spec: ModelSpec,
        make_adapter: Callable[[ModelSpec], Adapter],
        residency: Residency,
        *,
        queue_size: int,
        devices: Devices,
        threads: tuple[int, int],
        idle_timeout_s: float,
        load_timeout_s: float,
        hang_timeout_s: float,
        on_defunct: Callable[[bool], None],
    ) -> None:
        """``on_defunct`` is told that only a new process helps, and whether at once."""
        self.model_id = spec.id
        self.state = State.UNLOADED
        self.pinned = spec.pinned
        self.used_at = time.monotonic()
        self._specs = {spec.id: spec}
        self._make_adapter = make_adapter
        self._residency = residency
        self._queue_size = queue_size
        self._devices = devices
        self._runner = Runner(
            {spec.id: make_adapter(spec)},
            threads=threads,
            make_room=lambda: self._make_room(UNUSED_S),
            out_of_memory=self._out_of_memory,
        )
        self._idle_timeout_s = idle_timeout_s
        self._load_timeout_s = load_timeout_s
        self._on_defunct = on_defunct
        self._stay = Stay()
        self._queue = BatchQueue()
        self._running: list[Item] = []  # which is replaced, never changed
        self._parked: list[Item] = []  # until something is ready for them elsewhere
        # One lock, so that nothing is queued after the last look for work.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._wanted = False  # though nobody has called it
        self._leaving = Leaving.NO
        self._load_watch = LoadWatch({})
        self._watch = Watch(spec.id, hang_timeout_s, lambda: self._running)
        self._fetching: Fetch | None = None
        self._in_line = False  # whether it waits for the load of another model
        self._load_s: float | None = None
        self._size: tuple[str, int] | None = None  # its device and bytes, once it was loaded
        self._failures = 0
        self._retry_at = 0.0
        self._error: str | None = None

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Those of all entries that share the weights."""
        return self._runner.adapters

    @property
    def _adapter(self) -> Adapter:
        return self._runner.first

    @property
    def users(self) -> int:
        return len(self._queue) + len(self._running) + len(self._parked)

    @property
    def callers(self) -> list[str]:
        """Who waits for it."""
        return self._queue.callers

    @property
    def is_leaving(self) -> bool:
        return self._leaving is not Leaving.NO

    def add(self, spec: ModelSpec) -> None:
        """Serve another entry of the same weights."""
        if spec.id in self._specs:
            return
        with self._changed:  # so that an unload, which replaces all adapters, has this one too
            self.adapters[spec.id] = self._make_adapter(spec)
            self._specs[spec.id] = spec
            self.pinned |= spec.pinned

    def want(self, *, anew: bool) -> None:
        """Load, though nobody has called; and if ``anew``, though it failed just now."""
        with self._changed:
            if anew:
                self._retry_at = 0.0
            self._check_open()
            self._wanted = self.state is not State.READY
            if self.state in (State.UNLOADED, State.FAILED):
                self.state = State.LOADING
            self._leaving = Leaving.NO
            self._start()

    def submit(self, job: Job) -> None:
        """Queue every input of a job, or refuse it whole: ``Overloaded``, ``ModelUnavailable``."""
        adapter = self.adapters[job.call.model_id]
        sizes = [adapter.size(value, job.call.options) for value in job.call.inputs]
        for item in job.items:
            item.size = sizes[item.place]
        pushed_out: list[Job] = []
        with self._changed:
            self._check_open()
            if self.is_leaving and self.state in COMING:
                self._drop_cancelled()
                if not self.users:  # the order was for the calls before, and they are over
                    self._leaving = Leaving.NO
            places = self._queue_size - len(self._parked)
            if len(self._queue) + len(job.items) > places:
                self._drop_cancelled()
            if len(self._queue) + len(job.items) > places:
                queued = len(self._queue) + len(self._parked)
                wait_s = max(1.0, queued * self._runner.seconds_per_item)
                refusal = Overloaded(
                    f"{self.model_id} has {queued} inputs queued, and "
                    f"{self._queue_size} is the most; try again in {wait_s:.0f} s.",
                    retry_after_s=wait_s,
                )
                pushed_out = self._queue.push_out(job.items, places)
                if not pushed_out:
                    raise refusal
            self._queue.put(job.items)
            self._start()
        for one in pushed_out:
            one.fail(refusal)

    def leave(self, *, though_used: bool = False) -> bool:
        """Unload to make room: unless it is used, or after its present batch."""
        with self._changed:
            if self.state is not State.READY or self.pinned or (self.users and not though_used):
                return False
            self._leaving = Leaving.NOW if though_used else Leaving.IF_IDLE
            self._changed.notify()
            return True

    def unload(self) -> None:
        """Unload as soon as nothing is queued or running."""
        with self._changed:
            self._wanted = False
            if self._thread is not None and self._leaving is not Leaving.NOW:
                self._leaving = Leaving.WHEN_IDLE
                self._changed.notify()

    def close(self) -> None:
        """Take no more work; what is queued is still answered, then the model is unloaded."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; false if it has not ended by then."""
        if (thread := self._thread) is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def status(self, model_id: str) -> ModelStatus:
        loaded = self.state is State.READY
        error = self._residency.why(self) if self.state is State.WAITING else None
        running = list(self._running)
        with self._changed:
            waiting = [*self._queue, *self._parked]
        queued = sum(item.job.call.model_id == model_id for item in waiting)
        mine = running and running[0].job.call.model_id == model_id
        return ModelStatus(
            state=self.state,
            progress=self._progress(),
            queue=queued,
            running={"inputs": len(running), **self._runner.progress} if mine else None,
            device=self._devices.shown(self._adapter.device) if loaded else None,
            dtype=self._adapter.dtype if loaded else None,
            memory_bytes=self._size[1] if self._size else None,
            load_s=self._load_s,
            idle_s=round(time.monotonic() - self.used_at, 1) if loaded and not running else None,
            window=self._adapter.window if loaded else None,
            error=error.message if error else self._error,
        )

    def _start(self) -> None:
        """Have the thread at work; the caller holds the lock."""
        if self._thread is None:
            self.state = State.LOADING
            self._thread = threading.Thread(
                target=self._run, name=f"model {self.model_id}", daemon=True
            )
            self._thread.start()
        self._changed.notify()

    def _check_open(self) -> None:
        """Refuse what cannot be run; the caller holds the lock."""
        if self.state is State.DEFUNCT or (
            self.state is State.FAILED and time.monotonic() < self._retry_at
        ):
            raise self._refusal()
        if self._closing:
            raise ModelUnavailable("The service is shutting down.", retry_after_s=5)

    def _run(self) -> None:
        going_on = True
        while going_on:
            try:
                if going_on := self._has_work():
                    self._serve()
            except BaseException as error:  # not of a batch, which _answer keeps
                going_on = self._recovers(error)

    def _serve(self) -> None:
        """Load, run batches as long as there is a reason to stay, and unload."""
        if self._load():
            while self._wait_for_work():
                self._answer_queued()
            self._unload()

    def _recovers(self, error: BaseException) -> bool:
        """Drop the model after a bug and have it load again later; false if the device is broken.

        The model's state is unknown, but other models need not pay for it.
        """
        logger.error("%s stopped working", self.model_id, exc_info=error)
        traceback.clear_frames(error.__traceback__)  # which have the model's weights
        broken = isinstance(error, DeviceBroken) or is_broken_device(error)
        if not broken:
            try:
                self._let_go(self._runner.loaded())
            except BaseException as another:
                logger.exception("%s did not unload", self.model_id)
                broken = is_broken_device(another)
        self._residency.give_back(self)
        if broken:
            metrics.DEFUNCT.labels(self.model_id, "device").inc()
            self._refuse_all(
                State.DEFUNCT, "The model's device failed, and its engine is being replaced."
            )
            self._on_defunct(True)
            return False
        self._refuse_for_a_while(f"{self.model_id} stopped working. The log has the reason.")
        return True

    def check(self) -> None:
        """Give the model up if its thread is overdue: only the end of the process can end that."""
        thread = self._thread
        if thread is None or self.state is State.DEFUNCT:
            return
        with self._changed:  # so that the thread does not come back meanwhile
            if (why := self._watch.overdue(thread)) is None:
                return
            refuse = self._close_with(State.DEFUNCT, why)
        logger.error("%s Its thread is here:\n%s", why, stack_of(thread))
        libraries.alone.give_up(thread)
        metrics.DEFUNCT.labels(self.model_id, "hangs").inc()
        refuse()
        self._on_defunct(False)

    @property
    def is_over(self) -> bool:
        """Whether it is defunct for good: its thread does not come back."""
        thread = self._thread
        return self.state is State.DEFUNCT and not (thread and thread.is_alive())

    def _has_work(self) -> bool:
        """Whether to load; else the thread is over, and the next call starts another."""
        with self._changed:
            while self.pinned and self.state is State.FAILED and not self._closing:
                left_s = self._retry_at - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            self._leaving = Leaving.NO  # an order to unload was for what there is no more
            self._drop_cancelled()
            again = self.pinned and self.state is State.FAILED and not self._closing
            self._wanted |= again
            if self._queue or (self._wanted and not self._closing):
                return True
            self._thread = None
            return False

    def _is_wanted(self) -> bool:
        """Whether to go on waiting for memory."""
        with self._changed:
            self._drop_cancelled()
            return bool(self._queue) or (self._wanted and not self._closing)

    def _goes_on(self) -> bool:
        """Whether to go on loading: it does for whoever comes next, unless it is unloaded."""
        with self._changed:
            self._drop_cancelled()
            return bool(self._queue) or not self.is_leaving

    def _load(self) -> bool:
        started = time.monotonic()
        try:
            adapter = self._adapter
            if not self._fetch(adapter):
                return False
            device, size = self._size or adapter.place()
            self.state = State.WAITING
            memory = self._devices.memory(device)
            if not self._residency.take(self, memory, size, self._is_wanted):
                self.state = State.UNLOADED
                return False
            self.state = State.LOADING
            with self._alone(adapter) as wanted:
                if not wanted:
                    self._residency.give_back(self)
                    self.state = State.UNLOADED
                    return False
                started = time.monotonic()
                with LoadWatch(adapter.weight_files) as self._load_watch:
                    self._load_in_time(adapter)
            if self.state is State.DEFUNCT:  # it was given up, and did load after all
                self._let_go([adapter])
                self._residency.give_back(self)
                self._come_back()
                return False
            self._size = device, adapter.footprint()
            self._residency.settle(self, self._size[1])
        except BaseException as error:
            if self.state is State.DEFUNCT:  # it was given up before
                self._residency.give_back(self)
                self._come_back()
                return False
            if is_broken_device(error):
                raise DeviceBroken from error
            self._fail_load(error)
            return False
        self.used_at = time.monotonic()
        self._load_s = round(self.used_at - started, 3)
        self._runner.loaded_at(self.used_at)
        self._stay.load(self.used_at, self._own_stay_s(adapter.spec), ordered=self._wanted)
        self._failures, self._error, self._wanted = 0, None, False
        self.state = State.READY
        fields = {
            "device": self._devices.shown(adapter.device),
            "dtype": adapter.dtype,
            "memory_bytes": self._size[1],
            "load_s": self._load_s,
        }
        logger.info("%s loaded", self.model_id, extra={"fields": fields})
        return True

    def _fetch(self, adapter: Adapter) -> bool:
        """Have on this machine what a load reads, before it takes memory or keeps others waiting.

        False once it is to be unloaded, or the engine closes. Raises ``ModelUnavailable`` after
        ``CRANE_LOAD_TIMEOUT``.
        """
        self.state = State.LOADING
        if adapter.spec.hf_model is None:
            self._get_ready(adapter)
            return True
        until = time.monotonic() + self._load_timeout_s
        while True:
            # One that was left alone ends before another begins: it fetches the same files.
            if self._fetching is None or (
                self._fetching.adapter is not adapter and self._fetching.wait(0)
            ):
                self._fetching = Fetch(adapter, self._get_ready)
            fetch = self._fetching
            if fetch.wait(libraries.LOOK_S) and fetch.adapter is adapter:
                self._fetching = None
                fetch.check()
                return True
            if self._closing:
                error = ModelUnavailable("The service is shutting down.", retry_after_s=5)
                self._refuse_all(State.UNLOADED, error.message, error)
                return False
            if not self._goes_on():
                self.state = State.UNLOADED
                return False
            if time.monotonic() > until:
                raise ModelUnavailable(
                    f"Its files were not there after {self._load_timeout_s:g} s; the download goes "
                    "on. Raise CRANE_LOAD_TIMEOUT, or fetch them with `hf download` before."
                )

    def _get_ready(self, adapter: Adapter) -> None:
        """Import, look up, check and download; in a thread of its own, for all of it may hang."""
        adapter.check_entry()
        libraries.load(adapter.libraries)
        if self._size is None:
            device, size = adapter.place()
            self._residency.check(self, self._devices.memory(device), size)
        with LoadWatch(adapter.weight_files) as self._load_watch:
            adapter.fetch()

    @contextmanager
    def _alone(self, adapter: Adapter) -> Iterator[bool]:
        """Wait until nothing else loads in this process; false if it is to be unloaded before."""
        if not adapter.loads_alone:
            yield True
            return
        self._in_line = True
        with libraries.alone.hold(self.model_id, self._goes_on, self._queue) as wanted:
            self._in_line = False
            yield wanted

    def _progress(self) -> dict[str, Any] | None:
        """How far a load is, as ``LoadWatch.progress`` has it, or for which other one it waits."""
        holder = libraries.alone.holder
        if not self._in_line or holder in (None, self.model_id):
            return self._load_watch.progress if self.state in COMING else None
        total = sum(self._adapter.weight_files.values())
        about = {"done_bytes": 0, "total_bytes": total, "left_s": None}
        return {"stage": "wait", "waiting_for": holder, **about}

    def _fail_load(self, error: BaseException) -> None:
        self._wanted = False
        self._renew()
        release_memory()
        self._residency.give_back(self)
        if isinstance(error, OutOfMemory) and not self.pinned:  # there may be room for the next
            self._refuse_all(State.UNLOADED, error.message, error)
            return
        logger.error("%s did not load", self.model_id, exc_info=error)
        told = error.message if isinstance(error, CraneError) else "The log has the reason."
        self._refuse_for_a_while(f"{self.model_id} did not load. {told}")

    def _refuse_for_a_while(self, why: str) -> None:
        """Refuse all calls until the next attempt, each pause twice as long as the last one."""
        pause_s = min(FIRST_RETRY_S * 2**self._failures, LAST_RETRY_S)
        self._failures += 1
        self._retry_at = time.monotonic() + pause_s
        self._wanted = False
        self._refuse_all(State.FAILED, why)

    def _load_in_time(self, adapter: Adapter) -> None:
        """Load; where the device has too little memory, once more after all idle models left."""
        build_in_turns()
        try:
            with self._watch.limit("load", self._load_timeout_s):
                try:
                    return adapter.load()
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    logger.warning("%s ran out of memory as it loaded", self.model_id)
                # The error is gone by now, and what its frames held.
                self._make_room()
                adapter.load()
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory() from None
            raise
        finally:
            turns.end_team()

    def _make_room(self, idle_s: float = 0.0) -> None:
        """Have all models leave the device that have been idle for so long."""
        self._residency.empty(self, idle_s)
        release_memory()

    def _out_of_memory(self) -> OutOfMemory:
        device = self._residency.device_of(self)
        return OutOfMemory(
            f"{self.model_id} ran out of memory on {device}, though it did one input at a time and "
            "models that nobody used were unloaded. Ask for less, or make room.",
            retry_after_s=10,
        )

    def _unload(self) -> None:
        with self._changed:
            if self.state is not State.DEFUNCT:
                self.state = State.UNLOADED  # what comes from now on waits for the next load
        with self._watch.limit("unload", self._load_timeout_s):
            self._let_go(self._runner.loaded())
        self._residency.give_back(self)
        logger.info("%s unloaded", self.model_id)
        self._come_back()

    def _come_back(self) -> None:
        """Where the model was given up, and its thread has come back after all, begin anew."""
        if self.state is State.DEFUNCT:
            self._refuse_for_a_while(self._error or "")

    def _let_go(self, adapters: list[Adapter]) -> None:
        """Give back the memory of adapters that have loaded."""
        weights = [weakref.ref(one) for adapter in adapters for one in footprint.tensors(adapter)]
        while adapters:
            try:
                adapters.pop().unload()
            except Exception as error:
                if is_broken_device(error):
                    raise
                logger.exception("an adapter of %s did not unload", self.model_id)
        self._renew()
        release_memory(weights)

    def _renew(self) -> None:
        """Take new adapters, that have nothing of the last load."""
        with self._changed:
            adapters = {name: self._make_adapter(spec) for name, spec in self._specs.items()}
            self._runner.renew(adapters)
            self._leaving = Leaving.NO

    def _own_stay_s(self, spec: ModelSpec) -> float:
        return self._idle_timeout_s if spec.idle_timeout is None else spec.idle_timeout

    def _refuse_all(self, state: State, why: str, error: CraneError | None = None) -> None:
        """Refuse everyone who waits, as everyone who comes while it is so."""
        with self._changed:
            refuse = self._close_with(state, why, error)
        refuse()

    def _close_with(
        self, state: State, why: str, error: CraneError | None = None
    ) -> Callable[[], None]:
        """Take no calls; returns what refuses those that wait. The caller holds the lock."""
        self.state, self._error = state, why
        left = [*self._running, *self._parked, *self._queue.clear()]
        self._running, self._parked = [], []

        def refuse() -> None:
            for item in left:
                item.job.fail(error or self._refusal())

        return refuse

    def _refusal(self) -> ModelUnavailable:
        left_s = max(1.0, self._retry_at - time.monotonic())
        return ModelUnavailable(
            f"{self._error} Try again in {math.ceil(left_s)} s.", retry_after_s=left_s
        )

    def _drop_cancelled(self) -> None:
        """Take out of the queue what nobody waits for; the caller holds the lock."""
        if self._queue and any(item.job.cancelled for item in self._queue):
            self._queue.keep(waited_for)

    def _wait_for_work(self) -> bool:
        """Wait until something is queued; false once the model is to unload."""
        with self._changed:
            rests = False
            while True:
                self._drop_cancelled()
                if self._leaving is Leaving.NOW or self.state is State.DEFUNCT:
                    return False
                if self._queue:
                    if self._leaving is Leaving.IF_IDLE:
                        self._leaving = Leaving.NO
                    return True
                stays = bool(self._parked)  # which come back soon
                if (self._closing or self.is_leaving) and not stays:
                    return False
                left_s = self._stay.until - time.monotonic()
                if self.pinned or stays:
                    left_s = math.inf
                if left_s <= 0:
                    return False
                if not self._changed.wait(min(left_s, LONGEST_WAIT_S if rests else turns.LINGER_S)):
                    turns.end_team()
                    rests = True

    def _answer_queued(self) -> None:
        """Answer what is queued, and what comes meanwhile; on a CPU in turns with other models."""
        # What comes while others compute is in the first batch too.
        adapter = self._adapter
        turn = turns.hold(adapter.device, self._callers) if adapter.takes_turns else nullcontext()
        with turn:
            while batch := self._take_batch():
                self._answer(batch)
                turns.offer()

    def _callers(self) -> list[str]:
        """Whose inputs wait, or run."""
        return [*self._queue.callers, *(item.caller for item in self._running)]

    def _take_batch(self) -> list[Item]:
        """Take all that may run together; empty where nothing is queued, or may be run."""
        with self._changed:
            self._drop_cancelled()
            if self._leaving is Leaving.NOW or not self._queue:
                return []
            head = self._queue.head
            adapter = self._adapter_of(head)
            most = min(adapter.spec.max_batch_size, self._runner.most_at_once)
            if adapter.joins(head.options):
                batch = self._take_joining(adapter, most) or [self._queue.take()]
            else:
                batch = self._queue.take_equals(
                    most, lambda batch: group_of(batch, adapter.max_run_tokens)
                )
            self._running, self._runner.progress = batch, {}
        return batch

    def _adapter_of(self, item: Item) -> Adapter:
        return self.adapters[item.job.call.model_id]

    def _take_joining(self, adapter: Adapter, most: int) -> list[Item]:
        """Take what may join a run of an adapter now; the caller holds the lock."""

        def joins(item: Item) -> bool:
            same = self._adapter_of(item) is adapter and not item.alone
            return same and adapter.joins(item.options)

        return self._queue.take_while(joins, most)

    def _roll(self, adapter: Adapter, batch: list[Item], about: dict[str, Any]) -> None:
        """Run a batch that others join as they come; what failed is queued again, at the head."""
        runner = self._runner

        def join(most: int) -> list[Item]:
            with self._changed:
                self._drop_cancelled()
                if batch[0].alone or self._leaving is Leaving.NOW:
                    return []
                items = self._take_joining(adapter, most)
                self._running = [*self._running, *items]
            return items

        def begin(item: Item, running: int) -> None:
            runner.use_threads(running)
            item.begin_again()
            runner.begin(item, time.monotonic(), about)

        def answer(item: Item, result: Prediction | CraneError, seconds: float) -> None:
            runner.timed(seconds)
            began_at = item.job.queued_at + sum(item.timings_ms.values()) / 1e3
            item.timings_ms["inference"] = max(0.0, time.monotonic() - began_at) * 1e3
            # Whoever is answered finds the place free.
            self._rest([item])
            item.answer(too_late() if item.job.cancelled else result, about)

        feed = Feed(batch, join=join, begin=begin, answer=answer, park=self._park)
        left = runner.roll(adapter, feed)
        if left:
            with self._changed:
                self._running = []
                self._queue.put_back(left)

    def _park(self, item: Item, ready: Future[Any]) -> None:
        """Take an input out of its run, and queue it again at the head when its future is done."""
        with self._changed:
            self._running = [one for one in self._running if one is not item]
            self._parked.append(item)
        item.prepared = ready
        ready.add_done_callback(lambda _: self._unpark(item))

    def _unpark(self, item: Item) -> None:
        with self._changed:
            if item not in self._parked:  # it was refused, with all others
                return
            self._parked.remove(item)
            self._queue.put_back([item])
            self._start()

    def _answer(self, batch: list[Item]) -> None:
        adapter = self._adapter_of(batch[0])
        first = self._adapter  # which has loaded; another entry's may not have its weights yet
        about: dict[str, Any] = {
            "revision": first.revision,
            "device": self._devices.shown(first.device),
            "dtype": first.dtype,
        }
        if adapter.joins(batch[0].options):
            self._roll(adapter, batch, about)
            return
        answers = self._runner.run(adapter, waited_for(batch), about)
        self._rest(batch)  # whoever is answered finds the model free
        for item, result in answers:
            item.answer(result, about)

    def _rest(self, batch: list[Item]) -> None:
        """Be done with a batch, but for its answers."""
        with self._changed:
            over = set(map(id, batch))
            self._running = [item for item in self._running if id(item) not in over]
            self.used_at = time.monotonic()
            for call in {id(item.job): item.job.call for item in batch}.values():
                own = self._own_stay_s(self._specs[call.model_id])
                stay_s = own if call.keep_alive_s is None else call.keep_alive_s
                self._stay.use(call.caller, self.used_at, stay_s)
            idle = not self._queue and not self._running
        if idle:
            self._residency.look_again()
