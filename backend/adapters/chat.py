"""Chats with decoder-only models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.adapters.chat_template import ChatTemplate, as_templates_have_it, does_not_suit
from backend.adapters.generation import CausalGenerator
from backend.replies import Reply


class Chat(CausalGenerator):
    """A decoder-only model with a chat template."""

    def load(self) -> None:
        super().load()
        self._template = ChatTemplate(self.tokenizer, self.tokenizer)
        self.kept_tokens = self._template.kept_tokens

    def encode(self, value: Any, options: Mapping[str, Any], **how: Any) -> list[int]:
        import jinja2

        extra = self._template.extra(value, options)
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                [as_templates_have_it(message) for message in value["messages"]],
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

    def reply(self, value: Any, prompt: list[int]) -> Reply | None:
        return self._template.reply(value, prompt)

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        told = [*value["messages"], *value.get("tools", [])]
        return sum(super(Chat, self).size(one, options) for one in told)
