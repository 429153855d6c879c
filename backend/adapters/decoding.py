"""How ``generate`` chooses the next token of each row, and when a row ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backend.adapters.base import Batch

if TYPE_CHECKING:
    import torch


def sampling(options: dict[str, Any], seeds: list[int | None], device: str) -> list[Any]:
    """The warpers that ``do_sample`` would use, then a draw from each row's own generator."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if options["temperature"] == 0:
        return []
    steps: list[Any] = []
    if options["temperature"] != 1:
        # Colder than this is greedy, and would only make the scores overflow.
        steps.append(TemperatureLogitsWarper(max(options["temperature"], 1e-6)))
    if options["top_k"]:
        steps.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        steps.append(TopPLogitsWarper(options["top_p"]))
    return [*steps, _draw(seeds, device)]


def _draw(seeds: list[int | None], device: str) -> Callable[..., torch.Tensor]:
    """Make a logits processor after which the greedy choice is an exact draw for each row.

    Gumbel's trick: the highest of ``logits + noise`` is distributed as the softmax of the logits.
    Each row's noise comes from its own generator, so a seed gives the same text in any batch.
    """
    import torch
    from transformers import LogitsProcessor

    generators = [torch.Generator(device).manual_seed(seed or 0) for seed in seeds]
    least = torch.finfo(torch.float32).tiny  # exponential_ may give 0, whose log is not finite

    class Draw(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            noise = torch.empty_like(scores, dtype=torch.float32)
            for row, generator in zip(noise, generators, strict=True):
                row.exponential_(generator=generator)
            return scores.float() - noise.clamp_min_(least).log_()

    return Draw()


def leaving(batch: Batch, places: list[int]) -> Any:
    """A criterion that ends each row of ``generate`` once nobody waits for its place."""
    import torch
    from transformers import StoppingCriteria

    class Leaving(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
            beams = input_ids.shape[0] // len(places)
            gone = [batch.cancelled(place) for place in places for _ in range(beams)]
            return torch.tensor(gone, device=input_ids.device)

    return Leaving()


class Ending:
    """When each row of a batch ends: at its room, a stop string, or when nobody waits for it.

    transformers' own stop strings look at the prompt's last characters too, and build a table of
    the whole vocabulary for each list of strings; here only what was written is looked at.
    """

    def __init__(
        self,
        *,
        room: list[int],
        start: int,
        stop: list[str],
        decode: Callable[[list[int]], str],
        cancelled: Callable[[int], bool],
    ) -> None:
        self.room = room
        self.written: list[int | None] = [None] * len(room)  # tokens, for rows that have ended
        self._start = start
        self._stop = stop
        self._decode = decode
        self._cancelled = cancelled
        # The bytes of the longest stop string, should each be a token, and some for good measure.
        self._tail = 8 + 4 * max(map(len, stop), default=0)

    def criterion(self) -> Any:
        """What ``generate`` asks after each token."""
        import torch
        from transformers import StoppingCriteria

        ended = self._ended

        class Stopping(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
                return torch.tensor(ended(input_ids), device=input_ids.device)

        return Stopping()

    def _ended(self, input_ids: Any) -> list[bool]:
        written = input_ids.shape[1] - self._start
        beams = input_ids.shape[0] // len(self.room)
        over = [self._cancelled(row) or written >= most for row, most in enumerate(self.room)]
        if beams == 1:
            over = [
                ends or before is not None for ends, before in zip(over, self.written, strict=True)
            ]
        ended = [ends for ends in over for _ in range(beams)]
        if self._stop:
            tails = input_ids[:, self._start :][:, -self._tail :].tolist()
            ended = [ends or self._stops(tail) for ends, tail in zip(ended, tails, strict=True)]
        if beams == 1:
            self.written = [
                written if ends and before is None else before
                for ends, before in zip(ended, self.written, strict=True)
            ]
        return ended

    def _stops(self, tail: list[int]) -> bool:
        text = self._decode(tail)
        return any(stop in text for stop in self._stop)
