"""Audio decoders that work part by part: at once, each sample takes up to 2 kB."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WINDOW = 512  # frames; eight seconds of MMS


def decode_in_windows(decoder: Any, check: Callable[[], None], *, frames_dim: int = -1) -> None:
    """Have a HiFi-GAN make long audio in windows; it is the same, but for rounding.

    ``check`` is called before each window, and may raise. ``frames_dim`` is that of its input.
    """
    import torch

    config = decoder.config
    stages = list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
    if any((kernel - rate) % 2 for rate, kernel in stages):  # a frame is not as many samples each
        return
    whole, margin, hop = decoder.forward, reach(config), math.prod(config.upsample_rates)

    def forward(spectrogram: torch.Tensor, *conditioning: Any) -> torch.Tensor:
        """Audio, (..., samples), of a spectrogram."""
        frames, windows = spectrogram.shape[frames_dim], []
        for start in range(0, frames, WINDOW):
            check()
            end = min(start + WINDOW, frames)
            first, last = max(0, start - margin), min(end + margin, frames)
            part = spectrogram.narrow(frames_dim, first, last - first)
            audio = whole(part, *conditioning)
            windows.append(audio[..., (start - first) * hop : (end - first) * hop])
        return torch.cat(windows, dim=-1)

    decoder.forward = forward


def decode_one_by_one(decoder: Any, check: Callable[[], None]) -> None:
    """Have a codec's decoder make the audio of a batch one by one.

    ``check`` is called before each, and may raise.
    """
    import torch

    whole = decoder.forward

    def forward(embeddings: torch.Tensor) -> torch.Tensor:
        """Audio, (batch, channels, samples), of embeddings, (batch, width, frames)."""
        outputs = []
        for embedding in embeddings.split(1):
            check()
            outputs.append(whole(embedding))
        return torch.cat(outputs)

    decoder.forward = forward


def reach(config: Any) -> int:
    """How many frames at either side a sample depends on, at most."""
    frames, per_frame = 3.0, 1  # its first convolution has a kernel of 7
    blocks = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
    # Each dilated convolution of a block is followed by one that is not.
    samples = max((size - 1) / 2 * (sum(dilations) + len(dilations)) for size, dilations in blocks)
    for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        frames += kernel / rate / per_frame
        per_frame *= rate
        frames += samples / per_frame
    return math.ceil(frames + 3 / per_frame)  # and its last one likewise
