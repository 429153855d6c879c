"""An engine as a process: calls come in over a Unix socket, answers go out, matched by id.

Run as ``python -m backend.engine.server``. Its standard input is its lifeline: when that ends, the
process that started it is gone or wants it gone, and it finishes its work and exits. Signals to
the whole group (Ctrl-C, a service manager's SIGTERM) are for the HTTP workers, which drain first.
"""

from __future__ import annotations

import logging
import logging.config
import os
import signal
import socket
import sys
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import zmq

from backend.config import Config
from backend.engine import wire
from backend.engine.calls import Answer, Call, Job
from backend.engine.engine import CLOSE_TIMEOUT_S, Engine
from backend.errors import CraneError, InternalError
from backend.logs import logging_config
from backend.registry import Registry

logger = logging.getLogger("crane.engine")


class Server:
    """Hands what comes over the socket to an engine, and its answers back.

    One thread owns the ZeroMQ socket. The models' threads leave their answers in ``_outbox`` and
    wake it through a socket pair, since a ZeroMQ socket must stay with its thread.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._outbox: deque[tuple[bytes, bytes, Answer | CraneError]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._jobs: dict[tuple[bytes, bytes], Job] = {}
        self._stopping = False

    def serve(self) -> None:
        """Answer until ``stop``."""
        self._router.bind(f"ipc://{self._path}")
        # Callers connect here to learn of this process's end; nobody ever has to accept them.
        alive = socket.socket(socket.AF_UNIX)
        alive.bind(str(wire.lifeline_of(self._path)))
        alive.listen(socket.SOMAXCONN)
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll())
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
            self._send_answers()
            if self._router in ready:
                self._receive()

    def stop(self) -> None:
        """End ``serve``, from any thread."""
        self._stopping = True
        self._wake_up()

    def _wake_up(self) -> None:
        # Full means wake-ups that were not read yet, and one more would say nothing new.
        with suppress(BlockingIOError):
            self._wake.send(b"\0")

    def _send_answers(self) -> None:
        while self._outbox:
            caller, call_id, answer = self._outbox.popleft()
            self._jobs.pop((caller, call_id), None)
            try:
                data = wire.pack_answer(answer)
            except Exception:
                logger.exception("an output could not be sent")
                data = wire.pack_answer(InternalError())
            self._send(caller, call_id, data)

    def _receive(self) -> None:
        while True:
            try:
                caller, kind, call_id, *rest = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if kind == wire.RUN:
                self._run(caller, call_id, rest[0])
            elif kind == wire.CANCEL:
                if job := self._jobs.pop((caller, call_id), None):
                    job.cancel()
            elif kind == wire.STATUS:
                self._send(caller, call_id, wire.pack(self._engine.status()))

    def _run(self, caller: bytes, call_id: bytes, data: bytes) -> None:
        try:
            job = self._engine.submit(Call(**wire.unpack(data)))
        except CraneError as error:
            self._send(caller, call_id, wire.pack_answer(error))
            return
        except Exception:
            logger.exception("a call could not be queued")
            self._send(caller, call_id, wire.pack_answer(InternalError()))
            return
        self._jobs[caller, call_id] = job

        def answer(future: Future[Answer]) -> None:
            error = future.exception()
            known = error if isinstance(error, CraneError) else InternalError()
            self._outbox.append((caller, call_id, known if error else future.result()))
            self._wake_up()

        job.future.add_done_callback(answer)

    def _send(self, caller: bytes, call_id: bytes, data: bytes) -> None:
        # A caller who is gone is dropped by the ROUTER in silence, which is right: nobody waits.
        self._router.send_multipart((caller, call_id, data))


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    # A thread with an answer should not wait 5 ms, Python's default, for the model's thread to
    # let go of the interpreter.
    sys.setswitchinterval(0.0005)
    config = Config.from_env()
    logging.config.dictConfig(logging_config(config.log_level, config.log_format))
    assert config.engine_socket is not None
    path = config.engine_socket
    for stale in (path, wire.lifeline_of(path)):
        stale.unlink(missing_ok=True)
    engine = Engine(config, Registry.load(config.models))
    server = Server(engine, path)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        # Nothing may hold this process up once its parent is gone, whatever a model is doing.
        threading.Timer(CLOSE_TIMEOUT_S + 5, os._exit, (1,)).start()
        engine.close()
        server.stop()

    threading.Thread(target=end_with_parent, name="lifeline", daemon=True).start()
    server.serve()
    for mine in (path, wire.lifeline_of(path)):
        mine.unlink(missing_ok=True)
    os._exit(0)  # without waiting for the threads of a model that did not unload


if __name__ == "__main__":
    main()
