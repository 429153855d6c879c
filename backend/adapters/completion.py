"""One text that a model writes, token by token, whoever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from backend.adapters.base import Prediction
from backend.adapters.detokenizer import Detokenizer


class Completion:
    """A text as it is written: what of it is sure, and where it ends.

    It ends with one of ``ends``, at its ``room`` in tokens, or at a stop string, which is no part
    of it. ``tell`` is told each part of the text as soon as it is sure, as a ``delta``.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_tokens: int,
        room: int,
        ends: Collection[int],
        stop: list[str],
        tell: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        self.ids: list[int] = []  # with the token that ended it
        self.finish_reason: str | None = None
        self._prompt_tokens = prompt_tokens
        self._room = room
        self._ends = ends
        self._detokenizer = Detokenizer(tokenizer, stop)
        self._tell = tell
        # A text that nobody listens to, and that ends at its tokens, is decoded at its end.
        self._at_once = bool(stop) or tell is not None
        self._decoded = 0

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    def take(self, token: int) -> None:
        """Take the token that was written next."""
        self.ids.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
        elif len(self.ids) >= self._room:
            self.finish_reason = "length"
        if self._at_once:
            self._decode()

    def prediction(self) -> Prediction:
        """What was written by now."""
        self._decode()
        self._say(self._detokenizer.finish())
        self._look_for_stop()
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": len(self.ids)}
        reason = self.finish_reason or "stop"
        return Prediction(self._detokenizer.text, usage, {"finish_reason": reason})

    def _decode(self) -> None:
        new = self.ids[self._decoded :]
        self._decoded = len(self.ids)
        if new and new[-1] in self._ends:
            new.pop()
        self._say(self._detokenizer.add(new))
        self._look_for_stop()

    def _look_for_stop(self) -> None:
        if self._detokenizer.stopped:
            self.finish_reason = "stop"

    def _say(self, text: str) -> None:
        if text and self._tell is not None:
            self._tell("delta", {"text": text})
