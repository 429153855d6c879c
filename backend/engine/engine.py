"""Inputs and options in, outputs out, within a deadline."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from backend.adapters import ADAPTERS
from backend.config import Config
from backend.engine import libraries
from backend.engine.calls import Answer, Call, Event
from backend.engine.devices import Devices
from backend.engine.encoder import Encoder
from backend.engine.jobs import Job
from backend.engine.placement import homes
from backend.engine.pool import WorkerPool
from backend.errors import CraneError
from backend.registry import Registry

logger = logging.getLogger("crane.engine")

CLOSE_TIMEOUT_S = 10.0


class Engine:
    """Runs calls on the models of a registry, on the devices of one engine."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        on_defunct: Callable[[bool], None] = lambda at_once: None,
        index: int = 0,
    ) -> None:
        """``on_defunct`` is called when a model broke in a way that only a new process mends.

        It is told whether that is to be at once, as its device serves no other model either.

        ``index`` says which of ``CRANE_DEVICES`` it has.
        """
        self._devices = Devices(config.devices, index)
        self._devices.keep_to()
        self._threads = config.engine_threads[0]
        libraries.set_up(self._threads)
        self._registry = registry
        self._encoder = Encoder(config.max_output)
        self._pool = WorkerPool(ADAPTERS, config, self._devices, on_defunct)

    def load_pinned(self) -> None:
        """Load the models that are to stay loaded here, each in a thread of its own."""
        for spec in self._registry:
            here = homes(spec, self._registry, self._devices.engines)
            if spec.pinned and self._devices.index in here:
                try:
                    self._pool.load(spec)
                except Exception as error:  # which costs this model, and not the engine
                    logger.error("%s is pinned and cannot load: %s", spec.id, error, exc_info=error)

    def import_libraries(self) -> None:
        """Begin to import the model libraries, if any model here is going to need them.

        The first load finds them imported, or waits for the rest; all else goes on meanwhile.
        """
        if any(ADAPTERS[spec.type].libraries for spec in self._registry):
            threading.Thread(target=_import_libraries, name="libraries", daemon=True).start()

    def control(self, order: str, model_id: str) -> None:
        """Begin to ``load`` a model, or ``unload`` it when its queued work is done.

        To ``prepare`` it is to load it as a call would, which one that failed just now refuses.
        Raises ``ModelNotFound`` and ``ModelUnavailable``.
        """
        spec = self._registry.get(model_id)
        if order == "unload":
            self._pool.unload(spec)
        else:
            self._pool.load(spec, anew=order == "load")

    def submit(self, call: Call, tell: Callable[[Event | Answer | CraneError], None]) -> Job:
        """Queue a call; ``tell`` gets its answer or error, once, in whichever thread has it.

        An answer's outputs are what ``Task.dump`` makes of the model's.

        Where the call streams, it gets its events before. Raises ``ModelNotFound``,
        ``ModelUnavailable`` or ``Overloaded`` where it is not queued.
        ``Job.cancel`` says that nobody waits for it any more.
        """
        spec = self._registry.get(call.model_id)
        job = self._encoder.job(call, spec.type, tell)
        self._pool.submit(spec, job)
        return job

    def status(self) -> dict[str, Any]:
        """This process, and every model that was asked for."""
        models = {model_id: status.to_wire() for model_id, status in self._pool.status().items()}
        return {
            "device": self._devices.name,
            "pid": os.getpid(),
            "threads": self._threads,
            "memory": self._pool.budgets(),
            "models": models,
        }

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Finish what is queued, unload every model; give up on what takes longer."""
        deadline = time.monotonic() + timeout_s
        if late := self._pool.close(timeout_s):
            logger.warning("did not unload in %.0f s: %s", timeout_s, ", ".join(late))
        self._encoder.close(max(0.0, deadline - time.monotonic()))


def _import_libraries() -> None:
    try:
        libraries.load(libraries.COMMON)
    except Exception:  # a load fails by it too, and its callers are told
        logger.exception("the model libraries cannot be imported")
