"""No model at all: what is left is Crane itself."""

from __future__ import annotations

import time

from backend.adapters.base import Adapter, Batch, Prediction
from backend.errors import CraneError


class Echo(Adapter):
    loads_alone = False
    takes_turns = False  # it computes nothing
    libraries = ()

    def fetch(self) -> None:
        """Nothing, whatever an entry names: there are no weights."""

    def load(self) -> None:
        self.device, self.dtype = "cpu", "none"

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        until = time.monotonic() + batch.options["delay_ms"] / 1e3
        while (left_s := until - time.monotonic()) > 0:
            if batch.abandoned():
                break
            time.sleep(min(left_s, 0.05))
        return [Prediction(value) for value in batch.inputs]

    def size(self, value: object, options: object) -> int:
        return 1  # nothing here costs more when it is longer
