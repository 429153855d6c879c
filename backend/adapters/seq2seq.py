"""Encoder-decoder generators: summaries, translations, and text for text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.adapters.generation import Generator
from backend.errors import InvalidRequest, echoed


class Seq2SeqGenerator(Generator):
    """An encoder-decoder model: it reads the whole input, then writes."""

    auto_class = "AutoModelForSeq2SeqLM"

    def load(self) -> None:
        super().load()
        config = self.model.config
        names = ("max_decoder_position_embeddings", "max_position_embeddings")
        positions = [value for name in names if (value := getattr(config, name, None))]
        self._positions: int | None = positions[0] if positions else None

    def encode(self, value: Any, options: Mapping[str, Any], **how: Any) -> list[int]:
        return super().encode(options["prefix"] + value, options, **how)

    def room(self, prompt: list[int], options: Mapping[str, Any]) -> int:
        most: int = options["max_tokens"]
        # The decoder's start token takes a position too.
        return most if self._positions is None else min(most, self._positions - 1)


class Translator(Seq2SeqGenerator):
    """Also speaks to multilingual models, whose tokenizers want the languages by code."""

    def load(self) -> None:
        super().load()
        self._source_language = getattr(self.tokenizer, "src_lang", None)

    def encode(self, value: Any, options: Mapping[str, Any], **how: Any) -> list[int]:
        for option in ("source_language", "target_language"):
            code = options[option]
            if code is not None and self._language(code) is None:
                fault = f"is {echoed(code)}, which is not a language code of this model"
                raise InvalidRequest.of({f"options.{option}": fault})
        if self._source_language is not None:
            # Set each time: the tokenizer remembers the language of the batch before.
            self.tokenizer.src_lang = options["source_language"] or self._source_language
        return super().encode(value, options, **how)

    def config(self, options: dict[str, Any], max_new_tokens: int) -> Any:
        config = super().config(options, max_new_tokens)
        if options["target_language"] is not None:
            config.forced_bos_token_id = self._language(options["target_language"])
        return config

    def _language(self, code: str) -> int | None:
        """The id of a language's token; None for a code that the tokenizer does not know."""
        if not hasattr(self.tokenizer, "src_lang"):
            return None
        if hasattr(self.tokenizer, "lang_code_to_token"):  # M2M100 writes "de" as "__de__"
            code = self.tokenizer.lang_code_to_token.get(code, "")
        if code in self.tokenizer.special_tokens_map.values():  # "<mask>" is no language
            return None
        token: int | None = self.tokenizer.get_added_vocab().get(code)
        return token
