"""Chats with decoder-only models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.adapters.chat_template import (
    ChatTemplate,
    as_templates_have_it,
    check_calls,
    does_not_suit,
    ends_of,
    told,
)
from backend.adapters.generation import CausalGenerator
from backend.adapters.grammar import Form
from backend.errors import InvalidRequest
from backend.replies import Marks, Reply
from backend.tool_calls import schema_of_a_call, to_call

# What a text that is a call and no more cannot have.
BEYOND_A_CALL = {"response_format": None, "min_tokens": 0, "num_beams": 1}


class Chat(CausalGenerator):
    """A decoder-only model with a chat template."""

    def load(self) -> None:
        super().load()
        self._template = ChatTemplate(self.tokenizer, self.tokenizer)
        self.kept_tokens = self._template.kept_tokens

    def encode(self, value: Any, options: Mapping[str, Any], **how: Any) -> list[int]:
        import jinja2

        extra = self._template.extra(value, options)
        check_calls(value, self.window, self.tokenizer)
        messages = value["messages"]
        text = told(messages)
        if len(part := self.readable(text)) < len(text):
            if not options["truncate"]:
                raise self.too_long(len(self.tokenizer(part, verbose=False)["input_ids"]))
            messages = ends_of(messages, len(part))
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                [as_templates_have_it(message) for message in messages],
                add_generation_prompt=True,
                return_dict=False,
                # What a caller writes is text, also where it looks like the end of a message.
                sanitize_control_tokens=self._template.is_to_sanitize(value),
                tokenizer_kwargs={"verbose": False},
                **how,
                **extra,
            )
        except (jinja2.TemplateError, TypeError, ValueError, NotImplementedError) as error:
            raise does_not_suit(error) from None
        return ids

    def form(self, value: Any, options: Mapping[str, Any]) -> Form | None:
        if not (tools := to_call(value)):
            return super().form(value, options)
        for name, idle in BEYOND_A_CALL.items():
            if options[name] != idle:
                fault = "cannot be set where a tool has to be called"
                raise InvalidRequest.of({f"options.{name}": fault})
        return Form(schema_of_a_call(tools), "input.tool_choice")

    def reply(self, value: Any, prompt: list[int]) -> Reply | None:
        if tools := to_call(value):
            return Reply(Marks(bare_calls=True), tools=tools)
        return self._template.reply(value, prompt)

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        told = [*value["messages"], *value.get("tools", [])]
        return sum(super(Chat, self).size(one, options) for one in told)
