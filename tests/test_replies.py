"""How a chat model's text comes apart into thinking, content and calls of tools."""

import itertools
import time
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backend.replies import Marks, Reply, marks_of
from backend.tool_calls import read_calls

QWEN = marks_of("{% if '</think>' in content %}…{% endif %}<tool_call>\n{\"name\": …}</tool_call>")
MAGISTRAL = marks_of("[SYSTEM_PROMPT]…[THINK]…[/THINK]…[TOOL_CALLS]…")
LLAMA = marks_of('Respond in the format {"name": function name, "parameters": …}. … <|python_tag|>')
HARMONY = marks_of("<|start|>assistant<|channel|>analysis<|message|>…")
PLAIN = marks_of("{{ message.content }}")
ALL = {"qwen": QWEN, "magistral": MAGISTRAL, "llama": LLAMA, "harmony": HARMONY, "plain": PLAIN}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
PARIS = {"name": "get_weather", "arguments": {"city": "Paris"}}
STOP = {"name": "stop", "arguments": {}}
JSON_CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


class Parts(NamedTuple):
    reasoning: str
    content: str
    calls: list = []


def said(text, marks, thinking=False, tools=TOOLS, pieces=None):
    """What a text holds that comes in these pieces."""
    reply = Reply(marks, thinking=thinking, tools=tools)
    content = "".join(map(reply.feed, [text] if pieces is None else pieces)) + reply.end()
    return Parts(reply.reasoning, content, reply.calls)


@pytest.mark.parametrize(
    ("marks", "thinking", "text", "reply"),
    [
        pytest.param(PLAIN, False, " a <think> b\n", Parts("", " a <think> b\n"), id="no-marks"),
        pytest.param(QWEN, False, "<think>\nhm\n</think>\n\nYes.", Parts("hm", "Yes."), id="think"),
        pytest.param(QWEN, True, "hm\n</think>\n\nYes.\n", Parts("hm", "Yes.\n"), id="opened"),
        pytest.param(QWEN, True, "<think>\nhm</think>a", Parts("hm", "a"), id="opened-twice"),
        pytest.param(QWEN, True, "hm </thi", Parts("hm </thi", ""), id="never-ends"),
        pytest.param(QWEN, False, "<think>\n\n</think>\n\nYes", Parts("", "Yes"), id="no-thoughts"),
        pytest.param(QWEN, False, "a </think> b", Parts("", "a  b"), id="stray-end"),
        pytest.param(
            QWEN,
            True,
            "I call <tool_call>.</think><tool_call>\n" + JSON_CALL + "\n</tool_call>",
            Parts("I call <tool_call>.", "", [PARIS]),
            id="thinks-of-calls",
        ),
        pytest.param(MAGISTRAL, False, "[THINK]hm[/THINK]Yes", Parts("hm", "Yes"), id="magistral"),
        pytest.param(
            HARMONY,
            False,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
            "<|channel|>final<|message|>Yes<|return|>",
            Parts("hm", "Yes"),
            id="harmony",
        ),
        pytest.param(
            HARMONY,
            False,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
            Parts("hm", "", [PARIS]),
            id="harmony-call",
        ),
        pytest.param(
            HARMONY,
            False,
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant "
            'to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}',
            Parts("", "I look.", [PARIS]),
            id="harmony-call-of-the-other-form",
        ),
        pytest.param(
            QWEN,
            False,
            f"Let me look.\n<tool_call>\n{JSON_CALL}\n</tool_call>\n"
            '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>',
            Parts("", "Let me look.", [PARIS, STOP]),
            id="hermes",
        ),
        pytest.param(
            QWEN,
            False,
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            Parts(
                "", "", [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]
            ),
            id="qwen-coder",
        ),
        pytest.param(
            LLAMA,
            False,
            '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "stop"}',
            Parts("", "", [PARIS, STOP]),
            id="llama-bare",
        ),
        pytest.param(
            LLAMA,
            False,
            '<|python_tag|>{"type": "function", "name": "stop", "parameters": {}}',
            Parts("", "", [STOP]),
            id="llama-tagged",
        ),
        pytest.param(
            LLAMA, False, '\n{"city": "P"}\n', Parts("", '\n{"city": "P"}\n'), id="llama-json"
        ),
        pytest.param(
            MAGISTRAL, False, f"[TOOL_CALLS] [{JSON_CALL}]", Parts("", "", [PARIS]), id="mistral"
        ),
        pytest.param(
            MAGISTRAL,
            False,
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]stop[ARGS]{}',
            Parts("", "", [PARIS, STOP]),
            id="mistral-named",
        ),
        pytest.param(
            QWEN,
            False,
            '<tool_call>{"name": "stop", "arguments": "{\\"a\\": 1}"}</tool_call>',
            Parts("", "", [{"name": "stop", "arguments": {"a": 1}}]),
            id="arguments-as-text",
        ),
    ],
)  # fmt: skip
def test_a_reply_comes_apart(marks, thinking, text, reply):
    assert said(text, marks, thinking) == reply


