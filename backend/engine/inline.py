"""An engine inside an HTTP process, for servers without ``gunicorn.conf.py``."""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from backend.config import Config
from backend.engine.calls import Answer, Call, Event
from backend.engine.client import HUNG_UP, SingleEngine, caller_gone
from backend.engine.engine import Engine
from backend.engine.jobs import Job
from backend.errors import CraneError
from backend.registry import Registry

LOOK_EVERY_S = 0.25  # at the caller's socket, where an answer is no file that can be polled too


class InlineEngine(SingleEngine):
    """An engine inside this process, for servers without ``gunicorn.conf.py``."""

    def __init__(self, config: Config, registry: Registry) -> None:
        super().__init__(config)
        self.name = config.devices[0]
        self._engine = Engine(config, registry)
        self._lock = threading.Lock()
        self._begun = False

    def look(self) -> dict[str, Any]:
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

    def _submit(self, call: Call) -> tuple[Job, SimpleQueue[Event | Answer | CraneError]]:
        self._begin()
        told: SimpleQueue[Event | Answer | CraneError] = SimpleQueue()
        return self._engine.submit(call, told.put), told

    def _wait(
        self,
        ticket: tuple[Job, SimpleQueue[Event | Answer | CraneError]],
        timeout_s: float,
        caller_socket: socket.socket | None,
    ) -> Event | Answer | CraneError | None:
        until = time.monotonic() + timeout_s
        most_s = math.inf if caller_socket is None else LOOK_EVERY_S
        while (left_s := until - time.monotonic()) > 0:
            with suppress(Empty):
                return ticket[1].get(timeout=min(left_s, most_s))
            if caller_socket is not None and _has_hung_up(caller_socket):
                raise caller_gone()
        return None

    def _used(
        self, ticket: tuple[Job, SimpleQueue[Event | Answer | CraneError]]
    ) -> Mapping[str, float] | None:
        ticket[0].cancel()  # first, or it may begin between the two
        return ticket[0].usage

    def _cancel(self, ticket: tuple[Job, SimpleQueue[Event | Answer | CraneError]]) -> None:
        ticket[0].cancel()


def _has_hung_up(caller_socket: socket.socket) -> bool:
    poll = select.poll()
    poll.register(caller_socket, HUNG_UP)
    return bool(poll.poll(0))
