"""Engines in processes of their own, reached over Unix sockets."""

from __future__ import annotations

import logging
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from backend.channel import Channel, MessageTooLarge
from backend.config import Config
from backend.engine import wire
from backend.engine.calls import Answer, Call, Event, total
from backend.engine.client import HUNG_UP, SingleEngine, Stream, caller_gone
from backend.errors import CraneError, ModelUnavailable, PayloadTooLarge
from backend.messages import BadMessage, Part

logger = logging.getLogger("crane.engine")

ENGINE_START_S = (
    5.0  # a restarted engine listens after about half a second; loaded hosts are slower
)
STATUS_TIMEOUT_S = 2.0
BEGUN_TIMEOUT_S = 0.25
RESEND_S = 0.1  # before a call is sent again that an engine did not begin
IN_AND_OUT = select.POLLIN | select.POLLOUT


class EngineAway(ModelUnavailable):
    """The engine is not there, and has read nothing of what it was to be told."""


class EngineEnding(EngineAway):
    """The engine ends, and has begun nothing of the call."""


class Ticket:
    """A call that was sent, and what is told of it that was not looked at yet."""

    def __init__(self, channel: Channel, call_id: str) -> None:
        self.channel = channel
        self.told: deque[Any] = deque()  # ``Event``, ``Answer`` or ``CraneError``
        self.call_id = call_id

    def take(self, messages: list[list[Part]]) -> None:
        """Raises ``BadMessage``."""
        for message in messages:
            told: Any = wire.unpack_answer(self.call_id, message)
            if isinstance(told, Event) and told.kind == wire.ENDING:
                told = _engine_ending()
            last: Any = self.told[-1] if self.told else None
            if _go_together(last, told):  # whoever is slower than the model gets more at once
                last.data["text"] += told.data["text"]
            else:
                self.told.append(told)


class RemoteEngine(SingleEngine):
    """An engine in a process of its own, reached over a Unix socket.

    Each thread has a connection of its own with one call on it at a time, so calls wait for no
    lock and answers cannot cross. A call is cancelled by closing its connection; an engine that
    dies closes them all, which ends every wait at once.
    """

    def __init__(self, config: Config, index: int = 0, *, start_s: float = ENGINE_START_S) -> None:
        """``start_s`` is how long to wait for one that is just starting."""
        super().__init__(config)
        self.index = index
        self.name = config.devices[index]
        self._path = config.engine_sockets[index]
        self._max_message = config.max_message
        self._start_s = start_s
        self._local = threading.local()

    def stream(self, call: Call, caller_socket: socket.socket | None = None) -> Stream:
        deadline = time.monotonic() + call.timeout_s
        while True:
            try:
                yield from super().stream(call, caller_socket)
                return
            except EngineEnding:  # it soon has, and ``_reach`` waits for the one that follows
                if not self._start_s or time.monotonic() + RESEND_S > deadline:
                    raise
            time.sleep(RESEND_S)
            call = with_time_left(call, deadline)

    def look(self) -> dict[str, Any]:
        message = self._ask(None)
        try:
            return wire.unpack_status(message)
        except BadMessage as error:
            raise _not_understood(error) from None

    def control(self, order: str, model_id: str) -> None:
        message = self._ask([order, model_id])
        try:
            answer = wire.unpack_answer(model_id, message)
        except BadMessage as error:
            raise _not_understood(error) from None
        if isinstance(answer, CraneError):
            raise answer

    def _ask(self, message: list[str] | None) -> list[Part]:
        """What the engine says at once, whatever its models do.

        On a connection of its own, for this thread's may have a call on it.
        """
        deadline = time.monotonic() + STATUS_TIMEOUT_S
        with closing(self._reach()) as channel:
            try:
                channel.send(wire.pack(message))
            except OSError:
                raise _engine_gone() from None
            messages = self._receive(channel, deadline)
        if not messages:
            raise ModelUnavailable("The engine is too busy to say how it is.", retry_after_s=1)
        return messages[0]

    def close(self) -> None:
        """Nothing to do: the engine is its supervisor's to end."""

    def _submit(self, call: Call) -> Ticket:
        """Send on this thread's connection, or on a new one where its engine has ended.

        Raises ``PayloadTooLarge`` and ``ModelUnavailable``.
        """
        data = wire.pack(call.to_wire())
        channel: Channel | None = getattr(self._local, "channel", None)
        if channel is not None:
            try:
                _send_call(channel, data)
            except OSError:  # nobody has read any of it, so it may be sent again
                self._hang_up(channel)
            else:
                return Ticket(channel, call.request_id)
        channel = self._local.channel = self._reach()
        try:
            _send_call(channel, data)
        except OSError:
            self._hang_up(channel)
            raise _engine_ending() from None
        return Ticket(channel, call.request_id)

    def _wait(
        self, ticket: Ticket, timeout_s: float, caller_socket: socket.socket | None
    ) -> Event | Answer | CraneError | None:
        if not ticket.told:
            deadline = time.monotonic() + timeout_s
            try:
                ticket.take(self._receive(ticket.channel, deadline, caller_socket))
            except BadMessage as error:
                raise _not_understood(error) from None
        return ticket.told.popleft() if ticket.told else None

    def _used(self, ticket: Ticket) -> Mapping[str, float] | None:
        """Ask the engine, whose I/O thread answers at once; None where it has just died."""
        deadline = time.monotonic() + BEGUN_TIMEOUT_S
        try:
            ticket.channel.send(wire.pack([wire.BEGUN, ticket.call_id]))
            while time.monotonic() < deadline:
                ticket.take(self._receive(ticket.channel, deadline))
                while ticket.told:
                    told = ticket.told.popleft()
                    if isinstance(told, Answer):  # which came while the call was given up
                        return total(told.usage)
                    if isinstance(told, CraneError):
                        return told.usage
                    if isinstance(told, Event) and told.kind == wire.BEGUN:
                        usage: Mapping[str, float] | None = told.data.get("usage", {})
                        return usage
        except (OSError, BadMessage, ModelUnavailable):
            return None
        return {}

    def _cancel(self, ticket: Ticket) -> None:
        self._hang_up(ticket.channel)

    def _receive(
        self,
        channel: Channel,
        deadline: float,
        caller_socket: socket.socket | None = None,
    ) -> list[list[Part]]:
        """The messages that come next, with what is left to be sent sent before.

        None of them at the deadline.
        """
        poll = select.poll()
        if caller_socket is not None:
            poll.register(caller_socket, HUNG_UP)
        try:
            while True:
                poll.register(channel, select.POLLIN if _flush(channel) else IN_AND_OUT)
                left_s = deadline - time.monotonic()
                ready = poll.poll(max(0, math.ceil(left_s * 1e3)))  # below 0 is for ever
                if not ready:
                    return []
                if all(fd != channel.fileno() for fd, _ in ready):
                    raise caller_gone()
                if messages := channel.receive():
                    return messages
        except (EOFError, OSError):
            raise _engine_gone() from None
        except BadMessage as error:
            raise _not_understood(error) from None

    def _hang_up(self, channel: Channel) -> None:
        channel.close()
        if getattr(self._local, "channel", None) is channel:
            self._local.channel = None

    def _reach(self) -> Channel:
        """Connect to the engine, waiting a little for one that is just starting."""
        deadline = time.monotonic() + self._start_s
        while True:
            try:
                return Channel(_connected(self._path), max_bytes=self._max_message)
            except OSError:
                if time.monotonic() > deadline:
                    fault = "The engine is not running, or cannot be reached."
                    raise EngineAway(fault, retry_after_s=5) from None
            time.sleep(0.02)


