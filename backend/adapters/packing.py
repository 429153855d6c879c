"""Linear layers on a processor, with their weights as its kernels read them."""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections import Counter
from functools import cache
from typing import Any

from backend.engine import turns

logger = logging.getLogger("crane.adapters")

ROWS = 16  # that the layout is for; it is as quick with others
# In float32, 16 texts are written in 0.85 to 0.91 of the time so on an Intel Xeon, 4 in as much,
# and one in 1.2; on an AMD EPYC, 16 in 0.51, 4 in 0.45, and one in 0.59. So it is tried out.
MANY, FEW = 8, 2
MANY_TOKENS = 64  # rows of a run that reads; with more the ratio is as with so many
PROBE = 2048  # rows and columns of what it is tried out with: 16 MB, as of a small model's layer
PAYS = 0.9  # of the time
SETTLED = 32  # runs after which a model is thought to stay for a while
PAUSE_S = 0.1  # that a run waits for packing at most, but for a single layer's
PATIENCE = 100  # runs of few before layers are as they were: a second, or some, of one text


def keep_packed(model: Any, *, runs: Any = None) -> None:
    """Have a model's linear layers packed as ``Packing`` does, where one row gains and many do.

    In float32 that is one layer at each run of ``runs``, the model itself unless it is told, or as
    many as take little of its time, once it has run for a while: a load takes no longer.
    """
    packing = Packing(model, copies=False)
    if packing.over:
        return
    last = time.monotonic()

    def pack(*_: Any) -> None:
        nonlocal last
        now = time.monotonic()
        packing.before_run(FEW + 1, kinds=(1, MANY_TOKENS), seconds=min(PAUSE_S, (now - last) / 10))
        last = now
        if packing.over:
            handle.remove()

    handle = (runs or model).register_forward_pre_hook(pack)


class Packing:
    """Keeps the weights of a model's linear layers in oneDNN's own layout, on a processor.

    Otherwise they are brought into it at each run, which for the few rows of a step takes longer
    than to multiply: in bfloat16 a Llama of 33 million weights writes 1.2 to 1.4 times as many
    tokens. It is what torch.compile does with frozen weights, and needs no compiler. A head that is
    one with the embeddings is a copy from then on.

    In bfloat16 it is done at once, so that a text does not depend on what was written before it. In
    float32 the model stays as it was loaded, which takes no time as its weights are mapped from
    their file, until many texts are written at once; and becomes so again when there are few.
    Where a single text gains as well, all layers are packed once the model has run for some
    tokens, and stay so. A model whose parts are moved about stays as it is.
    """

    def __init__(self, model: Any, *, copies: bool = True) -> None:
        """``copies`` is whether a head may become one, in bfloat16."""
        import torch

        # Of layers: their module, and name in it. What is packed keeps no model.
        self._places: list[tuple[weakref.ref[Any], str]] = []
        self._packed = 0  # so many of them, the first ones
        self._runs = self._runs_of_few = 0
        if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float32):
            return
        if hasattr(model, "_hf_hook"):  # as accelerate's device maps of several places have it
            return
        at_once = model.dtype == torch.bfloat16
        owners = Counter(id(one) for part in model.modules() for one in part._parameters.values())
        self._places = [
            (weakref.ref(module), name)
            for module in model.modules()
            for name, child in module.named_children()
            if type(child) is torch.nn.Linear
            and type(child.weight.data) is torch.Tensor
            # What is packed later would be more than the model was counted with.
            and ((copies and at_once) or owners[id(child.weight)] == 1)
            and not _is_read(type(module).forward, name)
        ]
        if at_once:
            with turns.hold():
                while not self.over:
                    turns.offer()
                    self._pack()
            self._places.clear()  # for good: nothing is left to pack, or to unpack

    @property
    def over(self) -> bool:
        """Whether nothing will be packed any more, or unpacked, unless few rows come."""
        return self._packed >= len(self._places)

    def before_run(self, rows: int, kinds: tuple[int, ...] = (1,), seconds: float = 0.0) -> None:
        """Pack one layer more, or one less, if it pays: all at once would keep callers waiting.

        ``kinds`` are the numbers of rows that have to gain for a settled model to be packed for
        good; ``seconds`` are for further layers.
        """
        if not self._places:
            return
        self._runs_of_few = self._runs_of_few + 1 if rows <= FEW else 0
        self._runs += 1
        always = self._runs > SETTLED and all(_pays(many) for many in kinds)
        if (always or rows >= MANY) and not self.over:
            until = time.monotonic() + seconds
            self._pack()
            while not self.over and time.monotonic() < until:
                self._pack()
        elif not always and self._runs_of_few > PATIENCE and self._packed:
            self._unpack()

    def _pack(self) -> None:
        module, name = self._place(self._packed)
        try:
            setattr(module, name, _packed_class()(getattr(module, name)))
            self._packed += 1
        except (AttributeError, RuntimeError) as error:  # another processor, or another torch
            logger.info("linear layers are as they were: %s", error)
            del self._places[self._packed :]

    def _unpack(self) -> None:
        self._packed -= 1
        module, name = self._place(self._packed)
        setattr(module, name, getattr(module, name).plain())

    def _place(self, number: int) -> tuple[Any, str]:
        module, name = self._places[number]
        return module(), name


@cache
def _is_read(forward: Any, name: str) -> bool:
    """Whether a module's ``forward`` looks at a layer's weight itself, as T5's does at its dtype.

    A packed weight is unpacked for that each time.
    """
    try:
        return f".{name}.weight" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


@cache
def _pays(rows: int) -> bool:
    """Whether so many rows in float32 are multiplied sooner by a packed weight.

    It takes some 10 ms for one row, and 40 for 64.
    """
    import torch

    plain, some = _linear(torch.ones(PROBE, PROBE), None), torch.ones(rows, PROBE)
    try:
        layers = _packed_class()(plain), plain
    except (AttributeError, RuntimeError):  # as in ``Packing._pack``
        return False
    times: tuple[list[float], list[float]] = [], []
    with turns.hold():
        for _ in range(7):  # in turns, as other processes may use the CPU meanwhile
            for layer, own in zip(layers, times, strict=True):
                started = time.perf_counter()
                layer(some)
                own.append(time.perf_counter() - started)
    packed_s, plain_s = map(min, times)
    return packed_s < PAYS * plain_s


def _linear(weight: Any, bias: Any) -> Any:
    import torch

    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear


@cache
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

        def plain(self) -> torch.nn.Linear:
            return _linear(self.weight, self.bias)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            run = torch.ops.mkldnn._linear_pointwise
            return run(rows, self.packed, self.bias, "none", [], "")

    return PackedLinear
