"""How a picture looks before it is done: small, and cheap."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger("crane.adapters")

EVERY_S = 1.0
# Of the latents: a picture of 512 has 64, so that to decode a preview costs a sixteenth of one.
SIDE = 16


class Previewer:
    """Makes previews of what one pipeline draws, by its own decoder, once in ``EVERY_S``."""

    def __init__(self, pipeline: Any) -> None:
        self._vae: Any = getattr(pipeline, "vae", None)
        self._last = time.monotonic()

    def due(self) -> bool:
        return self._vae is not None and time.monotonic() - self._last >= EVERY_S

    def see(self, latents: torch.Tensor, rows: dict[int, int]) -> dict[int, np.ndarray]:
        """A preview for each place of ``rows``, which has its row in ``latents``.

        None of them where the pipeline keeps its pictures in a way of its own.
        """
        self._last = time.monotonic()
        scale = getattr(getattr(self._vae, "config", None), "scaling_factor", None)
        if latents.ndim != 4 or scale is None:  # packed, or a film's
            self._vae = None
            return {}
        try:
            pixels = self._decode(latents[list(rows.values())], scale)
        except Exception as error:
            logger.info("no previews of %s: %s", type(self._vae).__name__, error)
            self._vae = None
            return {}
        return dict(zip(rows, pixels, strict=True))

    def _decode(self, latents: torch.Tensor, scale: float) -> np.ndarray:
        import torch

        height, width = latents.shape[2:]
        most = max(height, width)
        size = [max(1, side * SIDE // most) for side in (height, width)] if most > SIDE else None
        with torch.inference_mode():
            if size is not None:
                latents = torch.nn.functional.interpolate(latents, size, mode="area")
            shift = getattr(self._vae.config, "shift_factor", None) or 0.0
            latents = latents.to(self._vae.dtype) / scale + shift
            decoded = self._vae.decode(latents, return_dict=False)[0].float()
        if not decoded.isfinite().all():
            raise ValueError("its decoder overflows")  # as some do in float16
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        array: np.ndarray = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return array