@pytest.mark.parametrize(
    "inside",
    [
        pytest.param("{", id="not-json"),
        pytest.param("", id="empty"),
        pytest.param('{"name": "rm", "arguments": {}}', id="not-offered"),
        pytest.param('{"name": "stop", "arguments": [1]}', id="no-object"),
        pytest.param('{"name": 3}', id="no-name"),
        pytest.param('{"name": "stop", "arguments": {"a": NaN}}', id="nan"),
        pytest.param('{"name": "stop"} and then', id="text-after"),
        pytest.param('[{"name": "stop"}, {"name": "rm"}]', id="one-not-offered"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"name": "stop", "arguments": {"a": ' + "9" * 5000 + "}}", id="huge-number"),
        pytest.param("<function=stop>no<parameter=a>1</parameter></function>", id="bad-xml"),
        pytest.param("<function=rm></function>", id="xml-not-offered"),
        pytest.param("stop(1)", id="python"),
    ],
)
def test_what_is_no_call_of_an_offered_tool_stays_as_it_was_written(inside):
    text = f"So:\n<tool_call>\n{inside}</tool_call>\nDone"
    assert said(text, QWEN) == Parts("", text)


def test_a_call_that_is_cut_off_stays_as_it_was_written():
    text = f"So: <tool_call>{JSON_CALL[:-4]}"
    assert said(text, QWEN) == Parts("", text)


@pytest.mark.parametrize("marks", ALL.values(), ids=ALL)
def test_without_tools_nothing_is_a_call(marks):
    text = f"a <tool_call>{JSON_CALL}</tool_call> [TOOL_CALLS] [{JSON_CALL}] <|python_tag|>"
    for one in (text, JSON_CALL):
        assert said(one, marks, tools=[]) == Parts("", one)


def fragments(marks, cut=True):
    """Text with marks in it, blanks and braces, and parts of marks if they may be cut."""
    known = sorted(marks.all) or ["<think>"]
    parts = st.sampled_from(known).flatmap(
        lambda mark: st.integers(0, len(mark)).flatmap(
            lambda place: st.sampled_from([mark, mark, mark[:place], mark[place:]])
        )
    )
    other = st.sampled_from([" ", "\n", "\n\n", "{", "}", JSON_CALL, "a", "b c", "é🙂"])
    pieces = parts | other | st.text(max_size=4) if cut else st.sampled_from(known) | other
    return st.lists(pieces, max_size=12).map("".join)


@pytest.mark.parametrize("marks", ALL.values(), ids=ALL)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_chunks_of_a_reply_make_no_difference(marks, data):
    text = data.draw(fragments(marks))
    thinking = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    expected = said(text, marks, thinking)
    for places in ([0, *cuts, len(text)], list(range(len(text) + 1))):
        pieces = [text[start:end] for start, end in itertools.pairwise(places)]
        assert said(text, marks, thinking, pieces=pieces) == expected


@pytest.mark.parametrize("marks", ALL.values(), ids=ALL)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_mark_is_left_in_and_nothing_else_is_lost(marks, data):
    # What is around a mark that is taken out may read as one if it is part of one.
    text = data.draw(fragments(marks, cut=False))
    found = said(text, marks, tools=[])  # with tools, a call that is none keeps its marks
    assert not [mark for mark in marks.thinking or () if mark in found.reasoning]
    assert not [mark for mark in marks.without_calls().all if mark in found.content]
    for written in found[:2]:
        left = iter(text)
        assert all(char in left for char in written), "what it says is of the text, in its order"
    for char in "é🙂":
        assert (found.reasoning + found.content).count(char) == text.count(char)


@example(text="<think> a </think>")
@given(text=st.text(max_size=60))
def test_without_marks_a_reply_is_content_to_the_letter(text):
    assert said(text, PLAIN) == Parts("", text)


def test_thinking_and_content_come_as_soon_as_they_are_certain():
    reply = Reply(QWEN)
    pieces = ["<thi", "nk>", "hm", " so", " ", "</", "think>\n", "\n", "Yes <", "b>", ". "]
    came = [(reply.feed(piece), reply.reasoning) for piece in pieces]
    assert came == [
        ("", ""), ("", ""), ("", "hm"), ("", "hm so"), ("", "hm so"), ("", "hm so"), ("", "hm so"),
        ("", "hm so"), ("Yes", "hm so"), (" <b>", "hm so"), (".", "hm so"),
    ]  # fmt: skip
    assert reply.end() == " "


def test_a_long_reply_takes_little_time_a_character_at_a_time():
    call = "<tool_call>" + "{<" * 50_000
    text = "a < b </tool " * 20_000 + "</think>" + call
    started = time.monotonic()
    assert said(text, QWEN, thinking=True, pieces=text).content == call
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("One.\n<tool_call>CALL</tool_call>\nTwo.\n", "One.\nTwo."),
        ("\n<tool_call>CALL</tool_call>\n\n", ""),
        ("One.\n<think>hm</think>\nTwo.\n", "One.\nTwo.\n"),
    ],
)
def test_what_is_said_around_calls_and_thinking_does_not_run_together(text, content):
    assert said(text.replace("CALL", JSON_CALL), QWEN).content == content


