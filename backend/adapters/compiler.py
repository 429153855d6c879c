"""Compiles JSON schemas beside the models' threads: tried out in a process, then in a thread.

A schema is a program that a caller sends: most take milliseconds, but 1 KB can take hours and all
of the memory. So each is tried out in a process with limits (``backend.schema_process``) before
this process, which cannot end a library's call, compiles it too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend import schema_process
from backend.errors import CraneError, InternalError, Overloaded
from backend.schema_process import ANSWER, LENGTH, WALL_S

logger = logging.getLogger("crane.engine")

# Two, so that one caller's schemas, of which one at a time is compiled, hold up nobody else's.
MAX_PROCESSES = 2
IDLE_S = 60.0  # after which a process ends that has nothing to do
MAX_KNOWN = 4096  # schemas whose outcome is remembered


class SchemaRefused(Exception):
    """A schema cannot be used; the text says why, and what to do."""


class Abandoned(Exception):
    """Nobody waited for a schema any more when its turn came."""


@dataclass(eq=False, slots=True)
class _Work:
    schema: str
    build: Callable[[int], Any]
    wanted: Callable[[], bool]
    done: Future[Any] = field(default_factory=Future)


class _Process:
    """One process that tries schemas out, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def check(self, schema: bytes) -> tuple[int, str]:
        """The bytes of a schema's grammar, and what is wrong with it, or nothing.

        Raises ``Overloaded`` where time did not do.
        """
        for _ in range(2):  # it may have ended, or been ended, after its last answer
            process, link = self._start()
            try:
                link.sendall(LENGTH.pack(len(schema)) + schema)
                size, length = ANSWER.unpack(_receive(link, ANSWER.size))
                return size, _receive(link, length).decode()
            except TimeoutError:
                process.kill()
                self.end()
                raise _too_busy() from None
            except (EOFError, OSError):
                self.end()
            if process.returncode not in (0, -signal.SIGKILL):
                break
        return 0, self._why(process.returncode)

    def end(self) -> None:
        if self._process is None or self._socket is None:
            return
        self._socket.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if self._process is not None and self._socket is not None:
            return self._process, self._socket
        mine, its = socket.socketpair()
        mine.settimeout(WALL_S + 5)  # above its own limit
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", schema_process.__name__],
                stdin=its.fileno(),
                stdout=its.fileno(),
                stderr=subprocess.DEVNULL,
                cwd=Path(schema_process.__file__).parents[1],  # where the package is
                # What a caller wrote is compiled in there, so no secrets are.
                env={
                    name: os.environ[name] for name in os.environ if not name.startswith("CRANE_")
                },
            )
        self._socket = mine
        return self._process, mine

    def _why(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return schema_process.too_slow()
        if code == -signal.SIGALRM:
            raise _too_busy()
        if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):  # how Rust runs out of it
            return schema_process.too_much()
        logger.error("the process that tries schemas out ended with %s", code)
        raise _too_busy() if code == -signal.SIGKILL else InternalError()


class Compiler:
    """Compiles schemas in threads of its own, fairly between callers."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._queues: dict[str, deque[_Work]] = {}  # in the order of the callers' turns
        self._busy: set[str] = set()  # callers, each with one schema at a time
        self._threads = self._idle = 0
        self._known: OrderedDict[bytes, tuple[int, str]] = OrderedDict()  # of ``check``, by digest

    def submit(
        self, schema: str, build: Callable[[int], Any], *, caller: str, wanted: Callable[[], bool]
    ) -> Future[Any]:
        """Have ``build`` run, in another thread, with the bytes of the schema that was tried out.

        The future has its result; or ``SchemaRefused``, ``Abandoned`` where nobody ``wanted`` it
        any more, or a ``CraneError``.
        """
        work = _Work(schema, build, wanted)
        with self._lock:
            self._queues.setdefault(caller, deque()).append(work)
            self._call_thread()
        return work.done

    def _call_thread(self) -> None:
        """Have a thread at work if there is some; the caller holds the lock."""
        if self._next() is None:
            return
        if self._idle:
            self._lock.notify()
        elif self._threads < MAX_PROCESSES:
            self._threads += 1
            threading.Thread(target=self._run, name="schemas", daemon=True).start()

    def _run(self) -> None:
        process = _Process()
        try:
            while (taken := self._take()) is not None:
                caller, work = taken
                try:
                    self._do(work, process)
                finally:
                    with self._lock:
                        self._busy.discard(caller)
        finally:
            process.end()

    def _take(self) -> tuple[str, _Work] | None:
        """The next schema of the caller whose turn it is; None after some time without any."""
        with self._lock:
            while (caller := self._next()) is None:
                self._idle += 1
                came = self._lock.wait(IDLE_S)
                self._idle -= 1
                if not came and self._next() is None:
                    self._threads -= 1
                    return None
            queue = self._queues.pop(caller)
            work = queue.popleft()
            if queue:
                self._queues[caller] = queue  # behind all others
            self._busy.add(caller)
            self._call_thread()  # for others
            return caller, work

    def _next(self) -> str | None:
        return next((caller for caller in self._queues if caller not in self._busy), None)

    def _do(self, work: _Work, process: _Process) -> None:
        try:
            if not work.wanted():
                raise Abandoned
            size, fault = self._try(work.schema.encode(), process)
            if fault:
                raise SchemaRefused(fault)
            result = work.build(size)
        except (SchemaRefused, Abandoned, CraneError) as error:
            work.done.set_exception(error)
        except BaseException:  # every caller has an answer
            logger.exception("a schema could not be compiled")
            work.done.set_exception(InternalError())
        else:
            work.done.set_result(result)

    def _try(self, schema: bytes, process: _Process) -> tuple[int, str]:
        """As ``check``, once for each schema."""
        digest = hashlib.sha256(schema).digest()
        with self._lock:
            known = self._known.get(digest)
        if known is None:
            known = process.check(schema)
        with self._lock:
            self._known[digest] = known
            self._known.move_to_end(digest)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return known


def _receive(link: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        if not (more := link.recv(count - len(data))):
            raise EOFError
        data += more
    return bytes(data)


def _too_busy() -> Overloaded:
    return Overloaded(
        f"The schema was not compiled within {WALL_S:g} s, as others use the cores. Try again.",
        retry_after_s=5,
    )


_compiler = Compiler()
submit = _compiler.submit
