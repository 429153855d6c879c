"""POST /v1/chat/completions: messages in, replies out."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson
from marshmallow import ValidationError, validates_schema

from backend.engine.calls import Event
from backend.openai.base import Nullable, Only, Option, Order, Route, each, in_body
from backend.openai.messages import Message, NamedTool, Tool, input_of
from backend.openai.streaming import Style, chunks_of
from backend.openai.writing import Writing, facts, head, usage
from backend.registry import ModelSpec
from backend.schemas import (
    AnyObject,
    Boolean,
    Choice,
    Integer,
    ListOf,
    ObjectOf,
    StringOr,
    Text,
)


class JsonSchema(Nullable):
    name = Text(required=True)
    description = Text(blank=True)
    schema = AnyObject(required=True)
    strict = Boolean()


class ResponseFormat(Nullable):
    type = Choice(["text", "json_object", "json_schema"], required=True)
    json_schema = ObjectOf(JsonSchema)
    value = AnyObject()  # the schema, where huggingface_hub's client writes json_object for it

    @validates_schema
    def _agree(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data["type"] == "json_schema" and "json_schema" not in data:
            raise ValidationError({"json_schema": ["is missing"]})
        if data["type"] != "json_schema" and "json_schema" in data:
            raise ValidationError({"json_schema": ["is for the type json_schema"]})
        if data["type"] != "json_object" and "value" in data:
            raise ValidationError({"value": ["is for the type json_object"]})


class Effort(Option):
    """How much to think: nothing is all that a model can be told here."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        Only("none")._deserialize(value, attr, data, **kwargs)
        return False


class TemplateOptions(Nullable):
    enable_thinking = Boolean()


class TemplateOption(Option):
    """vLLM's way to tell a model's template something: whether to think, here."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        return ObjectOf(TemplateOptions).deserialize(value).get("enable_thinking")


class ChatBody(Writing):
    messages = ListOf(ObjectOf(Message), low=1, high=1000, required=True)
    max_completion_tokens = Option("max_tokens")
    logprobs = Boolean(load_default=False)
    top_logprobs = Integer(low=0, high=20)
    response_format = ObjectOf(ResponseFormat)
    reasoning_effort = Effort("thinking")
    chat_template_kwargs = TemplateOption("thinking")
    tools = ListOf(ObjectOf(Tool), low=1, high=128)
    tool_choice = StringOr(
        ObjectOf(NamedTool),
        expected="'none', 'auto', 'required' or an object that names a function",
        words=("none", "auto", "required"),
    )
    parallel_tool_calls = Boolean()
    modalities = Only(["text"])
    metadata = AnyObject()  # labels of what is stored, and nothing is
    store = Only(False)
    service_tier = Only("auto", "default")
    logit_bias = Only({})

    @validates_schema
    def _agree(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "top_logprobs" in data and not data["logprobs"]:
            raise ValidationError({"top_logprobs": ["is for a call with logprobs: true"]})
        if "tool_choice" in data and "tools" not in data:
            raise ValidationError({"tool_choice": ["is for a call with tools"]})
        if data.get("tool_choice", "auto") not in ("none", "auto"):
            return  # one tool is called, and as its schema says
        where = "can only be so where tool_choice has a tool called"
        if data.get("parallel_tool_calls") is False:
            raise ValidationError({"parallel_tool_calls": [where]})
        for place, tool in enumerate(data.get("tools", [])):
            if tool["function"].get("strict"):
                fault = {"function": {"strict": [where]}}
                raise ValidationError({"tools": {place: fault}})


def ask(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {}
    if body["logprobs"]:
        options["top_logprobs"] = body.get("top_logprobs", 0)
    wanted = body.get("response_format", {"type": "text"})
    schema = wanted.get("value") or wanted.get("json_schema", {}).get("schema")
    if schema is not None:
        options["response_format"] = {"type": "json_schema", "schema": schema}
    elif wanted["type"] != "text":
        options["response_format"] = {"type": wanted["type"]}
    return input_of(body, spec), options


def at(path: str, order: Order) -> str:
    path = in_body(path, "messages")
    path = path.replace("tool_choice.name", "tool_choice.function.name")
    path = re.sub(r"(\.tool_calls\[\d+\])\.(name|arguments)", r"\1.function.\2", path)
    return path.removesuffix(".image") + ".image_url.url" if path.endswith(".image") else path


def reply(text: str, told: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if told["reasoning_content"]:
        message["reasoning_content"] = told["reasoning_content"]
    if told["tool_calls"]:
        message["content"] = text or None
        message["tool_calls"] = [tool_call(call) for call in told["tool_calls"]]
    return message


def tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = orjson.dumps(call["arguments"]).decode()
    return {
        "id": secrets.token_hex(5)[:9],  # nine, for Mistral's templates take no other
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


def finish_reason(told: Mapping[str, Any]) -> str | None:
    return "tool_calls" if told["tool_calls"] else told["finish_reason"]


def logprobs(told: Mapping[str, Any]) -> dict[str, Any] | None:
    if told["logprobs"] is None:
        return None
    content = [
        {"token": one["token"], "logprob": one["logprob"], "bytes": one["bytes"]}
        | {"top_logprobs": one["top"]}
        for one in told["logprobs"]
    ]
    return {"content": content, "refusal": None}


def answer(order: Order, output: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    choices = []
    for index, text in enumerate(each(order, output)):
        told = facts(metadata, index, batched=order.batched)
        choices.append(
            {
                "index": index,
                "message": reply(text, told),
                "logprobs": logprobs(told),
                "finish_reason": finish_reason(told),
            }
        )
    begun = head("chat.completion", order.spec.id, metadata["request_id"])
    return {**begun, "choices": choices, "usage": usage(metadata)}


def _last(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if told["tool_calls"]:
        calls = [{"index": i, **tool_call(call)} for i, call in enumerate(told["tool_calls"])]
        yield _delta({"tool_calls": calls})
    yield {"delta": {}, "logprobs": logprobs(told), "finish_reason": finish_reason(told)}


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"delta": delta, "logprobs": None, "finish_reason": None}


def _more(text: str, kind: str | None) -> dict[str, Any]:
    return _delta({"reasoning_content" if kind == "reasoning" else "content": text})


_STYLE = Style(
    kind="chat.completion.chunk",
    first=lambda: _delta({"role": "assistant", "content": ""}),
    more=_more,
    last=_last,
)


def chunks(order: Order, events: Iterable[Event | None], request_id: str) -> Iterator[str]:
    return chunks_of(_STYLE, order, events, request_id)


CHAT_COMPLETIONS = Route(
    path="/v1/chat/completions",
    types=("chat", "image-text-to-text"),
    body=ChatBody,
    main="messages",
    ask=ask,
    answer=answer,
    names={"top_logprobs": "logprobs", "response_format": "response_format"},
    chunks=chunks,
    at=at,
    repeats=True,
)
