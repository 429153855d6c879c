"""What a chat model's text holds: its thinking, what it says, and the tools that it calls.

Models mark these in ways of their own: ``marks_of`` finds a model's in its chat template, and a
``Reply`` takes a text apart by them as it comes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from backend.tool_calls import Call, read_calls

Kind = Literal["reasoning", "content", "call"]


@dataclass(frozen=True)
class Marks:
    """How a model marks what it writes. ``""`` for a call's end is the next call or the end."""

    thinking: tuple[str, str] | None = None
    calls: tuple[tuple[str, str], ...] = ()
    bare_calls: bool = False  # whether all of a reply that begins with a brace may be a call
    ignored: tuple[str, ...] = ()  # belong to nothing, and are left out

    def __bool__(self) -> bool:
        return self != Marks()

    @property
    def all(self) -> list[str]:
        pairs = [*([self.thinking] if self.thinking else []), *self.calls]
        return [*(mark for pair in pairs for mark in pair if mark), *self.ignored]

    def without_calls(self) -> Marks:
        """For a request that offers no tools: what looks like a call is said as any text is."""
        return replace(self, calls=(), bare_calls=False)

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt has begun the thinking that the reply goes on with."""
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking[0].rstrip())


class Reply:
    """A reply as it comes; what it holds is the same in whatever pieces it comes.

    ``reasoning`` and ``calls`` are what there is of them by now. A call that is not whole, or not
    of a tool that was offered, is content as it was written. Else no mark is in the content, nor
    are the blanks around thinking and calls.
    """

    def __init__(
        self, marks: Marks, *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.reasoning = ""
        self.reasoning_tokens = 0  # counted by who knows the tokens
        self.calls: list[Call] = []
        self._kind: Kind = "reasoning" if thinking else "content"
        self._turns = _turns(marks if tools else marks.without_calls())
        self._bare_calls = bool(tools) and marks.bare_calls
        self._tools = tools
        self._rest = ""  # may be the beginning of a mark
        self._blanks = ""  # may be the last before a mark
        self._fresh = thinking  # whether blanks that come now are the first after a mark
        self._said = False  # whether there was any content
        self._opened = ""  # a call, with this, which is a mark and the blanks before it
        self._call: list[str] = []

    @property
    def thinks(self) -> bool:
        return self._kind == "reasoning"

    def feed(self, text: str) -> str:
        """Take what was written next; return the content that is sure by it."""
        return self._take(text, last=False)

    def end(self) -> str:
        """Return the content that was not sure, when no more comes."""
        said = self._take("", last=True)
        if self._kind == "call":
            said += self._close_call()
        elif self._kind == "content" and not self.calls:
            said += self._blanks
        return said

    def _take(self, text: str, *, last: bool) -> str:
        self._rest += text
        said = ""
        while True:
            self._look_for_brace()
            turns = self._turns[self._kind]
            place, mark = turns.first(self._rest, last=last)
            said += self._write(self._rest[:place])
            self._rest = self._rest[place + len(mark or "") :]
            if mark is None:
                return said
            said += self._turn(mark, turns.to[mark])

    def _look_for_brace(self) -> None:
        """Take what begins with one for a call, where the model marks its calls with no more."""
        if self._bare_calls and self._kind == "content" and not self._said:
            text = self._blanks + self._rest
            call = text.lstrip()
            if call.startswith("{"):
                self._opened = text[: len(text) - len(call)]
                self._kind, self._rest, self._blanks = "call", call, ""

    def _write(self, text: str) -> str:
        if self._kind == "call":
            self._call.append(text)
            return ""
        text = self._blanks + text
        if self._fresh:
            text = text.lstrip()
        said = text.rstrip()
        self._blanks = text[len(said) :]
        if not said:
            return ""
        self._fresh = False
        if self._kind == "reasoning":
            self.reasoning += said
            return ""
        self._said = True
        return said

    def _turn(self, mark: str, kind: Kind) -> str:
        before, self._kind = self._kind, kind
        if before == "call":
            return self._close_call(mark)
        if kind == "call":
            self._opened, self._blanks = self._blanks + mark, ""
        elif kind != before:
            self._blanks, self._fresh = "", kind == "reasoning" or not self._said
        return ""

    def _close_call(self, mark: str = "") -> str:
        text, opened = "".join(self._call), self._opened
        again = mark and self._kind == "call"
        self._call, self._opened = [], mark if again else ""
        if calls := read_calls(text, self._tools):
            self.calls += calls
            self._fresh = not self._said
            return ""
        self._said, self._fresh = True, False
        return opened + text + ("" if again else mark)


class _Turns:
    """The marks that are looked for while one kind is written, and what each leads ``to``."""

    def __init__(self, to: Mapping[str, Kind]) -> None:
        self.to = to
        whole = "|".join(map(re.escape, sorted(to, key=len, reverse=True))) or "(?!)"
        begun = "|".join(map(_beginning, to)) or "(?!)"
        self._whole = re.compile(f"({whole})")
        self._whole_or_begun = re.compile(rf"(?:{begun})\Z|({whole})")

    def first(self, text: str, *, last: bool) -> tuple[int, str | None]:
        """Where the first mark is, and which; or from where on there may be one, or a longer."""
        found = (self._whole if last else self._whole_or_begun).search(text)
        return (found.start(), found[1]) if found else (len(text), None)


def _beginning(mark: str) -> str:
    """A pattern of all that a mark begins with, and that is not the whole of it."""
    pattern = ""
    for char in reversed(mark[:-1]):
        pattern = re.escape(char) + (f"(?:{pattern})?" if pattern else "")
    return pattern


@cache
def _turns(marks: Marks) -> dict[Kind, _Turns]:
    """By what is being written: what ends it."""
    content: dict[str, Kind] = dict.fromkeys(marks.ignored, "content")
    reasoning: dict[str, Kind] = {}
    call: dict[str, Kind] = {}
    if marks.thinking:
        opens, closes = marks.thinking
        content |= {closes: "content", opens: "reasoning"}
        reasoning |= {opens: "reasoning", closes: "content"}
    for opens, closes in marks.calls:
        content[opens] = "call"
        call |= {closes: "content"} if closes else {opens: "call"}
    return {"content": _Turns(content), "reasoning": _Turns(reasoning), "call": _Turns(call)}


_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought\n", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
)
_CALLS = (
    ("<tool_call>", "</tool_call>"),
    ("[TOOL_CALLS]", ""),
    ("<|python_tag|>", "<|eom_id|>"),
)
_HARMONY = Marks(
    thinking=("<|channel|>analysis<|message|>", "<|end|>"),
    calls=(
        ("<|channel|>commentary to=functions.", "<|call|>"),
        ("<|start|>assistant to=functions.", "<|call|>"),
    ),
    ignored=(
        "<|start|>assistant",
        "<|channel|>final<|message|>",
        "<|channel|>commentary<|message|>",
        "<|return|>",
    ),
)
_BARE = 'Respond in the format {"name"'  # Llama 3's own words


def marks_of(chat_template: str, response_template: Mapping[str, Any] | None = None) -> Marks:
    """Guess a model's marks from its chat template.

    What its tokenizer's ``response_template`` says plainly is no guess, and comes first.
    """
    if "<|channel|>" in chat_template and "<|message|>" in chat_template:
        return _HARMONY
    thinking = next((pair for pair in _THINKING if any(m in chat_template for m in pair)), None)
    calls = tuple(pair for pair in _CALLS if pair[0] in chat_template)
    told = (response_template or {}).get("fields", {})
    for name in ("reasoning_content", "reasoning", "thinking"):
        thinking = _literal(told.get(name)) or thinking
    if pair := _literal(told.get("tool_calls")):
        calls = (pair,)
    return Marks(thinking=thinking, calls=calls, bare_calls=_BARE in chat_template)


def _literal(told: Any) -> tuple[str, str] | None:
    """The marks of a response template's field, where it names both as they are written."""
    if not isinstance(told, Mapping):
        return None
    opens, closes = told.get("open"), told.get("close")
    return (opens, closes) if isinstance(opens, str) and isinstance(closes, str) else None
