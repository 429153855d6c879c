"""A model's chat template: what it can be told, and how replies to its prompts are taken apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from backend.adapters.detokenizer import special_tokens_of
from backend.adapters.long_texts import or_more, readable
from backend.errors import InvalidRequest, ModelUnavailable
from backend.replies import Reply, marks_of

# Characters times tokens that are looked for: at most 0.1 s, where each nearly matches everywhere.
MAX_SEARCH = 15_000_000


class ChatTemplate:
    """The template of a tokenizer, or of a processor; raises ``ModelUnavailable`` for none."""

    def __init__(self, owner: Any, tokenizer: Any) -> None:
        template = getattr(owner, "chat_template", None)
        if not template:
            raise ModelUnavailable("It has no chat template, so it cannot read messages.")
        # Some have one template for calls with tools, and another for those without.
        self._text = template if isinstance(template, str) else "\n".join(template.values())
        self._tokenizer = tokenizer
        self._marks = marks_of(self._text, getattr(tokenizer, "response_template", None))
        special = special_tokens_of(tokenizer)
        # The special tokens that are text to a reply.
        self.kept_tokens = [
            token
            for token, written in special.items()
            if any(written in mark for mark in self._marks.all)
        ]
        added = {str(one.content) for one in tokenizer.added_tokens_decoder.values()}
        shown = {one for one in added if one in self._text and not one.isspace()}
        # As they are in JSON.
        self._control = [orjson.dumps(one).decode()[1:-1] for one in shown | {*special.values()}]

    def extra(self, value: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """What it is told beside the messages; raises ``InvalidRequest`` where it cannot be."""
        extra: dict[str, Any] = {}
        if value.get("tools"):
            extra["tools"] = value["tools"]
            if not re.search(r"\btools\b", self._text):
                raise InvalidRequest.of({"input.tools": "are nothing that this model can be told"})
        if options["thinking"] is not None:
            extra["enable_thinking"] = options["thinking"]
            if "enable_thinking" not in self._text:
                fault = "is nothing that this model can be told; leave it out"
                raise InvalidRequest.of({"options.thinking": fault})
        return extra

    def is_to_sanitize(self, value: Mapping[str, Any]) -> bool:
        """Whether a caller has written what looks like a control token.

        Only then is the tokenizer told to read it as text: that takes it 20 ms where it has
        thousands of added tokens, as Gemma's have. To look for each of those in a long text may
        take seconds, so that is always read so.
        """
        written = orjson.dumps(value).decode()
        if len(written) * len(self._control) > MAX_SEARCH:
            return True
        return any(token in written for token in self._control)

    def reply(self, value: Mapping[str, Any], prompt: list[int]) -> Reply | None:
        """What takes apart what is written after a prompt; None where all of it is content."""
        tools = value.get("tools", [])
        marks = self._marks if tools else self._marks.without_calls()
        if not marks:
            return None
        end = self._tokenizer.decode(prompt[-16:])  # more than any mark has
        return Reply(marks, thinking=marks.opened_by(end), tools=tools)


def does_not_suit(error: Exception) -> InvalidRequest:
    """The model's own rule in its own words, such as "roles must alternate".

    Or its template cannot take what stands where it has texts.
    """
    return InvalidRequest.of({"input.messages": f"do not suit this model: {error}"})


def as_templates_have_it(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the words of transformers' chat templates."""
    if "tool_calls" not in message:
        return message
    calls = [
        {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        | ({"id": call["id"]} if "id" in call else {})
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def told(messages: list[dict[str, Any]]) -> str:
    """All that is said in messages, in order, but for thinking, which templates leave out."""
    return "\n".join(map(_said, messages))


def _said(message: dict[str, Any]) -> str:
    content = message.get("content", "")
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    if message["role"] == "assistant":
        content = content.rpartition("</think>")[2]
    return str(content.strip())


def check_calls(value: Mapping[str, Any], window: int | None, tokenizer: Any) -> None:
    """Refuse tools and calls that fit no window, as a template would have them tokenised whole."""
    calls = [call for message in value["messages"] for call in message.get("tool_calls", ())]
    tools = value.get("tools", [])
    if window is None or not (tools or calls):
        return
    at = "input.tools" if tools else "input.messages"
    text = orjson.dumps([*tools, *calls]).decode()
    if len(part := readable(text, window, tokenizer, at=at)) < len(text):
        count = or_more(len(tokenizer(part, verbose=False)["input_ids"]), window)
        fault = f"have {count} tokens of tools and calls, and the model's window is {window}"
        raise InvalidRequest.of({at: f"{fault}; shorten them"})


def ends_of(messages: list[dict[str, Any]], characters: int) -> list[dict[str, Any]]:
    """Messages that say no more than the last so many ``characters`` of ``told``.

    For a prompt of which the end alone is read.
    """
    shortened = []
    for message in reversed(messages):
        text = _said(message)
        if len(text) > characters:
            message = {**message, "content": text[len(text) - max(characters, 0) :]}
        characters -= len(text) + 1
        shortened.append(message)
    return shortened[::-1]
