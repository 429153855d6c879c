"""What a call costs: guessed before it runs, known after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.quota.tiers import UNIT


@dataclass(frozen=True, slots=True)
class Cost:
    """An entry's ``cost``, in units. All results are thousandths, rounded up."""

    per_request: float = 0
    per_image: float = 0
    per_1k_tokens: float = 0
    per_audio_minute: float = 0

    def reserve(self, options: Mapping[str, Any], count: int) -> int:
        """What a call with ``count`` inputs is held to cost until it has run.

        That is all the pictures and the most tokens it may write, by its options; and a minute of
        sound, or the ``duration`` it asks for, of each input. A cost is never reserved as nothing,
        so that a caller with nothing left is refused.
        """
        duration = options.get("duration")
        return self._sum(
            images=count * (options.get("num_images") or 1),
            tokens=count * (options.get("max_tokens") or 0),
            audio_seconds=count * (60 if duration is None else duration),
            least=any(
                (self.per_request, self.per_image, self.per_1k_tokens, self.per_audio_minute)
            ),
        )

    def settle(self, usage: Mapping[str, float]) -> int:
        """What a call costs whose receipt says ``usage``."""
        return self._sum(
            images=usage.get("images", 0),
            tokens=usage.get("input_tokens", 0) + usage.get("output_tokens", 0),
            audio_seconds=usage.get("audio_seconds", 0),
        )

    def _sum(self, *, images: float, tokens: float, audio_seconds: float, least: int = 0) -> int:
        units = (
            self.per_request
            + self.per_image * images
            + self.per_1k_tokens * tokens / 1000
            + self.per_audio_minute * audio_seconds / 60
        )
        # Rounded first, for 0.1 * 3 is a little more than 0.3.
        return max(int(least), math.ceil(round(units * UNIT, 6)))
