"""The engine's face in an HTTP worker: hand a call over, wait for its answer, and no longer."""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from multiprocessing.connection import Client as connect_to
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from backend.config import Config
from backend.engine import wire
from backend.engine.calls import Answer, Call, Job, ModelStatus, State
from backend.engine.engine import Engine
from backend.engine.residency import shown_size
from backend.errors import (
    ClientClosedRequest,
    CraneError,
    DeadlineExceeded,
    ModelLoading,
    ModelUnavailable,
    OutOfMemory,
)
from backend.registry import Registry

LOOK_S = 0.05  # between looks at a model that loads or unloads
ENGINE_START_S = (
    5.0  # a restarted engine listens after about half a second; loaded hosts are slower
)
STATUS_TIMEOUT_S = 2.0
RETRY_S, LONGEST_RETRY_S = 10.0, 60.0  # where it is not known how long a load takes; and at most
STAGES = {"download": "downloaded", "load": "read"}
# What poll tells of a socket whose other end is closed, or writes no more. The bytes of a next
# request do not count: they wake nobody. Only Linux has a word for it alone.
HUNG_UP: int = getattr(select, "POLLRDHUP", select.POLLHUP)
LOOK_EVERY_S = 0.25  # at the caller's socket, where an answer is no file that can be polled too


class EngineClient(ABC):
    """Runs calls on an engine, wherever it is."""

    def __init__(self, config: Config) -> None:
        self._load_wait_s = config.load_wait_s

    def run(self, call: Call, caller_socket: socket.socket | None = None) -> Answer:
        """Return the answer, or raise the error that the caller shall see.

        ``DeadlineExceeded`` after ``call.timeout_s``; ``ModelLoading`` where the model is still
        loading after ``CRANE_LOAD_WAIT``; ``ClientClosedRequest`` once the other end of
        ``caller_socket`` is closed. Whoever stops waiting frees the call's place.

        A caller that has closed only its sending half, as ``nc -N`` does, counts as gone, as it
        does for nginx: it looks the same as one that has closed both.
        """
        deadline = time.monotonic() + call.timeout_s
        ticket = self._submit(call)
        try:
            wait_s = min(self._load_wait_s, call.timeout_s)
            answer = self._wait(ticket, wait_s, caller_socket)
            if answer is None:
                self._refuse_while_loading(call.model_id, wait_s)
                answer = self._wait(ticket, deadline - time.monotonic(), caller_socket)
        except BaseException:
            self._cancel(ticket)
            raise
        if answer is None:
            self._cancel(ticket)
            raise DeadlineExceeded(
                f"{call.model_id} did not answer within {call.timeout_s:g} s. "
                "Ask for less at once, or raise CRANE_REQUEST_TIMEOUT."
            )
        if isinstance(answer, CraneError):
            raise answer
        return answer

    def load(self, model_id: str) -> None:
        """Load a model and wait until it is, for ``CRANE_LOAD_WAIT`` at most.

        Raises ``ModelUnavailable``, ``OutOfMemory`` and ``ModelLoading``.
        """
        self.control("load", model_id)
        deadline = time.monotonic() + self._load_wait_s
        while (model := self._model(model_id)).state is not State.READY:
            if model.state is State.UNLOADED and model.error:
                raise OutOfMemory(model.error, retry_after_s=10)
            if model.state not in (State.WAITING, State.LOADING):
                raise ModelUnavailable(
                    model.error or f"{model_id} was unloaded meanwhile.", retry_after_s=1
                )
            if time.monotonic() > deadline:
                self._refuse_while_loading(model_id, self._load_wait_s)
            time.sleep(LOOK_S)

    def unload(self, model_id: str) -> bool:
        """Unload a model once its calls are done; whether it is, after ``CRANE_LOAD_WAIT``."""
        self.control("unload", model_id)
        deadline = time.monotonic() + self._load_wait_s
        while self._model(model_id).state in (State.WAITING, State.LOADING, State.READY):
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
        return True

    def _model(self, model_id: str) -> ModelStatus:
        known = self.status()["models"].get(model_id, {})
        return ModelStatus(**known | {"state": State(known.get("state", State.UNLOADED))})

    def _refuse_while_loading(self, model_id: str, waited_s: float) -> None:
        try:
            model = self._model(model_id)
        except ModelUnavailable:  # too busy to say
            return
        if model.state is State.WAITING:
            raise OutOfMemory(
                f"There was no room for {model_id} in {waited_s:g} s. {model.error}",
                details={"state": State.WAITING},
                retry_after_s=10,
            )
        if model.state is State.LOADING:
            raise _still_loading(model_id, waited_s, model.progress)

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What ``Engine.status`` says; raises ``ModelUnavailable`` where no engine answers."""

    @abstractmethod
    def control(self, order: str, model_id: str) -> None:
        """Have the engine ``load`` or ``unload`` a model, and do not wait until it has.

        Raises ``ModelUnavailable`` where it cannot, or no engine answers.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine: an inline one finishes its work and unloads."""

    @abstractmethod
    def _submit(self, call: Call) -> Any:
        """Hand a call over; return what ``_wait`` and ``_cancel`` know it by."""

    @abstractmethod
    def _wait(
        self, ticket: Any, timeout_s: float, caller_socket: socket.socket | None
    ) -> Answer | CraneError | None:
        """Wait for a call's answer; None when the time is up. Raises ``ClientClosedRequest``."""

    @abstractmethod
    def _cancel(self, ticket: Any) -> None:
        """Say that nobody waits for a call any more."""


