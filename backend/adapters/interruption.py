"""Lets a run be broken off inside the parts of a model or pipeline, not only between its steps.

A VAE goes through a picture of 12 megapixels for minutes on a CPU, before the first step and after
the last one, and so does a denoiser in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Above this a VAE works in tiles. What models are made for is below it (1024 x 1024, 1536 x 1024),
# and is encoded and decoded whole. The VAE's attention takes time with the square of the pixels:
# here it compares 32,768 positions with each other, for 12 megapixels it would be 200,000.
MAX_WHOLE_PIXELS = 2**21


@contextmanager
def interruptible(pipeline: Any, check: Callable[[], None], *, pixels: int = 0) -> Iterator[None]:
    """Call ``check`` before each layer of the VAE and each block of the denoisers; it may raise.

    Pictures of more ``pixels`` than ``MAX_WHOLE_PIXELS`` are encoded and decoded in tiles.
    """
    vae = pipeline.components.get("vae")
    tiles = pixels > MAX_WHOLE_PIXELS and getattr(vae, "use_tiling", None) is False
    hooks = [
        part.register_forward_pre_hook(lambda *_: check())
        for part in _interruptible_parts(pipeline)
    ]
    if tiles:
        vae.enable_tiling()
    try:
        yield
    finally:
        if tiles:
            vae.disable_tiling()
        for hook in hooks:
            hook.remove()


def _interruptible_parts(pipeline: Any) -> Iterator[nn.Module]:
    from torch import nn

    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module) or part._compiled_call_impl is not None:
            continue  # a hook would have a compiled module compiled again
        if name == "vae":
            yield from (layer for layer in part.modules() if not any(layer.children()))
        elif name.startswith(("unet", "transformer")):
            for child in part.children():
                yield from child if isinstance(child, nn.ModuleList) else [child]


def interruptible_parts(model: nn.Module) -> Iterator[nn.Module]:
    """A model of transformers and its layers, of which each begins a part of a run."""
    from torch import nn

    yield model
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            yield from part
