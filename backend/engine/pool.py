"""Which models are resident: each is loaded once, by the first call that needs it."""

from __future__ import annotations

import threading
import time

from backend.adapters.base import Adapter
from backend.engine.calls import Job, ModelStatus, State
from backend.engine.worker import Worker
from backend.errors import ModelUnavailable
from backend.registry import ModelSpec

# A failed load is remembered for 10 s, doubling to 5 min: long enough not to load in a loop,
# short enough that a mended model comes back by itself.
FIRST_RETRY_S = 10.0
LAST_RETRY_S = 300.0


class WorkerPool:
    """Finds a model's worker, or starts one; entries that share weights share a worker."""

    def __init__(
        self,
        adapters: dict[str, type[Adapter]],
        *,
        device: str,
        dtype: str,
        queue_size: int,
        threads: tuple[int, int],
    ) -> None:
        self._adapters = adapters
        self._device = device
        self._dtype = dtype
        self._queue_size = queue_size
        self._threads = threads
        self._workers: dict[str, Worker] = {}
        self._failures: dict[str, int] = {}
        self._closed = False
        self._lock = threading.Lock()  # so that one model never gets two workers

    def submit(self, spec: ModelSpec, job: Job) -> None:
        """Queue a job with its model's worker. Raises ``ModelUnavailable``, ``Overloaded``."""
        with self._lock:
            if self._closed:
                raise ModelUnavailable("The service is shutting down.", retry_after_s=5)
            key = self._adapters[spec.type].weights_key(spec)
            worker = self._workers.get(key)
            if worker is None or self._is_over(key, worker):
                worker = self._workers[key] = self._start(key, spec)
            elif spec.id not in worker.adapters:
                worker.adapters[spec.id] = self._adapter(spec)
        worker.submit(job)

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
        for worker in workers:
            worker.close()
        deadline = time.monotonic() + timeout_s
        return [
            worker.model_id
            for worker in workers
            if not worker.join(max(0.0, deadline - time.monotonic()))
        ]

    def _is_over(self, key: str, worker: Worker) -> bool:
        if worker.state is State.READY:
            self._failures.pop(key, None)
        elif worker.state is State.FAILED and time.monotonic() >= worker.retry_at:
            self._failures[key] = self._failures.get(key, 0) + 1
            return True
        return worker.state in (State.DEFUNCT, State.UNLOADED)

    def _adapter(self, spec: ModelSpec) -> Adapter:
        return self._adapters[spec.type](spec, device=self._device, dtype=self._dtype)

    def _start(self, key: str, spec: ModelSpec) -> Worker:
        failures = self._failures.get(key, 0)
        worker = Worker(
            self._adapter(spec),
            queue_size=self._queue_size,
            threads=self._threads,
            retry_after_s=min(FIRST_RETRY_S * 2**failures, LAST_RETRY_S),
        )
        worker.start()
        return worker
