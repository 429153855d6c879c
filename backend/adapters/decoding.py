"""How ``generate`` chooses the next token of each row, and when a row ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backend.adapters.base import Batch
from backend.adapters.completion import Completion

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
    """When each row of a batch ends: as its completion does, or when nobody waits for it.

    transformers' own stop strings look at the prompt's last characters too, and build a table of
    the whole vocabulary for each list of strings; here only what was written is looked at.
    """

    def __init__(
        self,
        completions: list[Completion],
        *,
        start: int,
        room: list[int],
        stop: list[str],
        decode: Callable[[list[int]], str],
        cancelled: Callable[[int], bool],
    ) -> None:
        """Writing begins in the column ``start``; ``room`` is how many tokens each row may get."""
        self._completions = completions
        self._start = start
        self._room = room
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
        beams = input_ids.shape[0] // len(self._completions)
        if beams > 1:
            return self._beams_ended(input_ids, beams)
        for completion, token in zip(self._completions, input_ids[:, -1].tolist(), strict=True):
            if not completion.ended:
                completion.take(token)
        return [
            completion.ended or self._cancelled(row)
            for row, completion in enumerate(self._completions)
        ]

    def _beams_ended(self, input_ids: Any, beams: int) -> list[bool]:
        """Which of the beams are over, any of which may be the text in the end."""
        written = input_ids.shape[1] - self._start
        ended = [
            self._cancelled(row) or written >= most
            for row, most in enumerate(self._room)
            for _ in range(beams)
        ]
        if not self._stop:
            return ended
        tails = input_ids[:, self._start :][:, -self._tail :].tolist()
        return [ends or self._stops(tail) for ends, tail in zip(ended, tails, strict=True)]

    def _stops(self, tail: list[int]) -> bool:
        text = self._decode(tail)
        return any(stop in text for stop in self._stop)
