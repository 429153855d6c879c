"""Chats with decoder-only models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.adapters.chat_template import ChatTemplate, as_templates_have_it, does_not_suit
from backend.adapters.generation import CausalGenerator
from backend.errors import CraneError, InvalidRequest
from backend.replies import Reply


class Chat(CausalGenerator):
    """A decoder-only model with a chat template."""

    special_tokens = False  # the template has written them

    def load(self) -> None:
        super().load()
        self._template = ChatTemplate(self.tokenizer, self.tokenizer)
        self.kept_tokens = self._template.kept_tokens

    def prompt(self, value: Any, options: Mapping[str, Any]) -> str | CraneError:
        import jinja2

        try:
            prompt: str = self.tokenizer.apply_chat_template(
                [as_templates_have_it(message) for message in value["messages"]],
                tokenize=False,
                add_generation_prompt=True,
                **self._template.extra(value, options),
            )
        except (jinja2.TemplateError, TypeError) as error:
            return does_not_suit(error)
        except InvalidRequest as error:
            return error
        return prompt

    def reply(self, value: Any, prompt: list[int]) -> Reply | None:
        return self._template.reply(value, prompt)

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        told = [*value["messages"], *value.get("tools", [])]
        return sum(super(Chat, self).size(one, options) for one in told)
