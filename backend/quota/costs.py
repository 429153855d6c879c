"""What a call costs: by the most that it may use before it runs, by what it used after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from backend.quota.tiers import UNIT


@dataclass(frozen=True, slots=True)
class Cost:
    """An entry's ``cost``, in units."""

    per_request: float = 0
    per_input: float = 0
    per_image: float = 0
    per_1k_tokens: float = 0
    per_audio_minute: float = 0
    per_video_second: float = 0

    @property
    def is_by_usage(self) -> bool:
        """Whether it is known only once it is known what a call uses."""
        by_usage = self.per_image, self.per_1k_tokens, self.per_audio_minute, self.per_video_second
        return any(by_usage)

    def of(self, usage: Mapping[str, float], inputs: int) -> int:
        """The thousandths of a unit, rounded up, of a call of so many inputs.

        ``usage`` is as receipts have it: ``images``, ``input_tokens``, ``output_tokens``,
        ``audio_seconds`` and ``video_seconds``.
        """
        tokens = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
        units = (
            self.per_request
            + self.per_input * inputs
            + self.per_image * usage.get("images", 0)
            + self.per_1k_tokens * tokens / 1000
            + self.per_audio_minute * usage.get("audio_seconds", 0) / 60
            + self.per_video_second * usage.get("video_seconds", 0)
        )
        # Rounded first, for 0.1 * 3 is a little more than 0.3.
        return math.ceil(round(units * UNIT, 6))