class InlineEngine(EngineClient):
    """An engine inside this process, for servers without ``gunicorn.conf.py``."""

    def __init__(self, config: Config, registry: Registry) -> None:
        super().__init__(config)
        self._engine = Engine(config, registry)
        self._lock = threading.Lock()
        self._begun = False

    def status(self) -> dict[str, Any]:
        self._begin()
        return self._engine.status()

    def control(self, order: str, model_id: str) -> None:
        self._begin()
        self._engine.control(order, model_id)

    def close(self) -> None:
        self._engine.close()

    def _begin(self) -> None:
        """Load what is pinned, once it is known that this process is to serve."""
        with self._lock:
            first, self._begun = not self._begun, True
        if first:
            self._engine.load_pinned()

    def _submit(self, call: Call) -> tuple[Job, SimpleQueue[Answer | CraneError]]:
        self._begin()
        answers: SimpleQueue[Answer | CraneError] = SimpleQueue()
        return self._engine.submit(call, answers.put), answers

    def _wait(
        self,
        ticket: tuple[Job, SimpleQueue[Answer | CraneError]],
        timeout_s: float,
        caller_socket: socket.socket | None,
    ) -> Answer | CraneError | None:
        until = time.monotonic() + timeout_s
        most_s = math.inf if caller_socket is None else LOOK_EVERY_S
        while (left_s := until - time.monotonic()) > 0:
            with suppress(Empty):
                return ticket[1].get(timeout=min(left_s, most_s))
            if caller_socket is not None and _has_hung_up(caller_socket):
                raise _caller_gone()
        return None

    def _cancel(self, ticket: tuple[Job, SimpleQueue[Answer | CraneError]]) -> None:
        ticket[0].cancel()


