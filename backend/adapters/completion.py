"""One text that a model writes, token by token, whoever runs the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from backend.adapters.base import Prediction
from backend.adapters.detokenizer import Detokenizer
from backend.replies import Reply

# Often enough that a text seems to flow; and less often where many are written at once: to tell of
# each token by itself takes a fifth of the throughput of 64 callers on two cores.
TELL_EVERY_S, TELL_EACH_S = 0.05, 0.002


class Pace:
    """How often the callers of texts that are written together are told of them: all at once."""

    def __init__(self) -> None:
        self._last = 0.0

    def due(self, texts: int) -> bool:
        """Whether it is time to tell of so many."""
        now = time.monotonic()
        if now - self._last < max(TELL_EVERY_S, TELL_EACH_S * texts):
            return False
        self._last = now
        return True


class Completion:
    """A text as it is written: what of it is sure, and where it ends.

    It ends with one of ``ends``, at its ``room`` in tokens, or at a stop string, which is no part
    of it. ``tell`` is told, as ``delta``, what of the text is sure: at its first token, at each
    ``speak``, and at its end. With a ``reply`` the text is the content of what is written, and
    thinking is told beside it; see ``Detokenizer`` for that and for ``kept``.
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
        reply: Reply | None = None,
        kept: Collection[int] = (),
    ) -> None:
        self.ids: list[int] = []  # with the token that ended it
        self.finish_reason: str | None = None
        self._prompt_tokens = prompt_tokens
        self._room = room
        self._ends = ends
        self._stops = bool(stop)
        self._detokenizer = Detokenizer(tokenizer, stop, reply, kept)
        self._decoded = 0
        self._tell = tell
        self._untold = ""
        self._reply = reply
        self._told_thinking = 0  # in characters

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
        if self._stops:  # else nothing but its tokens ends it, and it is decoded when it is told
            self._decode()
        if len(self.ids) == 1:
            self.speak()

    def speak(self) -> None:
        """Tell what was written since the last time."""
        if self._tell is None:
            return
        self._decode()
        if self._reply is not None and len(self._reply.reasoning) > self._told_thinking:
            text = self._reply.reasoning[self._told_thinking :]
            self._told_thinking += len(text)
            self._tell("delta", {"text": text, "kind": "reasoning"})
        if self._untold:
            self._tell("delta", {"text": self._untold})
            self._untold = ""

    def prediction(self) -> Prediction:
        """What was written by now."""
        self._decode()
        self._add(self._detokenizer.finish())
        self.speak()
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": len(self.ids)}
        facts: dict[str, Any] = {"finish_reason": self.finish_reason or "stop"}
        if self._reply is not None and self._reply.reasoning:
            facts["reasoning_content"] = self._reply.reasoning
            usage["reasoning_tokens"] = self._reply.reasoning_tokens
        if self._reply is not None and self._reply.calls:
            facts["tool_calls"] = self._reply.calls
        return Prediction(self._detokenizer.text, usage, facts)

    def _decode(self) -> None:
        new = self.ids[self._decoded :]
        self._decoded = len(self.ids)
        if new and new[-1] in self._ends:
            new.pop()
        self._add(self._detokenizer.add(new))

    def _add(self, text: str) -> None:
        self._untold += text
        if self._detokenizer.stopped:
            self.finish_reason = "stop"
