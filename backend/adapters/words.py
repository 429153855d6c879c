"""What a tokenizer written in Python remembers of callers' words, bounded.

CTRL's, XLM's and others keep the pieces of each word that they ever saw. Those of the library
``tokenizers`` keep 10,000 words of up to 256 characters.
"""

from __future__ import annotations

from typing import Any

MAX_WORDS, MAX_LENGTH = 10_000, 256


class Words(dict[str, Any]):
    """The pieces of up to ``max_words`` words; then it begins anew."""

    def __init__(self, max_words: int) -> None:
        super().__init__()
        self._max_words = max_words

    def __setitem__(self, word: str, pieces: Any) -> None:
        if len(word) > MAX_LENGTH:
            return
        if len(self) >= self._max_words:
            self.clear()
        super().__setitem__(word, pieces)


def bound_words(tokenizer: Any, max_words: int = MAX_WORDS) -> None:
    """Bound a tokenizer's cache, where it has one of its own."""
    if type(getattr(tokenizer, "cache", None)) is dict:
        tokenizer.cache = Words(max_words)
