"""Linear layers on a processor, with their weights as its kernels read them."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("crane.adapters")

ROWS = 16  # that the layout is for; it is as quick with others


def pack_linears(model: Any) -> None:
    """Keep the weights of a bfloat16 model's linear layers in oneDNN's own layout.

    Otherwise they are brought into it at each run, which for the few rows of a step takes longer
    than to multiply: a Llama of 33 million weights writes 1.2 to 1.4 times as many tokens. It is
    what torch.compile does with frozen weights, and needs no compiler. In float32 a single row is
    slower so. A head that is one with the embeddings is a copy from then on.
    """
    import torch

    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return
    packed = _packed_class()
    try:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and type(child.weight.data) is torch.Tensor:
                    setattr(module, name, packed(child))
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