class RemoteEngine(EngineClient):
    """An engine in a process of its own, reached over a Unix socket.

    Each thread has a connection of its own with one call on it at a time, so calls wait for no
    lock and answers cannot cross. A call is cancelled by closing its connection; an engine that
    dies closes them all, which ends every wait at once.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.engine_socket is not None
        self._path: Path = config.engine_socket
        self._local = threading.local()

    def status(self) -> dict[str, Any]:
        shown: dict[str, Any] = wire.unpack(self._ask(None))
        return shown

    def control(self, order: str, model_id: str) -> None:
        answer = wire.unpack_answer(model_id, self._ask([order, model_id]))
        if isinstance(answer, CraneError):
            raise answer

    def _ask(self, message: list[str] | None) -> bytes:
        """What the engine says at once, whatever its models do.

        On a connection of its own, for this thread's may have a call on it.
        """
        with self._reach() as connection:
            try:
                connection.send_bytes(wire.pack(message))
            except OSError:
                raise _engine_gone() from None
            data = self._receive(connection, STATUS_TIMEOUT_S)
        if data is None:
            raise ModelUnavailable("The engine is too busy to say how it is.", retry_after_s=1)
        return data

    def close(self) -> None:
        """Nothing to do: the engine is its supervisor's to end."""

    def _submit(self, call: Call) -> tuple[Connection, str]:
        return self._send(call), call.request_id

    def _wait(
        self,
        ticket: tuple[Connection, str],
        timeout_s: float,
        caller_socket: socket.socket | None,
    ) -> Answer | CraneError | None:
        connection, call_id = ticket
        data = self._receive(connection, timeout_s, caller_socket)
        return None if data is None else wire.unpack_answer(call_id, data)

    def _cancel(self, ticket: tuple[Connection, str]) -> None:
        self._hang_up(ticket[0])

    def _send(self, call: Call) -> Connection:
        """Send on this thread's connection, or on a new one where its engine has ended."""
        data = wire.pack(call.to_wire())
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            try:
                connection.send_bytes(data)
            except OSError:  # nobody has read any of it, so it may be sent again
                self._hang_up(connection)
            else:
                return connection
        connection = self._local.connection = self._reach()
        try:
            connection.send_bytes(data)
        except OSError:
            self._hang_up(connection)
            raise _engine_gone() from None
        return connection

    def _receive(
        self,
        connection: Connection,
        timeout_s: float,
        caller_socket: socket.socket | None = None,
    ) -> bytes | None:
        # As ``Connection.poll``, which builds a selector each time and takes 20 µs more.
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if caller_socket is not None:
            poll.register(caller_socket, HUNG_UP)
        ready = poll.poll(max(0, math.ceil(timeout_s * 1e3)))  # below 0 is for ever
        if not ready:
            return None
        if all(fd != connection.fileno() for fd, _ in ready):
            raise _caller_gone()
        try:
            return connection.recv_bytes()
        except (EOFError, OSError):
            raise _engine_gone() from None

    def _hang_up(self, connection: Connection) -> None:
        connection.close()
        self._local.connection = None

    def _reach(self) -> Connection:
        """Connect to the engine, waiting a little for one that is just starting."""
        deadline = time.monotonic() + ENGINE_START_S
        while True:
            try:
                return connect_to(str(self._path), family="AF_UNIX")
            except OSError:
                if time.monotonic() > deadline:
                    raise ModelUnavailable("The engine is not running.", retry_after_s=5) from None
            time.sleep(0.02)


def _has_hung_up(caller_socket: socket.socket) -> bool:
    poll = select.poll()
    poll.register(caller_socket, HUNG_UP)
    return bool(poll.poll(0))


def _caller_gone() -> ClientClosedRequest:
    return ClientClosedRequest(
        "The connection, or its sending half, was closed before there was an answer. "
        "Keep both halves open until it is there."
    )


def _still_loading(model_id: str, waited_s: float, progress: dict[str, Any] | None) -> ModelLoading:
    left_s, far = None, ""
    if progress is not None:
        left_s = progress["left_s"]
        done, total = shown_size(progress["done_bytes"]), shown_size(progress["total_bytes"])
        far = f" ({done} of {total} {STAGES[progress['stage']]})"
    retry_after_s = RETRY_S if left_s is None else min(max(left_s, 1.0), LONGEST_RETRY_S)
    return ModelLoading(
        f"{model_id} is still loading after {waited_s:g} s{far}; it goes on loading, so try again "
        f"in {math.ceil(retry_after_s)} s.",
        details={"state": State.LOADING, "progress": progress},
        retry_after_s=retry_after_s,
    )


def _engine_gone() -> ModelUnavailable:
    return ModelUnavailable(
        "The engine stopped while it had your call, and is being started again.", retry_after_s=1
    )


def connect(config: Config, registry: Registry) -> EngineClient:
    """The engine that ``CRANE_ENGINE`` asks for."""
    if config.engine == "process":
        return RemoteEngine(config)
    return InlineEngine(config, registry)
