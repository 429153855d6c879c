"""How ``generate`` chooses the next token of each row, and when a row ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from backend.adapters.base import Batch
from backend.adapters.completion import Completion, Pace
from backend.adapters.grammar import Constraint

if TYPE_CHECKING:
    import torch


def sampling(options: dict[str, Any], seeds: list[int | None], device: str) -> list[Any]:
    """The warpers that ``do_sample`` would use, then a draw from each row's own generator."""
    from transformers import LogitsProcessor

    if options["temperature"] == 0:
        return []
    generators = [_generator(seed, device) for seed in seeds]

    class Draw(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return drawn(scores, generators)

    return [*warpers(options), Draw()]


def warpers(options: Mapping[str, Any]) -> list[Any]:
    """What ``do_sample`` does to scores before it draws."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps: list[Any] = []
    if options["temperature"] != 1:
        # Colder than this is greedy, and would only make the scores overflow.
        steps.append(TemperatureLogitsWarper(max(options["temperature"], 1e-6)))
    if options["top_k"]:
        steps.append(TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        steps.append(TopPLogitsWarper(options["top_p"]))
    return steps


def drawn(scores: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Scores of which the highest in each row is an exact draw, from the row's own generator.

    Gumbel's trick: the highest of ``logits + noise`` is distributed as the softmax of the logits.
    As no row's noise is another's, a seed gives the same text in any batch.
    """
    import torch

    least = torch.finfo(torch.float32).tiny  # exponential_ may give 0, whose log is not finite
    noise = torch.empty_like(scores, dtype=torch.float32)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return scores.float() - noise.clamp_min_(least).log_()


def _generator(seed: int | None, device: str) -> torch.Generator:
    import torch

    return torch.Generator(device).manual_seed(seed or 0)


class Sampling:
    """How the tokens of one row are chosen, whatever the options of the rows beside it are.

    It does what ``generate`` does with the same options, in the same order.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        seed: int | None,
        *,
        prompt: list[int],
        ends: Collection[int],
        device: str,
        constraint: Constraint | None = None,
    ) -> None:
        from transformers import RepetitionPenaltyLogitsProcessor

        penalty = options["repetition_penalty"]
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None
        self._prompt = prompt
        self._constraint = constraint
        self._min_tokens = options["min_tokens"]
        self._presence, self._frequency = options["presence_penalty"], options["frequency_penalty"]
        self.top_logprobs: int | None = options["top_logprobs"]
        # Of each token that was written: it and its log probability, and the likeliest ones'.
        self.logprobs: list[list[tuple[int, float]]] = []
        self._ends = list(ends)
        self.warmth: tuple[float, ...] = ()  # rows with the same are drawn together
        if options["temperature"] > 0:
            self.warmth = tuple(options[name] for name in ("temperature", "top_k", "top_p"))
            self.warpers = warpers(options)
            self.generator = _generator(seed, device)

    def is_plain(self, written: list[int]) -> bool:
        """Whether the highest score is the next token."""
        beyond = self.warmth or self._penalty or self._constraint
        counted = self._presence or self._frequency or self.top_logprobs is not None
        return not (beyond or counted or len(written) < self._min_tokens)

    def weigh(self, scores: torch.Tensor, written: list[int]) -> None:
        """Change a row's scores, [vocabulary], as the options want it before anything is drawn."""
        import torch

        if self._penalty is not None:
            ids = torch.tensor([self._prompt + written], device=scores.device)
            scores.copy_(self._penalty(ids, scores[None])[0])
        if written and (self._presence or self._frequency):
            times = Counter(written)
            counts = torch.tensor(list(times.values()), device=scores.device)
            scores[list(times)] -= self._presence + self._frequency * counts
        if len(written) < self._min_tokens:
            scores[self._ends] = -torch.inf
        if self._constraint is not None:
            self._constraint.mask(scores)

    def take(self, token: int) -> int:
        """The token that is written where this one was chosen: nearly always the same."""
        return token if self._constraint is None else self._constraint.take(token)

    def tell(self, token: int, logs: torch.Tensor) -> None:
        """Note what a token's log probability was, and the likeliest ones'; ``logs`` has all."""
        best, places = logs.topk(self.top_logprobs or 0)
        likeliest = list(zip(places.tolist(), best.tolist(), strict=True))
        self.logprobs.append([(token, float(logs[token])), *likeliest])

    @property
    def done(self) -> bool:
        """Whether what it is kept to is whole."""
        return self._constraint is not None and self._constraint.done

    @property
    def cut_short(self) -> bool:
        """Whether what it is kept to was ended for it, as its grammar took too long."""
        return self._constraint is not None and self._constraint.cut_short


def _highest(scores: torch.Tensor) -> list[int]:
    """The first of each row's highest scores."""
    if scores.device.type == "cpu":
        # A twelfth of the time that torch's own takes there: 1.7 ms for 64 rows of 8,000.
        scores = scores.float().numpy()
    highest: list[int] = scores.argmax(-1).tolist()
    return highest


def choose(scores: torch.Tensor, rows: list[Sampling], written: list[list[int]]) -> list[int]:
    """The next token of each row; ``written[i]`` are those that row i has by now."""
    if all(row.is_plain(ids) for row, ids in zip(rows, written, strict=True)):
        return _highest(scores)
    scores = scores.float()
    telling = [place for place, row in enumerate(rows) if row.top_logprobs is not None]
    # As the model has them, whatever is to come of them.
    logs = scores[telling].log_softmax(-1)
    for own, row, ids in zip(scores, rows, written, strict=True):
        row.weigh(own, ids)
    warm: dict[tuple[float, ...], list[int]] = {}
    for place, row in enumerate(rows):
        if row.warmth:
            warm.setdefault(row.warmth, []).append(place)
    for places in warm.values():
        warped = scores[places]
        for step in rows[places[0]].warpers:
            warped = step(None, warped)
        scores[places] = drawn(warped, [rows[place].generator for place in places])
    tokens = [row.take(token) for row, token in zip(rows, _highest(scores), strict=True)]
    for place, own in zip(telling, logs, strict=True):
        rows[place].tell(tokens[place], own)
    return tokens


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
        self._pace = Pace()
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
        if self._pace.due(len(self._completions)):
            for completion in self._completions:
                completion.speak()
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
