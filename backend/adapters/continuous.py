"""Text generation that goes on: prompts join at any token, and texts leave at theirs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from backend.adapters.base import Entry, Feed, too_late
from backend.adapters.completion import Completion, Pace
from backend.adapters.decoding import Sampling, choose
from backend.adapters.numbers import not_numbers
from backend.adapters.prefill import shares
from backend.adapters.prefixes import LEAST, Prefix, Prefixes, common
from backend.adapters.slots import Decoder, Layout
from backend.engine import turns
from backend.errors import CraneError

# Of prompts that are read in one run, with the next token of each text: a fifth of a second for a
# model of 1 billion weights on a CPU, nothing on a GPU.
READ_TOKENS = 512
AGE_BOUND_S = 5.0  # that others may overtake one which is too large for the memory that is left
LEAST_LOGPROB = -9999.0  # as OpenAI says it: JSON has no minus infinity


@dataclass(eq=False)
class Text:
    """A prompt, and what is written after it."""

    entry: Entry
    prompt: list[int]
    room: int
    completion: Completion
    sampling: Sampling
    cut: bool  # whether the prompt is
    taken_at: float = field(default_factory=time.monotonic)
    known: int = 0  # tokens of the prompt that were not read again
    next: int = 0  # the token that was chosen last, and is not run yet
    broken: bool = False  # whether its scores are no numbers any more
    number: int = 0  # in the order in which texts were admitted

    @cached_property
    def ids(self) -> np.ndarray[Any, Any]:
        return np.array(self.prompt, np.int64)

    def is_late(self, now: float) -> bool:
        """Whether it has waited so long that nobody may overtake it any more."""
        return now - self.taken_at >= AGE_BOUND_S

    @property
    def caller(self) -> str:
        return self.entry.caller

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.room


class ContinuousBatch:
    """Writes texts with one model, all of them one token further at a time.

    Prompts are read in the same runs in which the others get their next token, as ``shares`` has
    it, and from then on their texts are among these. What differs between texts (their options,
    seeds, lengths) is a row's own.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        prefixes: Prefixes,
        begin: Callable[[Entry], Text | CraneError | Future[Any]],
        show: Callable[[int], str],
        *,
        before_run: Callable[[int], None],
        most_texts: int,
        most_tokens: int,
    ) -> None:
        """``begin`` makes of an input what is to be written, and ``show`` a text of a token.

        Where ``begin`` gives a future, the input is parked until that is done.

        ``before_run`` is told how many texts the next run is of.
        ``most_tokens`` is how many the texts that are written at once may have together.
        """
        self._decoder = Decoder(model, layout)
        self._prefixes = prefixes
        self._begin = begin
        self._show = show
        self._before_run = before_run
        self._most_texts = most_texts
        self._most_tokens = most_tokens
        self._waiting: list[Text] = []  # for memory, or for what another reads; the oldest first
        self._texts: list[Text] = []  # in the order of their slots
        self._numbers = count()
        self._pace = Pace()

    def run(self, feed: Feed) -> None:
        """Write until nobody waits for anything more."""
        while True:
            turns.offer()
            self._let_go(feed)
            self._take(feed)
            self._admit()
            if not self._texts:
                return
            self._run(feed)

    def _take(self, feed: Feed) -> None:
        for entry in feed.take(self._most_texts - len(self._texts) - len(self._waiting)):
            text = self._begin(entry)
            if isinstance(text, Text):
                self._waiting.append(text)
            elif isinstance(text, Future):
                feed.park(entry, text)
            else:
                feed.answer(entry, text)

    def _let_go(self, feed: Feed) -> None:
        """Stop what nobody waits for any more, and what the model has no numbers for."""
        for text in [text for text in self._waiting if text.entry.cancelled()]:
            self._waiting.remove(text)
            feed.answer(text.entry, too_late())
        broken = any(text.broken for text in self._texts)
        for slot in reversed(range(len(self._texts))):
            if self._texts[slot].broken:
                feed.answer(self._drop(slot).entry, not_numbers())
            elif self._texts[slot].entry.cancelled():
                feed.answer(self._drop(slot).entry, too_late())
        if broken:
            self._decoder.clear()

    def _admit(self) -> None:
        """Have those who wait be read, as far as there is memory for them.

        Who has the fewest texts here goes first, and then who has waited longest. One that is too
        large for now is overtaken for ``AGE_BOUND_S`` at most.
        """
        if not self._waiting:
            return
        admitted: list[tuple[int, Text, Prefix | None]] = []
        running = Counter(text.caller for text in self._texts)
        may = list(self._waiting)
        while may:
            now = time.monotonic()
            text = min(may, key=lambda one: (not one.is_late(now), running[one.caller]))
            may.remove(text)
            others = [*self._texts, *(one for _, one, _ in admitted)]
            longest = max(one.most_tokens for one in (text, *others))
            if others and (len(others) + 1) * longest > self._most_tokens:
                if text.is_late(now):
                    break
                continue
            known = self._prefixes.find(text.caller, text.ids[:-1])
            text.known = known.length if known is not None else 0
            if self._is_being_read(text, [one for _, one, _ in admitted]):
                continue
            admitted.append((len(text.prompt) - text.known, text, known))
            running[text.caller] += 1
            self._waiting.remove(text)
        # Side by side those of like length need less padding.
        for _, text, known in sorted(admitted, key=lambda one: one[0]):
            text.number = next(self._numbers)
            self._decoder.add(known)
            self._texts.append(text)

    def _is_being_read(self, text: Text, admitted: list[Text]) -> bool:
        """Whether another prompt in prefill begins alike, and will soon be in the prefix cache.

        To wait for it takes no more than twice what that spares.
        """
        read = [
            (other, self._decoder.lengths[slot])
            for slot, other in enumerate(self._texts)
            if self._reads(slot)
        ]
        for other, length in [*read, *((one, one.known) for one in admitted)]:
            if other.caller == text.caller or self._prefixes.shared:
                spared = common(text.ids[:-1], other.ids) - text.known
                if spared >= LEAST and 2 * spared >= len(other.prompt) - length:
                    return True
        return False

    def _reads(self, slot: int) -> bool:
        return self._decoder.lengths[slot] < len(self._texts[slot].prompt)

    def _counts(self) -> list[int]:
        """How many tokens of each text the next run has."""
        counts = [1] * len(self._texts)
        slots = [slot for slot in range(len(counts)) if self._reads(slot)]
        slots.sort(key=lambda slot: self._texts[slot].number)
        unread = [
            (self._texts[slot].caller, len(self._texts[slot].prompt) - self._decoder.lengths[slot])
            for slot in slots
        ]
        for slot, share in zip(slots, shares(unread, READ_TOKENS), strict=True):
            counts[slot] = share
        return counts

    def _run(self, feed: Feed) -> None:
        """Read on, and write the next token of each text that was read."""
        self._before_run(len(self._texts))
        before = list(self._decoder.lengths)
        counts = self._counts()
        scores = self._decoder.run(
            [
                text.prompt[length : length + count] or [text.next]
                for text, length, count in zip(self._texts, before, counts, strict=True)
            ]
        )
        for text, broken in zip(self._texts, scores[:, 0].isnan().tolist(), strict=True):
            text.broken = broken
        read = [
            slot for slot, text in enumerate(self._texts) if not (text.broken or self._reads(slot))
        ]
        for slot in read:
            if before[slot] < len(self._texts[slot].prompt):
                text = self._texts[slot]
                self._prefixes.keep(text.entry.caller, text.prompt, self._decoder.layers(slot))
        if len(read) < len(self._texts):
            scores = scores[read]
        self._put(feed, scores, read)
        if self._pace.due(len(self._texts)):
            for text in self._texts:
                text.completion.speak()

    def _put(self, feed: Feed, scores: Any, slots: Iterable[int]) -> None:
        """Choose the next token of the text in each slot."""
        texts = [self._texts[slot] for slot in slots]
        written = [text.completion.ids for text in texts]
        tokens = choose(scores, [text.sampling for text in texts], written)
        for slot, text, token in reversed(list(zip(slots, texts, tokens, strict=True))):
            text.next = token
            text.completion.take(text.next)
            if text.sampling.done:
                text.completion.finish_reason = "length" if text.sampling.cut_short else "stop"
            if text.completion.ended:
                self._drop(slot)
                prediction = text.completion.prediction()
                if text.cut:
                    prediction.facts["truncated"] = True
                if text.sampling.top_logprobs is not None:
                    prediction.facts["logprobs"] = self._shown(text.sampling.logprobs)
                if text.known and not self._prefixes.shared:  # else it tells of others' prompts
                    prediction.usage = {**prediction.usage, "cached_tokens": text.known}
                feed.answer(text.entry, prediction)

    def _shown(self, logprobs: list[list[tuple[int, float]]]) -> list[dict[str, Any]]:
        """Log probabilities as callers see them, each token with its text."""
        shown = []
        for own, *likeliest in logprobs:
            told = [self._token(*one) for one in (own, *likeliest)]
            shown.append({**told[0], "top": told[1:]})
        return shown

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._show(token)
        # Part of a character has no text of its own.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}

    def _drop(self, slot: int) -> Text:
        """Take a text out; the last one has its slot now."""
        self._decoder.drop(slot)
        text, last = self._texts[slot], self._texts.pop()
        if last is not text:
            self._texts[slot] = last
        return text
