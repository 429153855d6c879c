"""Which models are resident: each is loaded once, by the first call that needs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from backend.adapters import footprint
from backend.adapters.base import Adapter
from backend.config import Config
from backend.engine.calls import ModelStatus
from backend.engine.devices import Devices
from backend.engine.jobs import Job
from backend.engine.residency import Residency
from backend.engine.watchdog import Watchdog
from backend.engine.worker import Worker
from backend.errors import ModelUnavailable
from backend.registry import ModelSpec


class WorkerPool:
    """Finds a model's worker, or starts one; entries that share weights share a worker."""

    def __init__(
        self,
        adapters: dict[str, type[Adapter]],
        config: Config,
        devices: Devices,
        on_defunct: Callable[[bool], None],
    ) -> None:
        self._adapters = dict(adapters)
        self._config = config
        self._on_defunct = on_defunct
        self._devices = devices
        self._residency = Residency(self._budget, self._free)
        self._workers: dict[str, Worker] = {}
        self._watchdog = Watchdog(lambda: list(self._workers.values()), config.hang_timeout_s)
        self._closed = False
        self._lock = threading.Lock()  # so that one model never gets two workers

    def submit(self, spec: ModelSpec, job: Job) -> None:
        """Queue a job with its model's worker. Raises ``ModelUnavailable``, ``Overloaded``."""
        self._worker(spec).submit(job)

    def load(self, spec: ModelSpec, *, anew: bool = True) -> None:
        """Load a model though nobody has called it. Raises ``ModelUnavailable``.

        Unless ``anew``, a load that failed just now is not tried again.
        """
        self._worker(spec).want(anew=anew)

    def unload(self, spec: ModelSpec) -> None:
        """Unload a model as soon as nothing of it is queued or running."""
        self._worker(spec).unload()

    def _worker(self, spec: ModelSpec) -> Worker:
        with self._lock:
            if self._closed:
                raise ModelUnavailable("The service is shutting down.", retry_after_s=5)
            key = self._adapters[spec.type].weights_key(spec)
            worker = self._workers.get(key)
            if worker is None or worker.is_over:
                self._watchdog.start()
                worker = self._workers[key] = Worker(
                    spec,
                    self._adapter,
                    self._residency,
                    queue_size=self._config.queue_size,
                    devices=self._devices,
                    threads=self._config.engine_threads,
                    idle_timeout_s=self._config.idle_timeout_s,
                    load_timeout_s=self._config.load_timeout_s,
                    hang_timeout_s=self._config.hang_timeout_s,
                    on_defunct=self._on_defunct,
                )
            worker.add(spec)
            return worker

    def status(self) -> dict[str, ModelStatus]:
        """Where every model stands that was ever asked for."""
        with self._lock:
            return {
                model_id: worker.status(model_id)
                for worker in self._workers.values()
                for model_id in worker.adapters
            }

    def close(self, timeout_s: float) -> list[str]:
        """Finish what is queued and unload; return the ids of models that did not end in time."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        self._watchdog.end()
        for worker in workers:
            worker.close()
        deadline = time.monotonic() + timeout_s
        return [
            worker.model_id
            for worker in workers
            if not worker.join(max(0.0, deadline - time.monotonic()))
        ]

    def budgets(self) -> dict[str, dict[str, int]]:
        """Each device's bytes for models, and how many of them are held."""
        return self._residency.budgets()

    def _budget(self, memory: str) -> int:
        budget = self._config.memory_budget
        if budget is None:
            budget = footprint.spare(self._free(memory))
        return budget // self._devices.sharers(memory)

    def _free(self, memory: str) -> int:
        return sum(footprint.free(device) for device in self._devices.parts(memory))

    def _adapter(self, spec: ModelSpec) -> Adapter:
        device = self._devices.local(spec.device)
        return self._adapters[spec.type](spec, device=device, dtype=self._config.dtype)
