"""What every adapter that looks at pictures shares: from pixels to features, and their batches."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backend.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

logger = logging.getLogger("crane.adapters")

# Processors that resize the shorter side would make a strip of 1 x 100,000 pixels into billions.
MAX_ASPECT = 100


def as_picture(pixels: np.ndarray, at: str) -> Image:
    """Pixels as Pillow's image, whose layout no processor has to guess.

    Raises ``InvalidRequest`` that names ``at`` for a strip.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        fault = f"is {width} x {height} pixels: one side is over {MAX_ASPECT} times the other"
        raise InvalidRequest.of({at: fault})
    return Image.fromarray(pixels)


def process(processor: Any, picture: Image, at: str, **more: Any) -> dict[str, Any]:
    """One picture's features, each with a first dimension of 1.

    A picture is processed by itself, so that its features are the same in any batch. Raises
    ``InvalidRequest`` for one that the processor refuses while it takes a plain one.
    """
    try:
        return dict(processor(images=[picture], return_tensors="pt", **more))
    except ValueError:
        logger.debug("a processor's refusal", exc_info=True)
        processor(images=[picture.resize((64, 64))], return_tensors="pt", **more)
        fault = f"is {picture.width} x {picture.height} pixels, which this model cannot take"
        raise InvalidRequest.of({at: fault}) from None


def of_one_shape(features: Mapping[int, Mapping[str, Any]]) -> list[list[int]]:
    """The places of those that can be stacked: equal names, and equal shapes but for the first."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, named in features.items():
        groups[tuple((name, tuple(one.shape[1:])) for name, one in named.items())].append(place)
    return list(groups.values())


def stack(features: Sequence[Mapping[str, Any]], model: Any) -> dict[str, torch.Tensor]:
    """Features of one shape as a batch, on the model's device and in its dtype."""
    import torch

    batch = {}
    for name in features[0]:
        whole = torch.cat([one[name] for one in features]).to(model.device)
        batch[name] = whole.to(model.dtype) if whole.is_floating_point() else whole
    return batch


def row_of(outputs: Any, row: int, rows: int) -> Any:
    """One row of a model's outputs, in main memory and float32."""
    import torch

    def mine(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows

    def plain(value: torch.Tensor) -> torch.Tensor:
        one = value[row : row + 1].cpu()
        return one.float() if one.is_floating_point() else one

    return type(outputs)(**{name: plain(value) for name, value in outputs.items() if mine(value)})
