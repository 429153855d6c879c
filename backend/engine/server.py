"""An engine as a process: calls come in over a Unix socket, answers go back the same way.

Run as ``python -m backend.engine.server 0``, with its place in ``CRANE_DEVICES``. Its standard
input is its lifeline: when that ends, the process that started it is gone or wants it gone, and it
finishes its work and exits. Signals to the whole group (Ctrl-C, a service manager's SIGTERM) are
for the HTTP workers, which drain first.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial

from backend import logs
from backend.channel import Channel
from backend.config import Config
from backend.engine import file_lock, wire
from backend.engine.calls import Answer, Call, Event
from backend.engine.engine import CLOSE_TIMEOUT_S, Engine
from backend.engine.jobs import Job
from backend.errors import CraneError, InternalError, ModelUnavailable
from backend.messages import BadMessage, Part
from backend.registry import Registry

logger = logging.getLogger("crane.engine")

BROKEN = 70  # the exit status; EX_SOFTWARE of sysexits.h
# For the calls of other models, when one hangs; their callers may try again on the next engine.
DRAIN_S, DRAIN_LOOK_S = 5.0, 0.1
UNSENT_S = 2.0  # past that, for answers that callers are still taking
ACCEPT_PAUSE_S = 0.05  # where no connection can be taken for now


class Server:
    """Hands what callers send to an engine, and its answers back.

    One thread owns all connections. What a model's thread has to tell it sends itself: to wake a
    thread for each event, and to wait for the interpreter while it runs, takes a tenth of the
    throughput of 64 callers on two cores. What a connection does not take at once is left to the
    one that owns it.

    Whatever comes over a connection, the worst that it does is to end that connection.
    """

    def __init__(self, config: Config, index: int) -> None:
        """``index`` says which of ``CRANE_DEVICES`` the engine has."""
        self._engine = Engine(
            config, Registry.load(config.models), on_defunct=self._break, index=index
        )
        self._max_message = config.max_message
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(config.engine_sockets[index]))
        self._listener.listen(socket.SOMAXCONN)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._unsent: deque[Channel] = deque()  # that have not taken all yet
        # So that no connection is closed by one thread while another writes to it.
        self._sending = threading.Lock()
        self._woken, self._wake = socket.socketpair()
        self._woken_up = False
        self._jobs: dict[Channel, Job | None] = {}
        self._broken = self._draining = False
        self._handed_back = False  # from then on models' threads send nothing
        self._ends_at = math.inf

    def serve(self) -> int:
        """Answer until ``close``, or until a model broke that only a new process can mend.

        Returns the exit status that says which.
        """
        self._engine.import_libraries()
        self._engine.load_pinned()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        while not self._is_over():
            for key, events in self._selector.select(DRAIN_LOOK_S if self._draining else None):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                    self._woken_up = False
                    self._send_rests()
                elif isinstance(key.fileobj, Channel):
                    self._serve(key.fileobj, events)
        self._hand_back()
        return BROKEN if self._broken else 0

    def close(self) -> None:
        """Finish what is queued and end ``serve``, from any thread."""
        self._draining = True
        self._engine.close()
        self._ends_at = min(self._ends_at, time.monotonic())
        self._wake_up()

    def _break(self, at_once: bool) -> None:
        """End ``serve``, so that another engine takes over.

        Whoever has an answer by then gets it; the others are told by their connections' end.
        Unless ``at_once``, the calls that other models have get some time, and new ones none.
        """
        self._broken = self._draining = True
        self._ends_at = min(self._ends_at, time.monotonic() + (0 if at_once else DRAIN_S))
        self._wake_up()

    def _is_over(self) -> bool:
        """Whether the time is up, or no call is left once a model broke; and answers are sent."""
        if not self._draining:
            return False
        now = time.monotonic()
        over = now >= self._ends_at or (self._broken and not any(self._jobs.values()))
        unsent = self._unsent or any(caller.has_unsent for caller in self._jobs)
        return over and (not unsent or now >= self._ends_at + UNSENT_S)

    def _hand_back(self) -> None:
        """Before the end: have other engines do the calls of which nothing has begun here.

        Those that are on their way are read, and what comes later is refused by the system.
        """
        self._listener.shutdown(socket.SHUT_RD)
        while self._accept():
            pass
        with self._sending:
            self._handed_back = True
        self._send_rests()
        for caller, job in list(self._jobs.items()):
            caller.take_no_more()
            if job is None:
                while not caller.closed:  # until its end, which comes after what was sent before
                    self._serve(caller, selectors.EVENT_READ)
                continue
            job.cancel()  # first, or it may yet begin
            if job.usage is None:
                self._refuse(caller, job.call.request_id)

    def _refuse(self, caller: Channel, call_id: str) -> None:
        """Have another engine do a call, of which nothing has begun and nothing will."""
        self._send(caller, wire.pack_answer(call_id, Event(wire.ENDING, {})))

    def _wake_up(self) -> None:
        if self._woken_up:  # and that was not read yet: whatever is there by then will be seen
            return
        self._woken_up = True
        self._wake.send(b"\0")

    def _accept(self) -> bool:
        """Take a connection, if there is one."""
        try:
            caller, _ = self._listener.accept()
        except OSError:  # the other end has gone again, or this process has too many files open
            if not self._draining:
                logger.warning("a connection could not be taken", exc_info=True)
                time.sleep(ACCEPT_PAUSE_S)
            return False
        channel = Channel(caller, max_bytes=self._max_message)
        self._jobs[channel] = None
        self._selector.register(channel, selectors.EVENT_READ)
        return True

    def _serve(self, caller: Channel, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                with self._sending:
                    flushed = caller.flush()
                if flushed:
                    self._selector.modify(caller, selectors.EVENT_READ)
            if not events & selectors.EVENT_READ:
                return
            for message in caller.receive():
                self._take(caller, wire.read_request(message))
        except (EOFError, OSError):  # the caller gave up, or is gone
            self._drop(caller)
        except BadMessage as error:
            logger.warning("a connection is closed for what came over it: %s", error)
            self._drop(caller)
        except Exception:  # memory may run out, too
            logger.exception("a connection is closed, for a message could not be served")
            self._drop(caller)

    def _take(self, caller: Channel, request: Call | tuple[str, str] | None) -> None:
        if caller.closed:  # by a message before
            return
        if request is None:
            self._send(caller, wire.pack({**self._engine.status(), "draining": self._draining}))
        elif isinstance(request, tuple) and request[0] == wire.BEGUN:
            if job := self._jobs[caller]:  # given up; cancelled first, or it may yet begin
                job.cancel()
            told = Event(wire.BEGUN, {"usage": job.usage if job else {}})
            self._send(caller, wire.pack_answer(request[1], told))
        elif isinstance(request, tuple):
            self._order(caller, *request)
        elif self._jobs[caller] is None:
            self._run(caller, request)
        else:
            raise BadMessage("it is a call, and there is one on this connection already")

    def _run(self, caller: Channel, call: Call) -> None:
        if self._draining:
            self._refuse(caller, call.request_id)
            return
        try:
            job = self._engine.submit(call, partial(self._tell, caller, call.request_id))
            with self._sending:  # which its answer is sent with
                if not job.ended:
                    self._jobs[caller] = job
        except CraneError as error:
            self._send(caller, wire.pack_answer(call.request_id, error))
        except Exception:
            logger.exception("a call could not be queued")
            self._send(caller, wire.pack_answer(call.request_id, InternalError()))

    def _send_rests(self) -> None:
        while self._unsent:
            caller = self._unsent.popleft()
            if not caller.closed:
                self._selector.modify(caller, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _order(self, caller: Channel, order: str, model_id: str) -> None:
        answer: CraneError | None = None
        try:
            if self._draining and order != "unload":
                raise ModelUnavailable("The engine is being replaced.", retry_after_s=DRAIN_S)
            self._engine.control(order, model_id)
        except CraneError as error:
            answer = error
        except Exception:
            logger.exception("an order could not be carried out")
            answer = InternalError()
        self._send(caller, wire.pack_answer(model_id, answer))

    def _tell(self, caller: Channel, call_id: str, told: Event | Answer | CraneError) -> None:
        """Send an event or an answer, from the thread of the model that it is of."""
        try:
            self._send_told(caller, call_id, told)
        except Exception:
            logger.exception("an output could not be sent")
            if not isinstance(told, Event):
                self._send_told(caller, call_id, InternalError())

    def _send_told(self, caller: Channel, call_id: str, told: Event | Answer | CraneError) -> None:
        """A connection that has ended is for the thread to see that owns it."""
        data = wire.pack_answer(call_id, told)
        with self._sending, suppress(OSError):
            if caller.closed or self._handed_back:
                return
            if not isinstance(told, Event):
                self._jobs[caller] = None  # before its caller can send another call
            if caller.send(data):
                return
        self._unsent.append(caller)
        self._wake_up()

    def _send(self, caller: Channel, message: list[Part]) -> None:
        """Send what the caller takes at once, and the rest when it does: nobody waits for it.

        Raises ``MessageTooLarge``.
        """
        try:
            with self._sending:
                sent = caller.send(message)
            if not sent:
                self._selector.modify(caller, selectors.EVENT_READ | selectors.EVENT_WRITE)
        except OSError:
            self._drop(caller)

    def _drop(self, caller: Channel) -> None:
        if caller.closed:  # one look at the sockets may tell of its end twice
            return
        self._selector.unregister(caller)
        with self._sending:
            job = self._jobs.pop(caller)
            caller.close()
        if job:
            job.cancel()


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    # A thread with an answer should not wait 5 ms, Python's default, for the model's thread to
    # let go of the interpreter.
    sys.setswitchinterval(0.0005)
    # Each thread of each HTTP worker has a connection; the usual soft limit is 1,024 files.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    config = Config.from_env()
    logs.set_up(config.log_level, config.log_format)
    index = int(sys.argv[1])
    path = config.engine_sockets[index]
    # The engine before this one may still be at its last calls, where its supervisor was killed.
    lock = file_lock.succeed(path.with_name(f"{path.name}.lock"), CLOSE_TIMEOUT_S + 10)
    path.unlink(missing_ok=True)  # left by an engine that was killed
    server = Server(config, index)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        # Nothing may hold this process up once its parent is gone, whatever a model is doing.
        threading.Timer(CLOSE_TIMEOUT_S + 5, os._exit, (1,)).start()
        server.close()

    threading.Thread(target=end_with_parent, name="lifeline", daemon=True).start()
    status = server.serve()
    path.unlink(missing_ok=True)
    lock.close()
    os._exit(status)  # without waiting for the threads of a model that did not unload


if __name__ == "__main__":
    main()
