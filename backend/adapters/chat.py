"""Chats with decoder-only models: what their templates are told, and what their replies hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from backend.adapters.detokenizer import special_tokens_of
from backend.adapters.generation import CausalGenerator
from backend.errors import CraneError, InvalidRequest, ModelUnavailable
from backend.replies import Reply, marks_of


class Chat(CausalGenerator):
    """A decoder-only model with a chat template."""

    special_tokens = False  # the template has written them

    def load(self) -> None:
        super().load()
        template = self.tokenizer.chat_template
        if not template:
            raise ModelUnavailable("It has no chat template, so it cannot serve type chat.")
        # Some have one template for calls with tools, and another for those without.
        self._template = template if isinstance(template, str) else "\n".join(template.values())
        self._marks = marks_of(self._template, getattr(self.tokenizer, "response_template", None))
        self.kept_tokens = [
            token
            for token, written in special_tokens_of(self.tokenizer).items()
            if any(written in mark for mark in self._marks.all)
        ]

    def prompt(self, value: Any, options: Mapping[str, Any]) -> str | CraneError:
        import jinja2

        extra: dict[str, Any] = {}
        if value.get("tools"):
            extra["tools"] = value["tools"]
            if not re.search(r"\btools\b", self._template):
                return InvalidRequest.of({"input.tools": "are nothing that this model can be told"})
        if options["thinking"] is not None:
            extra["enable_thinking"] = options["thinking"]
            if "enable_thinking" not in self._template:
                fault = "is nothing that this model can be told; leave it out"
                return InvalidRequest.of({"options.thinking": fault})
        try:
            prompt: str = self.tokenizer.apply_chat_template(
                [_as_templates_have_it(message) for message in value["messages"]],
                tokenize=False,
                add_generation_prompt=True,
                **extra,
            )
        except (jinja2.TemplateError, TypeError) as error:
            # The model's own rule in its own words, such as "roles must alternate"; or its
            # template cannot take what stands where it has texts.
            return InvalidRequest.of({"input.messages": f"do not suit this model: {error}"})
        return prompt

    def reply(self, value: Any, prompt: list[int]) -> Reply | None:
        tools = value.get("tools", [])
        marks = self._marks if tools else self._marks.without_calls()
        if not marks:
            return None
        end = self.tokenizer.decode(prompt[-16:])  # more than any mark has
        return Reply(marks, thinking=marks.opened_by(end), tools=tools)

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        told = [*value["messages"], *value.get("tools", [])]
        return sum(super(Chat, self).size(one, options) for one in told)


def _as_templates_have_it(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the words of transformers' chat templates."""
    if "tool_calls" not in message:
        return message
    calls = [
        {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        | ({"id": call["id"]} if "id" in call else {})
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
