"""Whether what a model computed are numbers still: in float16, values may grow too large."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.errors import InternalError

if TYPE_CHECKING:
    import torch


def not_numbers() -> InternalError:
    """What is told in place of an answer that would look like one."""
    return InternalError(
        "What the model computed are not numbers. Values that are too large for float16 do that: "
        "have its entry in models.yaml say dtype: bfloat16, or float32."
    )


def check_numbers(*tensors: torch.Tensor) -> None:
    """Raise ``not_numbers`` if anything in any of them is NaN.

    Of a batch it breaks all; those that are sound are answered as the engine runs each by itself.
    """
    if any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point()):
        raise not_numbers()


def has_nan(output: Any) -> bool:
    """Whether any number of an output, as ``Prediction`` has it, is NaN."""
    if isinstance(output, float):
        return math.isnan(output)
    if isinstance(output, np.ndarray):
        return output.dtype.kind == "f" and bool(np.isnan(output).any())
    if isinstance(output, dict):
        return any(map(has_nan, output.values()))
    return isinstance(output, list | tuple) and any(map(has_nan, output))


@cache
def scored_in_numbers() -> Any:
    """For ``generate``: a step that changes no scores, and raises as ``check_numbers`` does."""
    from transformers import LogitsProcessor

    class ScoredInNumbers(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            check_numbers(scores[:, 0])
            return scores

    return ScoredInNumbers()
