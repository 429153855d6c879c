"""The engines' face in an HTTP worker: hand a call over, wait for its answer, and no longer."""

from __future__ import annotations

import math
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from typing import Any

from backend.config import Config
from backend.engine.calls import COMING, PRESENT, Answer, Call, Event, State
from backend.engine.residency import shown_size
from backend.engine.status import nowhere, together
from backend.errors import (
    ClientClosedRequest,
    CraneError,
    DeadlineExceeded,
    ModelLoading,
    ModelUnavailable,
    OutOfMemory,
)

IDLE_S = 5.0  # a caller that streams hears at least that often that it is still there
LOOK_S = 0.05  # between looks at a model that loads or unloads
RETRY_S, LONGEST_RETRY_S = 10.0, 60.0  # where it is not known how long a load takes; and at most
STAGES = {"download": "downloaded", "load": "read"}
# What poll tells of a socket whose other end is closed, or writes no more. The bytes of a next
# request do not count: they wake nobody. Only Linux has a word for it alone.
HUNG_UP: int = getattr(select, "POLLRDHUP", select.POLLHUP)


Stream = Generator[Event | Answer | None]


class EngineClient(ABC):
    """Runs calls on the engines, wherever they are and however many."""

    def __init__(self, config: Config) -> None:
        self._load_wait_s = config.load_wait_s
        self._windows: dict[str, int] = {}  # which no later load changes

    def run(self, call: Call, caller_socket: socket.socket | None = None) -> Answer:
        """Return the answer, or raise the error that the caller shall see, as ``stream`` does."""
        with closing(self.stream(call, caller_socket)) as stream:
            return next(told for told in stream if isinstance(told, Answer))

    @abstractmethod
    def stream(self, call: Call, caller_socket: socket.socket | None = None) -> Stream:
        """Hand a call over, and give what is told of it: the events, if it streams, and the answer.

        None says that there was nothing for ``IDLE_S``. Raises ``DeadlineExceeded`` after
        ``call.timeout_s``; ``ModelLoading`` where the model is still loading after
        ``CRANE_LOAD_WAIT``; ``ClientClosedRequest`` once the other end of ``caller_socket`` is
        closed. Whoever stops waiting, by closing the generator, frees the call's place; to throw a
        ``CraneError`` into it does so too, and that is raised again with the call's ``usage``.

        A caller that has closed only its sending half, as ``nc -N`` does, counts as gone, as it
        does for nginx: it looks the same as one that has closed both.
        """

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What ``together`` says; raises ``ModelUnavailable`` where no engine answers."""

    @abstractmethod
    def control(self, order: str, model_id: str) -> None:
        """Have ``load`` or ``unload`` done with a model, and do not wait until it is.

        Raises ``ModelUnavailable`` where it cannot be, or no engine answers.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the engines: an inline one finishes its work and unloads."""

    def load(self, model_id: str) -> None:
        """Load a model, all its ``replicas``, and wait until it is for ``CRANE_LOAD_WAIT`` at most.

        Raises ``ModelUnavailable``, ``OutOfMemory`` and ``ModelLoading``.
        """
        self.control("load", model_id)
        deadline = time.monotonic() + self._load_wait_s
        while True:
            model = self._model(model_id)
            coming = [copy for copy in model["copies"] if copy["state"] in COMING]
            if not coming:
                break
            if time.monotonic() > deadline:
                refuse_while_loading(coming[0], model_id, self._load_wait_s)
            time.sleep(LOOK_S)
        if model["state"] == State.READY:
            return
        if model["state"] == State.UNLOADED and model["error"]:
            raise OutOfMemory(model["error"], retry_after_s=10)
        raise ModelUnavailable(
            model["error"] or f"{model_id} was unloaded meanwhile.", retry_after_s=1
        )

    def unload(self, model_id: str) -> bool:
        """Unload a model once its calls are done; whether it is, after ``CRANE_LOAD_WAIT``."""
        self.control("unload", model_id)
        deadline = time.monotonic() + self._load_wait_s
        while self._model(model_id)["state"] in PRESENT:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
        return True

    def window(self, model_id: str) -> int | None:
        """To how many tokens a model cuts a text; None where that is not known, or to none."""
        if model_id not in self._windows:
            with suppress(ModelUnavailable):
                if (window := self._model(model_id)["window"]) is not None:
                    self._windows[model_id] = window
        return self._windows.get(model_id)

    def _model(self, model_id: str) -> dict[str, Any]:
        known: dict[str, Any] = self.status()["models"].get(model_id) or nowhere()
        return known


class SingleEngine(EngineClient):
    """One engine."""

    name: str  # its devices

    @abstractmethod
    def look(self) -> dict[str, Any]:
        """What ``Engine.status`` says; raises ``ModelUnavailable`` where it does not answer."""

    def status(self) -> dict[str, Any]:
        return together([self.name], {0: self.look()})

    def stream(self, call: Call, caller_socket: socket.socket | None = None) -> Stream:
        started = time.monotonic()
        deadline = started + call.timeout_s
        wait_s = min(self._load_wait_s, call.timeout_s)
        look_at = started + wait_s  # at the model, should it still be loading then
        ticket = self._submit(call)
        ended = False
        try:
            while not ended:
                now = time.monotonic()
                until = min(deadline, look_at, now + IDLE_S)
                told = self._wait(ticket, until - now, caller_socket)
                ended = isinstance(told, Answer | CraneError)
                if isinstance(told, CraneError):
                    raise told
                if told is None and time.monotonic() >= look_at:
                    look_at = math.inf
                    self._refuse_while_loading(call.model_id, wait_s)
                if told is None and time.monotonic() >= deadline:
                    raise DeadlineExceeded(
                        f"{call.model_id} did not answer within {call.timeout_s:g} s. "
                        "Ask for less at once, or raise CRANE_REQUEST_TIMEOUT."
                    )
                yield told
        except CraneError as error:
            if not ended:
                error.usage = self._used(ticket)
            raise
        finally:
            if not ended:
                self._cancel(ticket)

    def _refuse_while_loading(self, model_id: str, waited_s: float) -> None:
        try:
            model = self.look()["models"].get(model_id) or nowhere()
        except ModelUnavailable:  # too busy to say
            return
        refuse_while_loading(model, model_id, waited_s)

    @abstractmethod
    def _submit(self, call: Call) -> Any:
        """Hand a call over; return what ``_wait`` and ``_cancel`` know it by."""

    @abstractmethod
    def _wait(
        self, ticket: Any, timeout_s: float, caller_socket: socket.socket | None
    ) -> Event | Answer | CraneError | None:
        """Wait for what is told next of a call; None when the time is up.

        Raises ``ClientClosedRequest``.
        """

    @abstractmethod
    def _used(self, ticket: Any) -> Mapping[str, float] | None:
        """The usage of the inputs that were run of a call that is given up.

        None where none has begun to run; empty where nothing is known.
        """

    @abstractmethod
    def _cancel(self, ticket: Any) -> None:
        """Say that nobody waits for a call any more."""


def caller_gone() -> ClientClosedRequest:
    return ClientClosedRequest(
        "The connection, or its sending half, was closed before there was an answer. "
        "Keep both halves open until it is there."
    )


def refuse_while_loading(model: dict[str, Any], model_id: str, waited_s: float) -> None:
    """Raise what a caller is told that has waited so long for a model, if that is not there yet."""
    if model["state"] == State.WAITING:
        raise OutOfMemory(
            f"There was no room for {model_id} in {waited_s:g} s. {model['error']}",
            details={"state": State.WAITING},
            retry_after_s=10,
        )
    if model["state"] == State.LOADING:
        raise _still_loading(model_id, waited_s, model["progress"])


def _still_loading(model_id: str, waited_s: float, progress: dict[str, Any] | None) -> ModelLoading:
    left_s, far = None, ""
    if progress is not None:
        left_s = progress["left_s"]
        far = f" ({_how_far(progress)})"
    retry_after_s = RETRY_S if left_s is None else min(max(left_s, 1.0), LONGEST_RETRY_S)
    return ModelLoading(
        f"{model_id} is still loading after {waited_s:g} s{far}; it goes on loading, so try again "
        f"in {math.ceil(retry_after_s)} s.",
        details={"state": State.LOADING, "progress": progress},
        retry_after_s=retry_after_s,
    )


def _how_far(progress: dict[str, Any]) -> str:
    if progress["stage"] == "wait":
        return f"waiting for the load of {progress['waiting_for']}"
    done, total = shown_size(progress["done_bytes"]), shown_size(progress["total_bytes"])
    return f"{done} of {total} {STAGES[progress['stage']]}"
