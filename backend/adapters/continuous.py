"""Text generation that goes on: prompts join at any token, and texts leave at theirs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from backend.adapters.base import Entry, Feed, too_late
from backend.adapters.completion import Completion, Pace
from backend.adapters.decoding import Sampling, choose
from backend.adapters.numbers import not_numbers
from backend.adapters.prefixes import Prefix, Prefixes
from backend.adapters.slots import Decoder, Layout
from backend.engine import turns
from backend.errors import CraneError

# Of prompts that are read in one run, with the next token of each text: a fifth of a second for a
# model of 1 billion weights on a CPU, nothing on a GPU.
READ_TOKENS = 512
LEAST_LOGPROB = -9999.0  # as OpenAI says it: JSON has no minus infinity


@dataclass(slots=True)
class Text:
    """A prompt, and what is written after it."""

    entry: Entry
    prompt: list[int]
    room: int
    completion: Completion
    sampling: Sampling
    cut: bool  # whether the prompt is
    known: int = 0  # tokens of the prompt that were not read again
    next: int = 0  # the token that was chosen last, and is not run yet
    broken: bool = False  # whether its scores are no numbers any more

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.room


class ContinuousBatch:
    """Writes texts with one model, all of them one token further at a time.

    A prompt is read in the same run as the others' next token, a long one in several, and from then
    on its text is one of them. What differs between texts (their options, seeds, lengths) is a
    row's own.
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
        self._waiting: deque[Text] = deque()
        self._texts: list[Text] = []  # in the order of their slots
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
        if self._waiting:  # for room: who comes after waits too
            return
        for entry in feed.take(self._most_texts - len(self._texts)):
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
        """Have those that have waited longest be read, when no other is, and all at once."""
        if not self._waiting or any(self._reads(slot) for slot in range(len(self._texts))):
            return
        tokens = 0
        longest = max((text.most_tokens for text in self._texts), default=0)
        group: list[tuple[int, Text, Prefix | None]] = []
        while self._waiting:
            text, count = self._waiting[0], len(self._texts) + len(group) + 1
            longest = max(longest, text.most_tokens)
            if count > 1 and count * longest > self._most_tokens:
                break
            known = self._prefixes.find(text.entry.caller, text.prompt[:-1])
            text.known = known.length if known is not None else 0
            unread = len(text.prompt) - text.known
            tokens += unread
            if tokens > READ_TOKENS and group:
                break
            group.append((unread, self._waiting.popleft(), known))
        # Side by side those of like length need less padding.
        for _, text, known in sorted(group, key=lambda one: one[0]):
            self._decoder.add(known)
            self._texts.append(text)

    def _reads(self, slot: int) -> bool:
        return self._decoder.lengths[slot] < len(self._texts[slot].prompt)

    def _run(self, feed: Feed) -> None:
        """Read on, and write the next token of each text that was read."""
        self._before_run(len(self._texts))
        before = list(self._decoder.lengths)
        scores = self._decoder.run(
            [
                text.prompt[length : length + READ_TOKENS] or [text.next]
                for text, length in zip(self._texts, before, strict=True)
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
