"""Waves that a vocoder makes of spectrograms window by window: at once, each sample takes 2 kB."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WINDOW = 512  # frames; eight seconds of MMS


def decode_in_windows(decoder: Any) -> None:
    """Have VITS's decoder make a long wave in windows; it is the same, but for rounding."""
    import torch

    config = decoder.config
    stages = list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
    if any((kernel - rate) % 2 for rate, kernel in stages):  # a frame is not as many samples each
        return
    whole, margin, hop = decoder.forward, reach(config), math.prod(config.upsample_rates)

    def forward(spectrogram: torch.Tensor, *conditioning: Any) -> torch.Tensor:
        """A wave, (batch, 1, samples), of a spectrogram, (batch, bins, frames)."""
        frames, waves = spectrogram.shape[-1], []
        for start in range(0, frames, WINDOW):
            begin, end = max(0, start - margin), min(start + WINDOW, frames)
            wave = whole(spectrogram[..., begin : end + margin], *conditioning)
            waves.append(wave[..., (start - begin) * hop : (end - begin) * hop])
        return torch.cat(waves, dim=-1)

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
