"""Text in, text out: summaries, translations, completions, replies."""

from __future__ import annotations

import re
from typing import Any

from marshmallow import ValidationError, pre_load, validates_schema
from marshmallow.validate import Length

from backend.errors import did_you_mean
from backend.schemas import (
    AnyObject,
    Boolean,
    ByType,
    Choice,
    Integer,
    ListOf,
    Number,
    ObjectOf,
    StrictField,
    StrictSchema,
    StringOr,
    Text,
)
from backend.tasks import usage
from backend.tasks.base import MAX_SEED, TRUNCATE, Options, Task, about

MOST_JSON = 65536  # bytes of a schema, and of the arguments of a call


class GenerationOptions(Options):
    """Every text generator's options. The defaults are greedy: the same answer every time."""

    max_tokens = Integer(
        low=1, high=32768, load_default=256, metadata=about("most tokens to write")
    )
    min_tokens = Integer(
        low=0, high=32768, load_default=0, metadata=about("fewest tokens to write")
    )
    temperature = Number(
        low=0.0, high=2.0, load_default=0.0, metadata=about("0 is greedy; above 0 draws")
    )
    top_p = Number(low=0.01, high=1.0, load_default=1.0, metadata=about("nucleus to draw from"))
    top_k = Integer(
        low=0, high=1000, load_default=0, metadata=about("likeliest tokens to draw from; 0 is all")
    )
    stop = ListOf(
        Text(blank=True, validate=Length(max=1000, error="must have {max} characters at most")),
        high=8,
        load_default=list,
        metadata=about("strings that end the text; none of them is part of it"),
    )
    seed = Integer(
        low=0,
        high=MAX_SEED,
        load_default=None,
        allow_none=True,
        metadata=about("draws repeat with it; input i of a batch uses seed + i"),
    )
    num_beams = Integer(low=1, high=16, load_default=1, metadata=about("beams to search"))
    repetition_penalty = Number(
        low=0.1, high=5.0, load_default=1.0, metadata=about("above 1 avoids repeating")
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)

    @pre_load
    def _defaults_give_way(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """A model's own defaults never clash with what the caller asks for."""
        own = {name: self.fields[name].load_default for name in ("min_tokens", "num_beams")}
        most, heat, beams = (data.get(name) for name in ("max_tokens", "temperature", "num_beams"))
        given = dict(data)
        if "min_tokens" not in data and type(most) is int and most < own["min_tokens"]:
            given["min_tokens"] = most
        if type(heat) in (int, float) and heat:
            given.setdefault("num_beams", 1)
        if type(beams) is int and beams > 1:
            given.setdefault("temperature", 0.0)
        return given

    @validates_schema
    def _agree(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data["min_tokens"] > data["max_tokens"]:
            raise ValidationError(
                f"must not be above max_tokens ({data['max_tokens']})", "min_tokens"
            )
        if data["num_beams"] > 1 and data["temperature"] > 0:
            raise ValidationError("must be 1 when temperature is above 0", "num_beams")
        if "" in data["stop"]:
            raise ValidationError("must not hold an empty string", "stop")


class Format(StrictSchema):
    type = Text(required=True)


class SchemaFormat(Format):
    schema = AnyObject(high=MOST_JSON, required=True)


class FormatField(ByType):
    """What the text is to be: ``{"type": "json_object"}``, or ``json_schema`` with a ``schema``."""

    expected = "an object, or null"

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        return None if value["type"] == "text" else value


FORMATS = {"text": Format, "json_object": Format, "json_schema": SchemaFormat}


class TokenOptions(GenerationOptions):
    """Options that look at each token of each text, as it is written; with beams there are many."""

    response_format = FormatField(
        FORMATS,
        load_default=None,
        allow_none=True,
        metadata=about('{"type": "json_object"}, or json_schema and its schema: it always parses'),
    )
    frequency_penalty = Number(
        low=-2.0,
        high=2.0,
        load_default=0.0,
        metadata=about("taken off a token's score for each time that it was written"),
    )
    presence_penalty = Number(
        low=-2.0,
        high=2.0,
        load_default=0.0,
        metadata=about("taken off the score of each token that was written"),
    )
    top_logprobs = Integer(
        low=0,
        high=20,
        load_default=None,
        allow_none=True,
        metadata=about("tell each token's log probability, and of so many likeliest others"),
    )

    @validates_schema
    def _go_together(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data["response_format"] is not None:
            for name, idle in (("stop", []), ("min_tokens", 0)):
                if data[name] != idle:
                    raise ValidationError("cannot be set with response_format", name)
        for name, idle in OF_TOKENS.items():
            if data["num_beams"] > 1 and data[name] != idle:
                raise ValidationError("cannot be set with num_beams above 1", name)


# With these values such an option does nothing.
OF_TOKENS: dict[str, Any] = {
    "response_format": None,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "top_logprobs": None,
}


class Text2TextOptions(GenerationOptions):
    prefix = Text(
        blank=True, load_default="", metadata=about("put before the input, as T5's tasks want it")
    )


class TranslationOptions(Text2TextOptions):
    source_language = Text(
        load_default=None,
        allow_none=True,
        metadata=about("the code a multilingual model's tokenizer knows, such as eng_Latn"),
    )
    target_language = Text(
        load_default=None, allow_none=True, metadata=about("likewise, such as deu_Latn")
    )


class ThinkingOptions(Options):
    thinking = Boolean(
        load_default=None,
        allow_none=True,
        metadata=about("whether to think first, of a model that can be told; null is as it does"),
    )


class ChatOptions(TokenOptions, ThinkingOptions):
    pass


class ToolName(Text):
    """What a tool is called by."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if not re.fullmatch(r"[\w-]{1,64}", value, re.ASCII):
            raise ValidationError("must be 1 to 64 letters, digits, _ and -")
        return value


class Function(StrictSchema):
    name = ToolName(required=True)
    description = Text(blank=True)
    parameters = AnyObject(high=MOST_JSON)


class Tool(StrictSchema):
    type = Choice(["function"], required=True)
    function = ObjectOf(Function, required=True)


class ToolCall(StrictSchema):
    """As the receipt has it; an ``id`` is for templates that want one."""

    id = Text()
    name = ToolName(required=True)
    arguments = AnyObject(high=MOST_JSON, required=True)


# What messages of some roles may have beside their content.
ONLY_OF = {
    "assistant": ("tool_calls", "reasoning_content"),
    "tool": ("tool_call_id", "name"),
}


class Message(StrictSchema):
    role = Choice(["system", "user", "assistant", "tool"], required=True)
    content: StrictField = Text(blank=True)
    reasoning_content = Text(blank=True)
    tool_calls = ListOf(ObjectOf(ToolCall), low=1, high=128)
    tool_call_id = Text()
    name = ToolName()

    @validates_schema
    def _suits_its_role(self, data: dict[str, Any], **kwargs: Any) -> None:
        faults = {
            name: f"is for a message of the role {role}, not {data['role']}"
            for role, names in ONLY_OF.items()
            for name in names
            if name in data and role != data["role"]
        }
        if "content" not in data and "tool_calls" not in data:
            faults["content"] = "is missing"
        if faults:
            raise ValidationError({name: [fault] for name, fault in faults.items()})


class ToolsInput(StrictSchema):
    tools = ListOf(ObjectOf(Tool), low=1, high=128)

    @validates_schema
    def _no_name_twice(self, data: dict[str, Any], **kwargs: Any) -> None:
        names = [tool["function"]["name"] for tool in data.get("tools", [])]
        if faults := {
            place: {"function": {"name": [f"is {name!r} a second time"]}}
            for place, name in enumerate(names)
            if name in names[:place]
        }:
            raise ValidationError({"tools": faults})


class NamedTool(StrictSchema):
    name = ToolName(required=True)


class ChatInput(ToolsInput):
    messages = ListOf(ObjectOf(Message), low=1, high=1000, required=True)
    tool_choice = StringOr(
        ObjectOf(NamedTool),
        expected="""'auto', 'required' or {"name": …}""",
        words=("auto", "required"),
    )

    @validates_schema
    def _has_what_is_chosen(self, data: dict[str, Any], **kwargs: Any) -> None:
        choice = data.get("tool_choice", "auto")
        if choice == "auto":
            return
        names = [tool["function"]["name"] for tool in data.get("tools", [])]
        if not names:
            raise ValidationError({"tool_choice": ["is for an input with tools"]})
        if choice != "required" and choice["name"] not in names:
            fault = f"is {choice['name']!r}: {did_you_mean(choice['name'], names)}"
            raise ValidationError({"tool_choice": {"name": [fault]}})


SUMMARIZATION = Task(
    name="summarization",
    makes=usage.completion,
    input=Text(),
    options=Text2TextOptions,
    output="the summary, a string",
    example=(
        "The tower is 324 metres tall, about the same height as an 81-storey building, "
        "and the tallest structure in Paris.",
        {"max_tokens": 60},
    ),
)
TRANSLATION = Task(
    name="translation",
    makes=usage.completion,
    input=Text(),
    options=TranslationOptions,
    output="the translation, a string",
    example=("The weather is lovely today.", {"max_tokens": 60}),
)
TEXT2TEXT_GENERATION = Task(
    name="text2text-generation",
    makes=usage.completion,
    input=Text(),
    options=Text2TextOptions,
    output="the text the model answers with, a string",
    example=("Answer the question: what is the capital of France?", {"max_tokens": 20}),
)
TEXT_GENERATION = Task(
    name="text-generation",
    makes=usage.completion,
    input=Text(),
    options=TokenOptions,
    output="the continuation without the prompt, a string",
    example=("Once upon a time", {"max_tokens": 40, "temperature": 0.8, "seed": 7}),
)
CHAT = Task(
    name="chat",
    makes=usage.completion,
    input=ObjectOf(ChatInput),
    options=ChatOptions,
    output="the reply, a string",
    example=(
        {"messages": [{"role": "user", "content": "Name three rivers."}]},
        {"max_tokens": 80},
    ),
)
