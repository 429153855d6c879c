"""Several engines as one: each call runs on the one that is chosen for it."""

from __future__ import annotations

import socket
import time
from typing import Any

from backend.config import Config
from backend.engine.calls import Call
from backend.engine.client import EngineClient, Stream
from backend.engine.placement import Placement
from backend.engine.remote import (
    ENGINE_START_S,
    RESEND_S,
    EngineAway,
    EngineEnding,
    RemoteEngine,
    with_time_left,
)
from backend.engine.status import together
from backend.errors import ModelUnavailable
from backend.registry import Registry


class SeveralEngines(EngineClient):
    """An engine for each of ``CRANE_DEVICES``, of which ``Placement`` chooses one for each call."""

    def __init__(self, config: Config, registry: Registry) -> None:
        super().__init__(config)
        self._registry = registry
        self._names = config.devices
        # Where one is just starting, another may do what is to be done.
        count = len(self._names)
        self._engines = [RemoteEngine(config, index, start_s=0) for index in range(count)]
        lock = config.engine_sockets[0].with_name("placement.lock")
        self._placement = Placement(self._engines, self._names, registry, lock)

    def stream(self, call: Call, caller_socket: socket.socket | None = None) -> Stream:
        spec = self._registry.get(call.model_id)
        deadline = time.monotonic() + call.timeout_s
        away_until = time.monotonic() + ENGINE_START_S
        while True:
            with self._placement.place(spec, len(call.inputs) * call.repeat) as chosen:
                try:
                    yield from self._engines[chosen.index].stream(call, caller_socket)
                    return
                # It died since it was looked at, or is about to end, so another may do it.
                except EngineAway as error:
                    now = time.monotonic()
                    if isinstance(error, EngineEnding):
                        away_until = now + ENGINE_START_S
                    if now + RESEND_S > min(away_until, deadline):
                        raise
            time.sleep(RESEND_S)
            call = with_time_left(call, deadline)
            self._placement.look()

    def status(self) -> dict[str, Any]:
        deadline = time.monotonic() + ENGINE_START_S
        while not (looks := self._placement.look()):
            if time.monotonic() > deadline:
                raise ModelUnavailable("No engine answers.", retry_after_s=5)
            time.sleep(0.02)
        return together(self._names, looks)

    def control(self, order: str, model_id: str) -> None:
        spec = self._registry.get(model_id)
        self.status()  # or raise
        if order == "load":
            self._placement.load(spec)
        else:
            self._placement.unload(spec)

    def close(self) -> None:
        """Nothing to do: the engines are their supervisor's to end."""


def reach(config: Config, registry: Registry) -> EngineClient:
    """The engines whose sockets ``config`` knows."""
    if len(config.devices) == 1:
        return RemoteEngine(config)
    return SeveralEngines(config, registry)
