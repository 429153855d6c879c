"""The engine's face in an HTTP worker: hand a call over, wait for its answer, and no longer."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import zmq

from backend.config import Config
from backend.engine import wire
from backend.engine.calls import Answer, Call, Job, State
from backend.engine.engine import Engine
from backend.errors import CraneError, DeadlineExceeded, ModelLoading, ModelUnavailable
from backend.registry import Registry

ENGINE_START_S = (
    5.0  # a restarted engine listens after about half a second; loaded hosts are slower
)
STATUS_TIMEOUT_S = 2.0


class EngineClient(ABC):
    """Runs calls on an engine, wherever it is."""

    def __init__(self, config: Config) -> None:
        self._load_wait_s = config.load_wait_s

    def run(self, call: Call) -> Answer:
        """Return the answer, or raise the error that the caller shall see.

        ``DeadlineExceeded`` after ``call.timeout_s``; ``ModelLoading`` where the model is still
        loading after ``CRANE_LOAD_WAIT``. Whoever stops waiting frees the call's place.
        """
        deadline = time.monotonic() + call.timeout_s
        ticket = self._submit(call)
        try:
            answer = self._wait(ticket, min(self._load_wait_s, call.timeout_s))
            if answer is None and self._load_wait_s < call.timeout_s:
                self._refuse_while_loading(call.model_id)
                answer = self._wait(ticket, deadline - time.monotonic())
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

    def _refuse_while_loading(self, model_id: str) -> None:
        model = self.status()["models"].get(model_id, {})
        if model.get("state") == State.LOADING:
            raise ModelLoading(
                f"{model_id} is still loading after {self._load_wait_s:g} s; "
                "it goes on loading, so try again later.",
                details={"state": State.LOADING},
                retry_after_s=10,
            )

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """What ``Engine.status`` says; raises ``ModelUnavailable`` where no engine answers."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine: an inline one finishes its work and unloads."""

    @abstractmethod
    def _submit(self, call: Call) -> Any:
        """Hand a call over; return what ``_wait`` and ``_cancel`` know it by."""

    @abstractmethod
    def _wait(self, ticket: Any, timeout_s: float) -> Answer | CraneError | None:
        """Wait for a call's answer; None when the time is up."""

    @abstractmethod
    def _cancel(self, ticket: Any) -> None:
        """Say that nobody waits for a call any more."""


class InlineEngine(EngineClient):
    """An engine inside this process, for servers without ``gunicorn.conf.py``."""

    def __init__(self, config: Config, registry: Registry) -> None:
        super().__init__(config)
        self._engine = Engine(config, registry)

    def status(self) -> dict[str, Any]:
        return self._engine.status()

    def close(self) -> None:
        self._engine.close()

    def _submit(self, call: Call) -> Job:
        return self._engine.submit(call)

    def _wait(self, ticket: Job, timeout_s: float) -> Answer | CraneError | None:
        done, _ = wait([ticket.future], timeout_s)
        if not done:
            return None
        error = ticket.future.exception()
        if error is None:
            return ticket.future.result()
        if not isinstance(error, CraneError):
            raise error
        return error

    def _cancel(self, ticket: Job) -> None:
        ticket.cancel()


class RemoteEngine(EngineClient):
    """An engine in a process of its own, reached over a Unix socket.

    Each thread has a socket of its own, so calls wait for no lock and no other thread. All watch
    one connection to the engine's lifeline: its end is the engine's, and ends every wait at once.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.engine_socket is not None
        self._path: Path = config.engine_socket
        self._local = threading.local()
        self._lock = threading.Lock()  # so that one thread connects and the others use it
        self._lifeline: socket.socket | None = None

    def status(self) -> dict[str, Any]:
        connection = self._connection()
        status = connection.ask(wire.STATUS, None, STATUS_TIMEOUT_S)
        if status is None:
            raise ModelUnavailable("The engine is too busy to say how it is.", retry_after_s=1)
        shown: dict[str, Any] = wire.unpack(status)
        return shown

    def close(self) -> None:
        """Nothing to do: the engine is its supervisor's to end."""

    def _submit(self, call: Call) -> tuple[_Connection, bytes]:
        connection = self._connection()
        return connection, connection.send(wire.RUN, wire.pack(call.to_wire()))

    def _wait(
        self, ticket: tuple[_Connection, bytes], timeout_s: float
    ) -> Answer | CraneError | None:
        connection, call_id = ticket
        data = connection.receive(call_id, timeout_s)
        return None if data is None else wire.unpack_answer(data)

    def _cancel(self, ticket: tuple[_Connection, bytes]) -> None:
        connection, call_id = ticket
        connection.cancel(call_id)

    def _connection(self) -> _Connection:
        lifeline = self._alive()
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is None or connection.lifeline is not lifeline:
            connection = self._local.connection = _Connection(self._path, lifeline)
        return connection

    def _alive(self) -> socket.socket:
        """The lifeline of a living engine, waiting a little for one that is just starting."""
        deadline = time.monotonic() + ENGINE_START_S
        while True:
            with self._lock:
                if self._lifeline is None or _ended(self._lifeline):
                    self._lifeline = _reach(wire.lifeline_of(self._path))
                if self._lifeline is not None:
                    return self._lifeline
            if time.monotonic() > deadline:
                raise ModelUnavailable("The engine is not running.", retry_after_s=5)
            time.sleep(0.02)


class _Connection:
    """One thread's socket to one life of the engine."""

    _ids = itertools.count()

    def __init__(self, path: Path, lifeline: socket.socket) -> None:
        self.lifeline = lifeline
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)  # what a dead engine never read dies with it
        self._socket.connect(f"ipc://{path}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(lifeline, zmq.POLLIN)

    def send(self, kind: bytes, data: bytes | None) -> bytes:
        call_id = b"%d" % next(self._ids)
        self._socket.send_multipart((kind, call_id) if data is None else (kind, call_id, data))
        return call_id

    def receive(self, call_id: bytes, timeout_s: float) -> bytes | None:
        """Wait for the answer to ``call_id``, passing over late ones to calls given up."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_ms = max(0, round((deadline - time.monotonic()) * 1e3))
            ready = dict(self._poller.poll(left_ms))
            if self._socket in ready:
                answered, data = self._socket.recv_multipart()
                if answered == call_id:
                    return bytes(data)
            elif ready:
                raise _engine_gone()
            elif not left_ms:
                return None

    def ask(self, kind: bytes, data: bytes | None, timeout_s: float) -> bytes | None:
        return self.receive(self.send(kind, data), timeout_s)

    def cancel(self, call_id: bytes) -> None:
        if not _ended(self.lifeline):
            self._socket.send_multipart((wire.CANCEL, call_id))


def _reach(path: Path) -> socket.socket | None:
    lifeline = socket.socket(socket.AF_UNIX)
    try:
        lifeline.connect(str(path))
    except OSError:
        lifeline.close()
        return None
    lifeline.setblocking(False)
    return lifeline


def _ended(lifeline: socket.socket) -> bool:
    try:
        return lifeline.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _engine_gone() -> ModelUnavailable:
    return ModelUnavailable(
        "The engine stopped while it had your call, and is being started again.", retry_after_s=1
    )


def connect(config: Config, registry: Registry) -> EngineClient:
    """The engine that ``CRANE_ENGINE`` asks for."""
    if config.engine == "process":
        return RemoteEngine(config)
    return InlineEngine(config, registry)
