"""What an adapter is: one task on one library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backend.errors import CraneError
from backend.registry import ModelSpec


@dataclass(slots=True, kw_only=True)
class Batch:
    """Inputs of one or more callers that run together, all with equal options.

    ``seeds[i]`` is input i's own; ``cancelled(i)`` turns true once nobody waits for it.
    """

    inputs: list[Any]
    options: dict[str, Any]
    seeds: list[int | None]
    cancelled: Callable[[int], bool]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(slots=True)
class Prediction:
    """One input's output; ``usage`` is counted up, ``facts`` (``finish_reason``) are told as is."""

    output: Any
    usage: Mapping[str, int | float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Adapter(ABC):
    """Performs one task with one library.

    Building an adapter is cheap; ``load`` is what costs memory, and the only place to import the
    library. The model's worker makes all calls from one thread, so an adapter needs no locks.
    After ``load`` its ``revision``, ``device`` and ``dtype`` say what was loaded.
    """

    max_batch_tokens = 32768  # padded; 32 texts of 1,024 tokens

    def __init__(self, spec: ModelSpec, *, device: str = "auto", dtype: str = "auto") -> None:
        self.spec = spec
        self.device = spec.device if spec.device != "auto" else device
        self.dtype = spec.dtype if spec.dtype != "auto" else dtype
        self.revision: str | None = spec.revision

    @abstractmethod
    def load(self) -> None:
        """Put the model on its device. A ``ModelUnavailable`` raised here reaches the caller."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        """Answer each input, in order; an error in a place is that input's alone."""

    def unload(self) -> None:  # noqa: B027  # not every adapter takes something
        """Let go of what ``load`` took."""

    def size(self, value: Any) -> int:
        """Guess an input's length in tokens: inputs of like size run together."""
        return 1 + len(value if isinstance(value, str) else str(value)) // 4
