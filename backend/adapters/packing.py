"""Linear layers on a processor, with their weights as its kernels read them."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("crane.adapters")

ROWS = 16  # that the layout is for; it is as quick with others


def pack_linears(model: Any) -> None:
    """Keep the weights of a model's linear layers as a processor's kernels read them best.

    In bfloat16 that is oneDNN's own layout. Otherwise they are brought into it at each run, which
    for the few rows of a step takes longer than to multiply: a Llama of 33 million weights writes
    1.2 to 1.4 times as many tokens. It is what torch.compile does with frozen weights, and needs no
    compiler. A head that is one with the embeddings is a copy from then on.

    In float32 that layout is slower for a single row, so they are transposed: of that Llama a step
    of 16 texts takes 0.87 of the time, of 32 0.8, of one the same.
    """
    import torch

    if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float32):
        return
    linears = [
        (module, name, child)
        for module in list(model.modules())
        for name, child in list(module.named_children())
        if type(child) is torch.nn.Linear and type(child.weight.data) is torch.Tensor
    ]
    if model.dtype == torch.float32:
        embedded = model.get_input_embeddings().weight
        for _, _, child in linears:
            if child.weight is not embedded:  # whose rows are looked up
                child.weight.data = child.weight.data.t().contiguous().t()
        return
    packed = _packed_class()
    try:
        for module, name, child in linears:
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
