"""Linear layers on a processor, with their weights as its kernels read them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("crane.adapters")

ROWS = 16  # that the layout is for; it is as quick with others
# From so many rows on float32 is quicker so: 16 texts are written in 0.85 to 0.91 of the time, 4 in
# as much, one in 1.15.
MANY = 8


class Packing:
    """Keeps the weights of a model's linear layers in oneDNN's own layout, on a processor.

    Otherwise they are brought into it at each run, which for the few rows of a step takes longer
    than to multiply: in bfloat16 a Llama of 33 million weights writes 1.2 to 1.4 times as many
    tokens. It is what torch.compile does with frozen weights, and needs no compiler.

    In bfloat16 it is done at once, so that a text does not depend on what was written before it. In
    float32 the model stays as it was loaded, which takes no time as its weights are mapped from
    their file, until many texts are written at once.
    """

    def __init__(self, model: Any) -> None:
        import torch

        self._left: Iterator[None] = iter(())
        if model.device.type != "cpu":
            return
        if model.dtype == torch.bfloat16:
            for _ in _pack(model):
                pass
        elif model.dtype == torch.float32:
            self._left = _pack(model, besides=model.get_input_embeddings().weight)

    def before_run(self, rows: int) -> None:
        """Pack one layer more if it pays: all of them would keep the texts waiting."""
        if rows >= MANY:
            next(self._left, None)


def _pack(model: Any, besides: Any = None) -> Iterator[None]:
    """Pack one layer each time, none whose weights are ``besides``.

    A head that is one with the embeddings is a copy from then on.
    """
    import torch

    packed = _packed_class()
    try:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is not torch.nn.Linear or child.weight is besides:
                    continue
                if type(child.weight.data) is torch.Tensor:
                    setattr(module, name, packed(child))
                    yield
    except (AttributeError, RuntimeError) as error:  # another processor, or another torch
        logger.info("linear layers are as they were: %s", error)


def _packed_class() -> Any:
    import torch

    class PackedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is not typed
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.bias = linear.bias
            weight = linear.weight.detach()
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            self.forward(torch.zeros(1, self.in_features, dtype=weight.dtype))  # or raise

        @property
        def weight(self) -> torch.Tensor:
            return self.packed.to_dense()

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            run = torch.ops.mkldnn._linear_pointwise
            return run(rows, self.packed, self.bias, "none", [], "")

    return PackedLinear
