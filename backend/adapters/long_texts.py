"""Texts far longer than a model's window: told by a part of them, and never tokenised whole.

No number of characters says that a text does not fit: a normaliser may drop most of them, and a
tokenizer may make one unknown token of any word. So tokens are counted, of a beginning (or an end,
where a model keeps that) which grows until it is longer than the window, or is all of the text.
One that grows in vain would take seconds of a model's time: it is given up, and the text refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

from backend.errors import InvalidRequest

# Tokens beside the window that a part must have. Where it was cut, its tokens may differ from those
# of the whole text, but not so far in: the tokens that fit the window are the same.
MARGIN = 64
CHARACTERS = 8  # of a first part for each token that it may have; English has 4 to 5
# What has more on average is no text to the model: it drops most of it, or does not know the words.
MAX_CHARACTERS = 32


def readable(
    text: str,
    window: int | None,
    tokenizer: Any,
    *,
    at: str = "input",
    from_end: bool = False,
    tokenize: Callable[[str], Sized] | None = None,
) -> str:
    """A text, or a part of it that has more than ``window`` + ``MARGIN`` tokens.

    The part is its beginning, or its end if ``from_end``: cut to the window, either gives what the
    whole text would; but for a run of blanks longer than the part, of whose end a tokenizer that
    merges blanks may make others. ``tokenize`` is for a tokenizer that takes more than a text.

    Raises ``InvalidRequest`` that names ``at`` for a text whose first ``MAX_CHARACTERS`` for each
    of those tokens, or last ones, do not make so many.
    """
    if window is None:
        return text
    tokenize = tokenize or (lambda part: tokenizer(part, truncation=False, verbose=False).input_ids)
    most = window + MARGIN
    size = CHARACTERS * most
    while size < len(text):
        part = _end(text, size) if from_end else _beginning(text, size)
        if len(tokenize(part)) > most:
            return part
        if size >= MAX_CHARACTERS * most:
            fault = f"has {len(text)} characters that are too few tokens to this model: it reads no"
            fault += f" long text of over {MAX_CHARACTERS} characters a token; shorten it"
            raise InvalidRequest.of({at: fault})
        size *= 2
    return text


def check_all(text: str, window: int | None, tokenizer: Any, *, at: str) -> None:
    """Refuse, as ``readable`` does, a text that is read to its end, wherever it is no text."""
    if window is None:
        return
    size = MAX_CHARACTERS * (window + MARGIN) + 1
    for start in range(0, len(text), size):
        readable(text[start : start + size], window, tokenizer, at=at)


def _beginning(text: str, size: int) -> str:
    """Some ``size`` characters, to the end of a word if there is one."""
    at = text.rfind(" ", size // 2, size)
    return text[: at if at > 0 else size]


def _end(text: str, size: int) -> str:
    at = text.find(" ", len(text) - size, len(text) - size // 2)
    return text[at if at > 0 else len(text) - size :]


def or_more(tokens: int, window: int) -> str:
    """A count of tokens as errors have it: that of a part is not the whole text's."""
    return f"{tokens} or more" if tokens > window + MARGIN else str(tokens)
