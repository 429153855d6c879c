"""Models are built while no other model of a CPU computes.

transformers sets PyTorch's default dtype while it builds a model, before it reads the weights. That
is one for all threads: in a load in bfloat16, what others computed in float32 failed, or was wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from backend.engine import libraries, turns


def build_in_turns() -> None:
    """Have transformers take a turn for as long as it changes the default dtype."""
    library = libraries.imported("transformers.modeling_utils")
    if library is None or hasattr(library.local_torch_dtype, "in_turns"):
        return
    change = library.local_torch_dtype

    @contextmanager
    def in_turns(*args: Any, **kwargs: Any) -> Iterator[None]:
        with turns.hold(), change(*args, **kwargs):
            yield

    in_turns.in_turns = True  # type: ignore[attr-defined]
    library.local_torch_dtype = in_turns
