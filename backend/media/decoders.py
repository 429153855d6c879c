"""Processes that decode media for the threads of an HTTP worker, and can be ended."""

from __future__ import annotations

import atexit
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from backend.channel import Channel
from backend.config import Config
from backend.cores import all_cores
from backend.errors import ClientClosedRequest, DeadlineExceeded
from backend.media import Refused
from backend.messages import BadMessage, Part, pack, unpack

logger = logging.getLogger("crane.media")

MAX_DECODERS = 4  # of an HTTP worker; each has 35 MB of its own while idle
IDLE_S = 60.0  # after which one is ended, when another has ended its work
GRACE_S = 1.0  # after which a decoder ends itself, should nobody have ended it
LOOK_S = 0.25  # between looks at the caller, while its turn has not come
# What libraries map before they decode anything, and what they need beside the pixels.
BASE_MEMORY = 2**30

_HERE = Path(__file__).resolve().parents[2]
# The environment that a decoder gets: no secret is in reach of what a hostile file makes of it.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "TMPDIR", "VIRTUAL_ENV")
_HUNG_UP: int = getattr(select, "POLLRDHUP", select.POLLHUP)


class Caller:
    """For whom media are decoded: until when, on whose account, and the connection, if known."""

    def __init__(self, deadline: float, name: str = "", connection: socket.socket | None = None):
        """``deadline`` is on ``time.monotonic()``'s clock."""
        self.deadline, self.name, self.connection = deadline, name, connection

    def left_s(self) -> float:
        """Seconds to the deadline; raises ``DeadlineExceeded`` at it."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(
                "The media of this call could not be read in time. Send fewer or smaller ones."
            )
        return left_s

    def check(self) -> None:
        """Raise ``DeadlineExceeded`` or ``ClientClosedRequest`` where nobody waits any more."""
        self.left_s()
        if self.connection is not None:
            poll = select.poll()
            poll.register(self.connection, _HUNG_UP)
            if poll.poll(0):
                raise _gone()


def _gone() -> ClientClosedRequest:
    return ClientClosedRequest("The connection was closed before the media were read.")


class _Process:
    """One decoder, from our side."""

    def __init__(self, memory: int, max_message: int) -> None:
        ours, its = socket.socketpair()
        with its:
            environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            environment |= {"PYTHONPATH": str(_HERE), "OPENBLAS_NUM_THREADS": "1"}
            # Started by exec, and not by a thread that may end before it: nothing of this process
            # is in it, and it ends when its socket does.
            with all_cores():
                self._popen = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "backend.media.decoder"),
                        *(str(its.fileno()), str(memory)),
                    ],
                    pass_fds=[its.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        self._channel = Channel(ours, max_bytes=max_message)
        self.pid = self._popen.pid
        self.used_at = time.monotonic()

    def end(self) -> None:
        """End it at once, whatever it does."""
        self._channel.close()
        self._popen.kill()
        self._popen.wait()

    def ask(
        self, request: dict[str, Any], claim: Callable[..., None], caller: Caller
    ) -> tuple[dict[str, Any], Exception | None]:
        """Its answer to a request, and the error where a claim was not granted.

        Raises what ``caller.check`` does, ``OSError``, ``EOFError``, ``BadMessage``.
        """
        self._channel.send(pack({**request, "timeout_s": caller.left_s() + GRACE_S}))
        denied: Exception | None = None
        while True:
            for message in self._receive(caller):
                answer = unpack(message)
                if type(answer) is not dict:
                    raise BadMessage("it is no answer of a decoder")
                if "claim" not in answer:
                    return answer, denied
                amounts = _amounts(answer["claim"])
                try:
                    claim(*amounts)
                except Exception as error:  # the decoder gives its file up, and goes on
                    denied = error
                self._channel.send(pack(denied is None))

    def _receive(self, caller: Caller) -> list[list[Part]]:
        poll = select.poll()
        if caller.connection is not None:
            poll.register(caller.connection, _HUNG_UP)
        waits = not self._channel.flush()
        poll.register(self._channel, select.POLLIN | (select.POLLOUT if waits else 0))
        ready = poll.poll(caller.left_s() * 1e3)
        if ready and all(fd != self._channel.fileno() for fd, _ in ready):
            raise _gone()
        return self._channel.receive()  # of what has come, which may be nothing


def _amounts(value: Any) -> list[int]:
    if type(value) is not list or any(type(one) is not int or one < 0 for one in value):
        raise BadMessage("it claims what is no amount")
    return value


def decoders_for(config: Config) -> Decoders:
    """This process's decoders for some settings, whoever asks."""
    # A picture may be there as coefficients, as pixels of four channels and as what becomes of
    # them; frames as a list and as an array; a sound as it grows.
    memory = BASE_MEMORY + 24 * config.max_pixels + config.max_media_bytes
    return _decoders(memory, config.max_message)


