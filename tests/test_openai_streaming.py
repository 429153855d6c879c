"""From a model's events to OpenAI's lines, by events made by hand and the client's own types."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from openai.types.chat import ChatCompletionChunk

from backend.errors import InvalidRequest, OutOfMemory
from backend.openai import ROUTES
from backend.openai.base import order
from backend.openai.streaming import write_error
from backend.registry import Registry

REGISTRY = Registry.load(Path(__file__).resolve().parent.parent / "models.yaml")
CHAT = {"model": "chat-assistant-v1", "messages": [{"role": "user", "content": "hi"}]}
WRITE = {"model": "text-generator-v1", "prompt": "hi"}
USED = {"input_tokens": 4, "output_tokens": 3}


class Piece:
    """As the client reads a chunk of a text: unchecked, for its own type wants a reason in each."""

    @staticmethod
    def model_validate_json(line):
        return json.loads(line, object_hook=lambda pairs: SimpleNamespace(**pairs))


def event(kind, /, **data):
    return SimpleNamespace(kind=kind, data=data)


def done(**facts):
    return event("done", metadata={"usage": USED, "finish_reason": "stop", **facts})


def lines(body, events, path="/v1/chat/completions"):
    route = ROUTES[path]
    asked = order(route, REGISTRY.get(body["model"]), {**body, "stream": True}, ROUTES.values())
    found = list(route.chunks(asked, iter(events), "order-17"))
    assert all(line.startswith("data: ") and line.endswith("\n\n") for line in found)
    return [line.removeprefix("data: ").strip() for line in found]


def chunks(body, events, kind=ChatCompletionChunk, **where):
    *found, last = lines(body, events, **where)
    assert last == "[DONE]"
    read = [kind.model_validate_json(line) for line in found]
    assert {(chunk.id, chunk.model) for chunk in read} == {(read[0].id, body["model"])}
    assert len({chunk.created for chunk in read}) == 1
    return read


def test_a_role_then_the_text_then_the_end():
    spoken = [event("delta", text=text, index=0) for text in ("Cra", "nes", "é")]
    told = [event("start", metadata={}), *spoken, event("output", output="Cranesé"), done()]
    first, *rest, last = chunks(CHAT, told)
    assert first.id == "chatcmpl-order-17"
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in rest] == ["Cra", "nes", "é"]
    assert {chunk.choices[0].finish_reason for chunk in [first, *rest]} == {None}
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert all(chunk.usage is None for chunk in [first, *rest, last])


def test_the_usage_comes_last_and_only_where_it_is_asked_for():
    told = [event("start", metadata={}), event("delta", text="a", index=0), done()]
    body = CHAT | {"stream_options": {"include_usage": True}}
    *found, last = lines(body, told)[:-1]
    assert all(json.loads(line)["usage"] is None for line in found)
    last = json.loads(last)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    plain = lines(CHAT, told)[:-1]
    assert all("usage" not in json.loads(line) for line in plain)


def test_several_replies_keep_their_places():
    told = [
        event("start", metadata={}),
        event("delta", text="b", index=1),
        event("delta", text="a", index=0),
        event("output", output=["a", "b"]),
        event("done", metadata={"usage": USED, "finish_reason": ["stop", "length"]}),
    ]
    found = chunks(CHAT | {"n": 2}, told)
    places = [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in found[:2]]
    assert places == [(0, "assistant"), (1, "assistant")]
    assert [(c.choices[0].index, c.choices[0].delta.content) for c in found[2:4]] == [
        (1, "b"),
        (0, "a"),
    ]
    ends = [(chunk.choices[0].index, chunk.choices[0].finish_reason) for chunk in found[4:]]
    assert ends == [(0, "stop"), (1, "length")]


def test_a_model_that_tells_nothing_in_pieces_tells_it_at_once():
    told = [event("start", metadata={}), event("progress", step=1)]
    found = chunks(CHAT, [*told, event("output", output="all of it"), done()])
    assert [chunk.choices[0].delta.content for chunk in found] == ["", "all of it", None]
    silent = chunks(CHAT, [*told, event("output", output=""), done()])
    assert [chunk.choices[0].delta.content for chunk in silent] == ["", None]


def test_thinking_is_told_apart_from_the_reply():
    told = [
        event("start", metadata={}),
        event("delta", text="hm", index=0, kind="reasoning"),
        event("delta", text="so", index=0),
        done(reasoning_content="hm"),
    ]
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks(CHAT, told)]
    assert deltas[1:3] == [{"reasoning_content": "hm"}, {"content": "so"}]


def test_thoughts_alone_are_no_reply():
    told = [
        event("start", metadata={}),
        event("delta", text="hm", index=0, kind="reasoning"),
        event("output", output="so"),
        done(),
    ]
    deltas = [chunk.choices[0].delta.content for chunk in chunks(CHAT, told)]
    assert deltas == ["", None, "so", None]


def test_tool_calls_come_whole_before_the_end():
    calls = [{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "time", "arguments": {}}]
    told = [event("start", metadata={}), event("output", output=""), done(tool_calls=calls)]
    _, called, last = chunks(CHAT, told)
    found = called.choices[0].delta.tool_calls
    assert [(one.index, one.type, one.function.name) for one in found] == [
        (0, "function", "weather"),
        (1, "function", "time"),
    ]
    assert json.loads(found[0].function.arguments) == {"city": "Köln"}
    assert len({one.id for one in found}) == 2
    assert last.choices[0].finish_reason == "tool_calls"


def test_log_probabilities_come_with_the_end():
    top = {"token": "a", "logprob": -0.1, "bytes": [97]}
    told = [event("start", metadata={}), event("delta", text="a", index=0)]
    last = chunks(CHAT, [*told, done(logprobs=[{**top, "top": [top]}])])[-1]
    [token] = last.choices[0].logprobs.content
    assert (token.token, token.logprob, token.top_logprobs[0].bytes) == ("a", -0.1, [97])


@pytest.mark.parametrize(
    ("raised", "message", "param"),
    [
        (OutOfMemory("No room.", retry_after_s=3), "No room.", None),
        (InvalidRequest.of({"input": "is too long"}), "messages is too long", "messages"),
    ],
)
def test_an_error_on_the_way_is_in_openais_shape(raised, message, param):
    asked = order(
        ROUTES["/v1/chat/completions"], REGISTRY.get(CHAT["model"]), CHAT, ROUTES.values()
    )
    line = write_error(asked, raised, "order-17")
    error = json.loads(line.removeprefix("data: "))["error"]
    assert message in error["message"]
    assert (error["code"], error["param"]) == (raised.code, param)


def test_a_comment_says_that_it_is_still_there():
    asked = order(
        ROUTES["/v1/chat/completions"], REGISTRY.get(CHAT["model"]), CHAT, ROUTES.values()
    )
    assert next(asked.route.chunks(asked, iter([None]), "order-17")).startswith(":")


def test_a_completion_has_texts_and_no_role():
    told = [
        event("start", metadata={}),
        event("delta", text="x", index=0),
        event("delta", text="y", index=1),
        event("done", metadata={"usage": USED, "finish_reason": ["stop", "length"]}),
    ]
    found = chunks(WRITE | {"prompt": ["a", "b"]}, told[:3], kind=Piece, path="/v1/completions")
    assert [(one.choices[0].index, one.choices[0].text) for one in found] == [(0, "x"), (1, "y")]
    found = chunks(WRITE | {"prompt": ["a", "b"]}, told, kind=Piece, path="/v1/completions")
    ends = [(one.choices[0].index, one.choices[0].finish_reason) for one in found[2:]]
    assert ends == [(0, "stop"), (1, "length")]
    assert found[0].object == "text_completion"
    assert found[0].id == "cmpl-order-17"