def _connected(path: Path) -> socket.socket:
    """Raises ``OSError``, also where this process has too many files open."""
    end = socket.socket(socket.AF_UNIX)
    end.setblocking(False)  # else it would wait for an engine that accepts no one
    try:
        end.connect(str(path))
    except OSError:
        end.close()
        raise
    return end


def _go_together(first: Any, second: Any) -> bool:
    """Whether two of what was told are texts of which the second goes on from the first."""
    if not isinstance(first, Event) or not isinstance(second, Event):
        return False
    if not first.kind == second.kind == "delta":
        return False
    return {**first.data, "text": ""} == {**second.data, "text": ""}


def _send_call(channel: Channel, message: list[Part]) -> None:
    try:
        channel.send(message)
    except MessageTooLarge as error:
        raise PayloadTooLarge(
            f"The call is too large for its model's engine: {error}. Send fewer inputs in one call."
        ) from None


def _not_understood(error: BadMessage) -> ModelUnavailable:
    """For a message that is not one of ours: its connection is closed, and there is a new one."""
    logger.error("a message of the engine is not understood: %s", error)
    return ModelUnavailable(
        "The engine's answer could not be read. Try again; if it stays so, all of the service "
        "must be started again, for its parts are of different versions.",
        retry_after_s=1,
    )


def with_time_left(call: Call, deadline: float) -> Call:
    """A call that is sent again, with the time that it still has."""
    return replace(call, timeout_s=max(0.1, round(deadline - time.monotonic(), 1)))


def _flush(channel: Channel) -> bool:
    """Send what is left of a call; an engine that has not all of it has not begun it."""
    try:
        return channel.flush()
    except OSError:
        raise _engine_ending() from None


def _engine_ending() -> EngineEnding:
    return EngineEnding(
        "The engine is being replaced; nothing of your call has begun.", retry_after_s=5
    )


def _engine_gone() -> ModelUnavailable:
    return ModelUnavailable(
        "The engine stopped while it had your call, and is being started again.", retry_after_s=1
    )
