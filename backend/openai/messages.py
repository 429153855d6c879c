"""A chat's messages and tools: as OpenAI's clients send them, and as Crane's tasks take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from marshmallow import ValidationError, validates_schema

from backend.errors import InvalidRequest
from backend.openai.base import Nullable, Only
from backend.registry import ModelSpec
from backend.schemas import AnyObject, Boolean, ByType, Choice, ListOf, ObjectOf, StringOr, Text

# Roles in OpenAI's words that are others in ours.
_ROLES = {"developer": "system"}


class Arguments(Text):
    """The arguments of a tool call: a string that is a JSON object."""

    expected = "a string with a JSON object in it"

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        try:
            arguments = orjson.loads(super()._deserialize(value, attr, data, **kwargs))
        except orjson.JSONDecodeError as error:
            raise ValidationError(f"is not valid JSON: {error}") from None
        if type(arguments) is not dict:
            raise ValidationError(f"must be {self.expected}")
        return arguments


class CalledFunction(Nullable):
    name = Text(required=True)
    arguments = Arguments(required=True)


class ToolCall(Nullable):
    id = Text(required=True)
    type = Choice(["function"], required=True)
    function = ObjectOf(CalledFunction, required=True)


class Function(Nullable):
    name = Text(required=True)
    description = Text(blank=True)
    parameters = AnyObject()
    strict = Boolean()


class Tool(Nullable):
    type = Choice(["function"], required=True)
    function = ObjectOf(Function, required=True)


class NamedFunction(Nullable):
    name = Text(required=True)


class NamedTool(Nullable):
    type = Choice(["function"], required=True)
    function = ObjectOf(NamedFunction, required=True)


class TextPart(Nullable):
    type = Choice(["text"], required=True)
    text = Text(blank=True, required=True)


class ImageUrl(Nullable):
    url = Text(required=True)
    detail = Only("auto")


class ImagePart(Nullable):
    type = Choice(["image_url"], required=True)
    image_url = ObjectOf(ImageUrl, required=True)


class Message(Nullable):
    """What of it a model can be told is for the model's task to say."""

    role = Choice(["developer", "system", "user", "assistant", "tool"], required=True)
    content = StringOr(
        ListOf(ByType({"text": TextPart, "image_url": ImagePart}), low=1, high=1000),
        expected="a string, or a list of parts of type text or image_url",
    )
    name = Text()
    reasoning_content = Text(blank=True)
    tool_calls = ListOf(ObjectOf(ToolCall), low=1, high=128)
    tool_call_id = Text()

    @validates_schema
    def _says_something(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "content" not in data and "tool_calls" not in data:
            raise ValidationError({"content": ["is missing"]})


def input_of(body: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The input that a body's messages and tools come to.

    What can be said to no model of this type, its task refuses.
    """
    sees = spec.type == "image-text-to-text"
    messages = [_message(one, f"messages[{i}]", sees) for i, one in enumerate(body["messages"])]
    if "tools" not in body or body.get("tool_choice") == "none":
        return {"messages": messages}
    input_ = {"messages": messages, "tools": [_tool(one) for one in body["tools"]]}
    choice = body.get("tool_choice", "auto")
    if choice == "auto":
        return input_
    return {**input_, "tool_choice": choice if type(choice) is str else choice["function"]}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in Crane's words, which have none for ``strict``: it is as it has to be anyway."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}


def _message(message: dict[str, Any], at: str, sees: bool) -> dict[str, Any]:
    """A message in Crane's words; the task refuses what its models cannot be told."""
    ours = {**message, "role": _ROLES.get(message["role"], message["role"])}
    if type(message.get("content")) is list:
        ours["content"] = _content(message["content"], f"{at}.content", sees)
    if "tool_calls" in message:
        ours["tool_calls"] = [
            {"id": call["id"], **call["function"]} for call in message["tool_calls"]
        ]
    return ours


def _content(parts: list[dict[str, Any]], at: str, sees: bool) -> Any:
    if sees:
        return [
            part if part["type"] == "text" else {"type": "image", "image": part["image_url"]["url"]}
            for part in parts
        ]
    if faults := {
        f"{at}[{i}].type": "is 'image_url', and this model reads text alone"
        for i, part in enumerate(parts)
        if part["type"] != "text"
    }:
        raise InvalidRequest.of(faults)
    return "\n".join(part["text"] for part in parts)
