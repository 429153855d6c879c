"""Text generation that goes on: prompts join at any token, and texts leave at theirs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from backend.adapters.base import Entry, Feed, too_late
from backend.adapters.completion import Completion, Pace
from backend.adapters.decoding import Sampling, choose
from backend.adapters.prefixes import Prefix, Prefixes
from backend.adapters.slots import READ_TOKENS, Decoder
from backend.errors import CraneError

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
    known: Prefix | None = None
    next: int = 0  # the token that was chosen last, and is not run yet

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.room


class ContinuousBatch:
    """Writes texts with one model, all of them one token further at a time.

    A prompt is read between two of those steps, and its text is one of them from the next on. What
    differs between texts (their options, seeds, lengths) is a row's own.
    """

    def __init__(
        self,
        model: Any,
        prefixes: Prefixes,
        begin: Callable[[Entry], Text | CraneError],
        show: Callable[[int], str],
        *,
        most_texts: int,
        most_tokens: int,
    ) -> None:
        """``begin`` makes of an input what is to be written, and ``show`` a text of a token.

        ``most_tokens`` is how many the texts that are written at once may have together.
        """
        self._decoder = Decoder(model, prefixes)
        self._prefixes = prefixes
        self._begin = begin
        self._show = show
        self._most_texts = most_texts
        self._most_tokens = most_tokens
        self._waiting: deque[Text] = deque()
        self._reading: tuple[list[Text], Iterator[Any]] | None = None
        self._texts: list[Text] = []  # in the order of their slots
        self._pace = Pace()

    def run(self, feed: Feed) -> None:
        """Write until nobody waits for anything more."""
        while True:
            self._let_go(feed)
            self._take(feed)
            self._read(feed)
            if self._texts:
                self._write(feed)
            elif not self._waiting and self._reading is None:
                return

    def _take(self, feed: Feed) -> None:
        if self._waiting:  # for room: who comes after waits too
            return
        reading = len(self._reading[0]) if self._reading else 0
        for entry in feed.take(self._most_texts - len(self._texts) - reading):
            text = self._begin(entry)
            if isinstance(text, Text):
                self._waiting.append(text)
            else:
                feed.answer(entry, text)

    def _let_go(self, feed: Feed) -> None:
        """Stop what nobody waits for any more."""
        for text in [text for text in self._waiting if text.entry.cancelled()]:
            self._waiting.remove(text)
            feed.answer(text.entry, too_late())
        for slot in reversed(range(len(self._texts))):
            if self._texts[slot].entry.cancelled():
                feed.answer(self._drop(slot).entry, too_late())

    def _read(self, feed: Feed) -> None:
        """Read on, or begin with those that have waited longest and go together."""
        if self._reading is None:
            group = self._next_to_read()
            if not group:
                return
            prompts = [text.prompt for text in group]
            self._reading = group, self._decoder.read(prompts, group[0].known)
        group, reading = self._reading
        scores = next(reading)
        if scores is None:
            return
        self._reading = None
        self._texts += group
        self._put(feed, scores, len(self._texts) - len(group))

    def _next_to_read(self) -> list[Text]:
        group: list[Text] = []
        tokens = 0
        longest = max((text.most_tokens for text in self._texts), default=0)
        while self._waiting:
            text = self._waiting[0]
            count = len(self._texts) + len(group) + 1
            if count > 1 and count * max(longest, text.most_tokens) > self._most_tokens:
                break
            text.known = self._prefixes.find(text.prompt[:-1])
            tokens += len(text.prompt) - (text.known.length if text.known else 0)
            if group and (tokens > READ_TOKENS or not _same(text.known, group[0].known)):
                break
            group.append(self._waiting.popleft())
            longest = max(longest, text.most_tokens)
        return group

    def _write(self, feed: Feed) -> None:
        """Write each text's next token."""
        self._put(feed, self._decoder.step([text.next for text in self._texts]), 0)
        if self._pace.due(len(self._texts)):
            for text in self._texts:
                text.completion.speak()

    def _put(self, feed: Feed, scores: Any, first: int) -> None:
        """Choose the next token of each text from slot ``first`` on."""
        texts = self._texts[first:]
        written = [len(text.completion.ids) for text in texts]
        tokens = choose(scores, [text.sampling for text in texts], written)
        for slot in reversed(range(first, len(self._texts))):
            text = self._texts[slot]
            text.next = tokens[slot - first]
            text.completion.take(text.next)
            if text.sampling.done:
                text.completion.finish_reason = "stop"
            if text.completion.ended:
                self._drop(slot)
                prediction = text.completion.prediction()
                if text.cut:
                    prediction.facts["truncated"] = True
                if text.sampling.top_logprobs is not None:
                    prediction.facts["logprobs"] = self._shown(text.sampling.logprobs)
                if text.known is not None:
                    prediction.usage = {**prediction.usage, "cached_tokens": text.known.length}
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


def _same(one: Prefix | None, other: Prefix | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.length == other.length and one.source is other.source
