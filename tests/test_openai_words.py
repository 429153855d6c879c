"""/v1's words for what a chat model may be asked beside text, and what it tells beside its reply.

Each is passed on where the model's task has it, by options that are widened here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from backend.errors import InvalidRequest
from backend.openai import ROUTES
from backend.openai.base import order
from backend.registry import Registry
from backend.tasks import TASKS

REGISTRY = Registry.load(Path(__file__).resolve().parent.parent / "models.yaml")
TOLD = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "now", "parameters": SCHEMA},
}


@pytest.fixture
def ask():
    """A body as the input and options that it comes to, of a model that can do all of it."""

    def asked(model="chat-assistant-v1", **body):
        route = ROUTES["/v1/completions" if "prompt" in body else "/v1/chat/completions"]
        if "prompt" not in body:
            body = {"messages": TOLD, **body}
        return order(route, REGISTRY.get(model), {"model": model, **body}, ROUTES.values())

    return asked


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"frequency_penalty": 0}, {"frequency_penalty": 0}),
        ({"frequency_penalty": 1.5, "presence_penalty": -1},
         {"frequency_penalty": 1.5, "presence_penalty": -1}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"top_logprobs": 5}),
        ({"logprobs": False}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}},
         {"response_format": {"type": "json_object"}}),
        ({"response_format": {"type": "json_schema", "json_schema":
            {"name": "a", "schema": SCHEMA, "strict": True, "description": None}}},
         {"response_format": {"type": "json_schema", "schema": SCHEMA}}),
        # As huggingface_hub's client writes a schema.
        ({"response_format": {"type": "json_object", "value": SCHEMA}},
         {"response_format": {"type": "json_schema", "schema": SCHEMA}}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"min_tokens": 3, "top_k": None}, {"min_tokens": 3}),
        ({"reasoning_effort": "none"}, {"thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"thinking": True}),
    ],
)  # fmt: skip
def test_options_are_in_cranes_words(ask, body, options):
    assert ask(**body).options == options


def test_a_completions_log_probabilities_are_one_number(ask):
    asked = ask("text-generator-v1", prompt="hi", logprobs=3)
    assert asked.options == {"top_logprobs": 3}


def test_tools_and_what_they_said_are_passed_on(ask):
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Köln"}'}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]
    asked = ask(messages=[*TOLD, *said], tools=[WEATHER], tool_choice="auto")
    assert asked.input == {
        "messages": [
            *TOLD,
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_1", "name": "weather", "arguments": {"city": "Köln"}}],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
        ],
        "tools": [WEATHER],
    }
    assert TASKS["chat"].input.deserialize(asked.input) == asked.input
    assert "tools" not in ask(tools=[WEATHER], tool_choice="none").input


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]},
         "tools[0].function.strict"),
    ],
)  # fmt: skip
def test_what_no_tool_can_be_told_is_refused(ask, body, param):
    with pytest.raises(InvalidRequest) as refused:
        ask(**body)
    assert param in refused.value.details


@pytest.mark.parametrize(
    ("choice", "ours"),
    [
        ("required", "required"),
        ({"type": "function", "function": {"name": "weather"}}, {"name": "weather"}),
    ],
)
def test_a_tool_that_has_to_be_called_is_passed_on(ask, choice, ours):
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    asked = ask(tools=[strict], tool_choice=choice, parallel_tool_calls=False)
    assert asked.input == {"messages": TOLD, "tools": [WEATHER], "tool_choice": ours}
    assert TASKS["chat"].input.deserialize(asked.input) == asked.input


@pytest.mark.parametrize("arguments", ["", "{", "[]", "NaN", 5, {}])
def test_arguments_are_a_json_object_in_a_string(ask, arguments):
    call = {"id": "c", "type": "function", "function": {"name": "a", "arguments": arguments}}
    with pytest.raises(InvalidRequest) as refused:
        ask(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert list(refused.value.details) == ["messages[0].tool_calls[0].function.arguments"]


def answered(asked, output, **metadata):
    told = {"request_id": "order-17", "usage": {"input_tokens": 4, "output_tokens": 3}}
    return asked.route.answer(asked, output, told | metadata)


TOKEN = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
OTHER = {"token": "a", "logprob": -0.1, "bytes": [97]}


def test_a_reply_tells_what_the_receipt_tells(ask):
    body = answered(
        ask(),
        "",
        finish_reason="stop",
        reasoning_content="hm",
        tool_calls=[{"name": "weather", "arguments": {"city": "Köln"}}],
        usage={"input_tokens": 4, "output_tokens": 3, "cached_tokens": 2, "reasoning_tokens": 1},
        logprobs=[{**TOKEN, "top": [OTHER, TOKEN]}],
    )
    read = ChatCompletion.model_validate(body)
    [choice] = read.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.reasoning_content == "hm"
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "weather",
        {"city": "Köln"},
    )
    assert [one.token for one in choice.logprobs.content[0].top_logprobs] == ["a", "é"]
    assert choice.logprobs.content[0].bytes == [195, 169]
    assert read.usage.prompt_tokens_details.cached_tokens == 2
    assert read.usage.completion_tokens_details.reasoning_tokens == 1


def test_each_of_several_replies_has_its_own(ask):
    calls = [None, [{"name": "weather", "arguments": {}}]]
    body = answered(
        ask(n=2),
        ["so", "then"],
        finish_reason=["length", "stop"],
        reasoning_content=["hm", ""],
        tool_calls=calls,
    )
    read = ChatCompletion.model_validate(body)
    assert [choice.finish_reason for choice in read.choices] == ["length", "tool_calls"]
    assert [choice.message.content for choice in read.choices] == ["so", "then"]
    assert read.choices[0].message.reasoning_content == "hm"
    assert not hasattr(read.choices[1].message, "reasoning_content")
    assert read.usage.prompt_tokens_details is None


def test_a_completions_log_probabilities_are_in_its_older_shape(ask):
    asked = ask("text-generator-v1", prompt="hi", logprobs=2)
    probable = [{**TOKEN, "top": [OTHER]}, {**OTHER, "top": []}]
    read = Completion.model_validate(answered(asked, "éa", finish_reason="stop", logprobs=probable))
    found = read.choices[0].logprobs
    assert (found.tokens, found.token_logprobs) == (["é", "a"], [-0.5, -0.1])
    assert (found.text_offset, found.top_logprobs) == ([0, 1], [{"a": -0.1}, {}])