@pytest.mark.parametrize(
    ("prompt", "marks", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", QWEN, True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", QWEN, False),
        ("<|im_start|>assistant\n", QWEN, False),
        ("[THINK]", MAGISTRAL, True),
        ("say <think>\n", PLAIN, False),
    ],
)
def test_a_prompt_tells_whether_thinking_has_begun(prompt, marks, opened):
    assert marks.opened_by(prompt) is opened


def test_a_response_template_comes_before_a_guess():
    told = {
        "fields": {
            "reasoning_content": {"open": "<r>", "close": "</r>"},
            "tool_calls": {"open": "<c>", "close": "</c>", "content": "json"},
            "content": {"close_pattern": "x"},
        }
    }
    marks = marks_of("<think> <tool_call>", told)
    assert marks == Marks(thinking=("<r>", "</r>"), calls=(("<c>", "</c>"),))
    assert said(f"<r>hm</r>ok<c>{JSON_CALL}</c>", marks) == Parts("hm", "ok", [PARIS])


@pytest.mark.parametrize("value", ["1" * 30, "1e999", '"\\ud800"', "[" * 400 + "]" * 400])
def test_a_call_that_cannot_be_written_as_json_again_is_none(value):
    text = '{"name": "stop", "arguments": {"a": VALUE}}'
    assert read_calls(text.replace("VALUE", value), TOOLS) == []
    assert read_calls(text.replace("VALUE", "1.5"), TOOLS)


@pytest.mark.parametrize("text", ["a" + " " * 30_000 + "b", "a." * 30_000, "[CALL_ID]a" * 10_000])
def test_what_is_no_call_is_soon_known_to_be_none(text):
    started = time.monotonic()
    assert read_calls(text, TOOLS) == []
    assert time.monotonic() - started < 2