@lru_cache
def _decoders(memory: int, max_message: int) -> Decoders:
    decoders = Decoders(memory=memory, max_message=max_message)
    atexit.register(decoders.close)
    return decoders


class _Turn:
    """A thread that waits for a decoder."""

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.has_come = threading.Event()


class Decoders:
    """Up to ``MAX_DECODERS`` processes, started as they are needed.

    One caller's files never hold all of them: the last is kept for callers that hold none. Of
    those who wait, whoever holds fewest is next.
    """

    def __init__(self, *, memory: int, max_message: int) -> None:
        """``memory`` is what each may map, in bytes."""
        self._memory, self._max_message = memory, max_message
        self._lock = threading.Lock()  # so that no decoder is given twice
        self._idle: list[_Process] = []
        self._held: Counter[str] = Counter()  # by caller
        self._waiting: list[_Turn] = []

    def decode(
        self,
        kind: str,
        data: bytes,
        *,
        claim: Callable[..., None],
        caller: Caller,
        audio_left_s: float = 0.0,
        **options: Any,
    ) -> Any:
        """What ``decode_image``, ``decode_audio`` or ``decode_video`` returns for these options.

        Of an audio file whose length is not known, ``claim`` may be asked for up to half a minute
        more than it has, but not for more than ``audio_left_s``. Raises ``Refused``, also where the
        file made the decoder break; what ``claim`` raises; ``DeadlineExceeded``;
        ``ClientClosedRequest``.
        """
        request = {
            "kind": kind,
            "options": options,
            "data": np.frombuffer(data, np.uint8),
            "audio_left_s": audio_left_s,
        }
        with self._turn(caller):
            process = self._take()
            try:
                answer, denied = process.ask(request, claim, caller)
            except (OSError, EOFError, BadMessage) as error:
                process.end()
                logger.warning("a decoder broke over a file: %r", error)
                raise Refused("could not be decoded") from None
            except BaseException:  # nobody waits for it any more
                process.end()
                raise
            self._give_back(process)
        if denied is not None:
            raise denied
        if "refused" in answer:
            raise Refused(str(answer["refused"]), too_large=answer.get("too_large") is True)
        return answer.get("result")

    def close(self) -> None:
        """End those that are idle; the others end with their work, or with this process."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    @contextmanager
    def _turn(self, caller: Caller) -> Iterator[None]:
        turn = _Turn(caller.name)
        with self._lock:
            self._waiting.append(turn)
            self._next_turns()
        try:
            while not turn.has_come.wait(min(LOOK_S, caller.left_s())):
                caller.check()
            yield
        finally:
            with self._lock:
                if turn.has_come.is_set():
                    self._held[turn.caller] -= 1
                    if not self._held[turn.caller]:
                        del self._held[turn.caller]
                else:
                    self._waiting.remove(turn)
                self._next_turns()

    def _next_turns(self) -> None:
        """Let those begin who may; the caller holds the lock."""
        while self._waiting:
            free = MAX_DECODERS - self._held.total()
            turn = min(self._waiting, key=lambda turn: self._held[turn.caller])
            if free < 1 or (free == 1 and self._held[turn.caller]):
                return
            self._waiting.remove(turn)
            self._held[turn.caller] += 1
            turn.has_come.set()

    def _take(self) -> _Process:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Process(self._memory, self._max_message)

    def _give_back(self, process: _Process) -> None:
        now = process.used_at = time.monotonic()
        with self._lock:
            old = [one for one in self._idle if now - one.used_at > IDLE_S]
            self._idle = [one for one in self._idle if now - one.used_at <= IDLE_S]
            self._idle.append(process)
        for one in old:
            one.end()
