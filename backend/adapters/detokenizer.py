"""From the tokens of one row to its text, as they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from backend.replies import Reply

Decode = Callable[[int | None], str]


class Detokenizer:
    """The text that a row's tokens are, up to the first of its stop strings.

    What ``add`` and ``finish`` return is the text when put together, whatever number of tokens
    comes at a time: none of it is part of a stop string, and no character is split. Nothing is
    returned before it is sure. Where there is a ``reply``, the text is its content alone: what a
    model thinks, and how it calls a tool, is nothing that the caller's stop strings are for.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: list[str],
        reply: Reply | None = None,
        kept: Collection[int] = (),
    ) -> None:
        """``kept`` are the special tokens that are text to the reply."""
        self.text = ""  # all that was returned
        self.stopped = False  # by a stop string
        if reply is None:
            self._decode = _decoder(tokenizer)
        else:
            self._decode = _content(_decoder(tokenizer, kept), reply)
        self._stop = stop
        self._held = ""  # what may be the beginning of a stop string

    def add(self, ids: Iterable[int]) -> str:
        """What these tokens add; nothing once it has stopped."""
        added = ""
        for token in ids:
            if self.stopped:
                break
            if text := self._decode(token):
                added += self._pass(text)
        return added

    def finish(self) -> str:
        """What was not sure, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._pass(self._decode(None))
        held, self._held = self._held, ""
        if self.stopped:
            return rest
        self.text += held
        return rest + held

    def _pass(self, text: str) -> str:
        """Take text that is decoded, and return what of it, and of what was held, is sure."""
        self._held += text
        if not self._stop:
            end = len(self._held)
        elif found := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            end, self.stopped = min(found), True
        else:
            end = len(self._held) - max(_overlap(self._held, stop) for stop in self._stop)
        sure, self._held = self._held[:end], self._held[end:]
        self.text += sure
        return sure


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)


def _content(decode: Decode, reply: Reply) -> Decode:
    """``decode`` for the content of what is written; the rest of it is in ``reply``."""

    def content(token: int | None) -> str:
        text = decode(token)
        if token is None:
            return reply.feed(text) + reply.end()
        said = reply.feed(text)
        reply.reasoning_tokens += reply.thinks
        return said

    return content


def _decoder(tokenizer: Any, kept: Collection[int] = ()) -> Decode:
    """A function from the next token to the text that is sure by then; None asks for the rest."""
    if not kept:
        return _decoder_of(tokenizer, True)
    decode = _decoder_of(tokenizer, False)
    left_out = special_tokens_of(tokenizer).keys() - set(kept)
    return lambda token: "" if token in left_out else decode(token)


def special_tokens_of(tokenizer: Any) -> dict[int, str]:
    """The tokens that no text has, and how they are written."""
    added = tokenizer.added_tokens_decoder
    return {token: str(one.content) for token, one in added.items() if one.special}


def _decoder_of(tokenizer: Any, skips: bool) -> Decode:
    """``skips`` is whether special tokens are no text."""
    backend = getattr(tokenizer, "_tokenizer", None)
    # The clean-up of spaces, of old checkpoints, looks at what comes after them.
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    cleans = cleans and type(getattr(backend, "model", None)).__name__ != "BPE"
    if backend is None or cleans:
        return _whole_words(tokenizer, skips)
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=skips)
    whole = True  # whether no character is begun
    ids: list[int] = []
    sent = 0

    def decode(token: int | None) -> str:
        nonlocal whole, sent
        if token is None:
            # A text may end within a character; the library shows what there is of it.
            return "" if whole else str(tokenizer.decode(ids, skip_special_tokens=skips))[sent:]
        ids.append(token)
        text: str | None = stream.step(backend, token)
        whole = text is not None
        sent += len(text or "")
        return text or ""

    return decode


def _whole_words(tokenizer: Any, skips: bool) -> Decode:
    """The same for a tokenizer that can only decode a whole text: a word is sure after it."""
    ids: list[int] = []
    sent = 0

    def decode(token: int | None) -> str:
        nonlocal sent
        if token is not None:
            ids.append(token)
        text: str = tokenizer.decode(ids, skip_special_tokens=skips)
        end = len(text) if token is None else max(sent, text.rstrip().rfind(" "))
        added, sent = text[sent:end], max(sent, end)
        return added

    return decode
