"""Replies to messages with pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.chat_template import (
    ChatTemplate,
    as_templates_have_it,
    check_calls,
    does_not_suit,
    told,
)
from backend.adapters.long_texts import or_more
from backend.adapters.vision_base import as_picture, of_one_shape, stack
from backend.adapters.vision_text import PICTURE_TOKENS, PictureWriter
from backend.errors import CraneError, InvalidRequest

logger = logging.getLogger("crane.adapters")


class PictureChat(PictureWriter):
    """A model with a chat template that has places for pictures."""

    pads_left = True

    def load(self) -> None:
        super().load()
        self._template = ChatTemplate(self.processor, self.tokenizer)
        self.kept_tokens = self._template.kept_tokens
        # What stands in a prompt for a picture; a caller's own would have no picture to it.
        named = {n: v for n, v in vars(self.processor).items() if n.endswith("_token")}
        self._places = sorted({mark for mark in named.values() if isinstance(mark, str) and mark})

    def load_processor(self, weights: str, how: dict[str, Any]) -> Any:
        import transformers

        try:
            return transformers.AutoProcessor.from_pretrained(weights, **how)
        except ImportError:
            # Some processors read films too, with torchvision, which is not needed for pictures.
            return _without_films(self.model.config.model_type).from_pretrained(weights, **how)

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        parts = [part for _, part in _parts(value["messages"])]
        told = [part for part in parts if part["type"] == "text"]
        told += [one for one in value["messages"] if "tool_calls" in one] + value.get("tools", [])
        pictures: int = PICTURE_TOKENS * sum(part["type"] == "image" for part in parts)
        texts: int = sum(super(PictureChat, self).size(one, {}) for one in told)
        return pictures + texts

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: dict[int, Prediction | CraneError] = {}
        features: dict[int, dict[str, Any]] = {}
        for place in batch.pending(range(len(batch))):
            try:
                features[place] = self._features(batch.inputs[place], batch.options)
            except InvalidRequest as error:
                results[place] = error
        texts = {place: _of_text(mine) for place, mine in features.items()}
        seen = {
            place: {name: one for name, one in mine.items() if name not in texts[place]}
            for place, mine in features.items()
        }
        for group in of_one_shape(seen):
            if not (places := batch.waited_for(group)):
                continue
            ids = [texts[place]["input_ids"][0].tolist() for place in places]
            prompts = [len(one) for one in ids]
            most = batch.options["max_tokens"]
            inputs = stack([seen[place] for place in places], self.model)
            padded = [self._pad(texts[place], max(prompts)) for place in places]
            inputs |= stack(padded, self.model)
            written = self.write(
                inputs,
                places,
                batch,
                prompts=prompts,
                room=[min(most, (self.window or most + one) - one) for one in prompts],
                start=max(prompts),
                replies=[
                    self._template.reply(batch.inputs[place], prompt)
                    for place, prompt in zip(places, ids, strict=True)
                ],
            )
            for place, prediction in zip(places, written, strict=True):
                images = len(_pictures(batch.inputs[place]["messages"]))
                prediction.usage = {**prediction.usage, "images": images}
                results[place] = prediction
        return [results.get(place) or too_late() for place in range(len(batch))]

    def _features(self, value: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """What the model reads of one conversation; raises ``InvalidRequest``."""
        import jinja2

        messages, extra = value["messages"], self._template.extra(value, options)
        for at, text in _texts(value):
            if mark := next((mark for mark in self._places if mark in text), None):
                fault = f"has {mark}, which this model reads as the place of a picture"
                raise InvalidRequest.of({at: fault})
        check_calls(value, self.window, self.tokenizer)
        text = told(messages)
        part = self.readable(text, "input.messages")
        if self.window is not None and len(part) < len(text):
            raise self._too_long(len(self.tokenizer(part, verbose=False)["input_ids"]))
        pictures = [as_picture(part["image"], f"{at}.image") for at, part in _pictures(messages)]
        try:
            features = self._encode(messages, pictures, extra)
        except (jinja2.TemplateError, TypeError) as error:
            raise does_not_suit(error) from None
        except ValueError:
            logger.debug("a processor's refusal", exc_info=True)
            self._encode(messages, [picture.resize((64, 64)) for picture in pictures], extra)
            fault = "have a picture of sides that this model cannot take"
            raise InvalidRequest.of({"input.messages": fault}) from None
        tokens = features["input_ids"].shape[1]
        if self.window is not None and tokens >= self.window:
            raise self._too_long(tokens)
        return features

    def _too_long(self, tokens: int) -> InvalidRequest:
        assert self.window is not None
        count = or_more(tokens, self.window)
        fault = f"have {count} tokens with their pictures, and the model's window is {self.window}"
        return InvalidRequest.of({"input.messages": f"{fault}; shorten them"})

    def _encode(
        self, messages: list[dict[str, Any]], pictures: list[Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        left = iter(pictures)
        conversation = []
        for message in messages:
            content = [
                {"type": "image", "image": next(left)} if part["type"] == "image" else part
                for part in message.get("content", [])
            ]
            conversation.append({**as_templates_have_it(message), "content": content})
        return dict(
            self.processor.apply_chat_template(
                conversation,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **extra,
            )
        )

    def _pad(self, text: Mapping[str, Any], width: int) -> dict[str, Any]:
        """A text's features with padding before them."""
        import torch

        padding = {"input_ids": self.tokenizer.pad_token_id or 0}
        return {
            name: torch.nn.functional.pad(
                one, (width - one.shape[1], 0), value=padding.get(name, 0)
            )
            for name, one in text.items()
        }


def _of_text(features: Mapping[str, Any]) -> dict[str, Any]:
    """Those features that have a column for each token."""
    shape = features["input_ids"].shape
    return {name: one for name, one in features.items() if one.shape == shape}


def _parts(messages: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Each part of a conversation and where it is."""
    return [
        (f"input.messages[{row}].content[{column}]", part)
        for row, message in enumerate(messages)
        for column, part in enumerate(message.get("content", []))
    ]


def _texts(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """All that a model is told in words, and where it is."""
    for at, part in _parts(value["messages"]):
        yield f"{at}.text", part.get("text", "")
    for name in ("messages", "tools"):
        for place, one in enumerate(value.get(name, [])):
            rest = {key: told for key, told in one.items() if key != "content"}
            yield f"input.{name}[{place}]", orjson.dumps(rest).decode()


def _pictures(messages: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(at, part) for at, part in _parts(messages) if part["type"] == "image"]


def _without_films(kind: str) -> Any:
    """The class of a model's processor, less what reads films."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    base: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[kind])

    class WithoutFilms(base):  # type: ignore[misc]  # transformers is not typed
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, config: dict[str, Any], **kwargs: Any) -> Any:
            return super().from_args_and_dict(args, config, **{**kwargs, "video_processor": None})

    return WithoutFilms
