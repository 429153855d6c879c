"""Hostile bodies: what checks them stops early, and what it says of them is short."""

from __future__ import annotations

import io
import json

import pytest
from marshmallow import Schema, ValidationError
from werkzeug.datastructures import MultiDict

from backend.adapters.echo import Echo
from backend.bounds import MAX_BODY_DEPTH, MAX_DEPTH, MAX_VALUES, check_source, is_deep, measure
from backend.errors import MAX_FAULTS, MORE, InvalidRequest, did_you_mean
from backend.models import run_model
from backend.schemas import Integer, ListOf, ObjectOf, StrictSchema, load
from backend.tasks import TASKS

LONGEST_ANSWER = 32 * 1024  # bytes of an error, whatever was sent

TYPES = {
    "writer": "text-generation",
    "chat": "chat",
    "sees": "image-text-to-text",
    "ranker": "rerank",
    "tables": "table-question-answering",
    "documents": "document-question-answering",
    "embedder": "embeddings",
    "draws": "text-to-image",
}
LONG = "x" * 300_000


@pytest.fixture
def client(make_app):
    entries = [{"id": name, "type": type_, "hf_model": "org/m"} for name, type_ in TYPES.items()]
    return make_app([{"id": "echo", "type": "echo"}, *entries]).test_client()


def run(model_id, input_, **options):
    return "/crane/run", {"model_id": model_id, "input": input_, "options": options}


def table(columns, rows):
    return {"table": {"columns": columns, "rows": rows}, "question": "q"}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


TOLD = {"role": "user", "content": "a"}


def v1(route, model, **body):
    return f"/v1/{route}", {"model": model, **body}


WRITE = {"model_id": "writer", "input": "a"}
MANY = {f"k{i}": 1 for i in range(100_000)}
NO_IMAGE = {"type": "image", "image": "?"}
HOSTILE = {
    "wrong inputs": run("embedder", [1] * 200),
    "wrong documents": run("ranker", {"query": "q", "documents": [1] * 1000}),
    "wrong documents of /v1": (
        "/v1/rerank",
        {"model": "ranker", "query": "q", "documents": [1] * 1000},
    ),
    "documents without end": (
        "/v1/rerank",
        {"model": "ranker", "query": "q", "documents": [1] * 90_000},
    ),
    "wrong cells": run("tables", table(["a"] * 100, [[1] * 100] * 1000)),
    "uneven rows": run("tables", table(["a", "b"], [["a"]] * 60_000)),
    "wrong words": run("documents", {"image": "aGk=", "question": "q", "words": [{"a": 1}] * 9000}),
    "wrong parts": run("sees", chat(*[{"role": "user", "content": [{"type": "text"}] * 99}] * 99)),
    "wrong messages": run("chat", chat(*[{"role": "x", "content": 1, "y": 2}] * 1000)),
    "wrong tools": run("chat", chat(TOLD, tools=[{"type": LONG, "function": {"name": ""}}] * 9)),
    "unknown options": run("writer", "a", **{f"max_tok{i}": 1 for i in range(100_000)}),
    "unknown keys": ("/crane/run", {f"inpu{i}": 1 for i in range(100_000)}),
    "unknown keys of /v1": (
        "/v1/embeddings",
        {"model": "embedder", "input": "a"} | {f"k{i}": 1 for i in range(100_000)},
    ),
    "unknown keys, inside": run("chat", chat(MANY)),
    "a key that counts": run("writer", "a", **{MORE: 1, f"{MORE}…": 1}),
    "long keys": run("writer", "a", **{f"{LONG}{i}": 1 for i in range(10)}),
    "a long choice": run("draws", "a", scheduler=LONG),
    "a long duration": run("echo", 1, keep_alive=LONG),
    "a long type": run("writer", "a", response_format={"type": LONG}),
    "a long model id": run(LONG, "a"),
    "a long model of /v1": v1("embeddings", LONG, input="a"),
    "a long size": v1("images/generations", "draws", prompt="a", size=LONG),
    "a long only": v1("images/generations", "draws", prompt="a", quality=LONG),
    "a long text": run("embedder", LONG * 4),
    "a long text of a long key": run("echo", {LONG: LONG * 4}),
    "media that are none": run("sees", chat({"role": "user", "content": [NO_IMAGE] * 99})),
    "too many values": run("echo", [[1] * 1000] * 200),
    "too many values of /v1": v1("completions", "writer", prompt=[""] * 200_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_error_is_short_whatever_was_sent(client, name):
    path, body = HOSTILE[name]
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 404), answer.json
    assert len(answer.data) < LONGEST_ANSWER
    details = answer.json["error"].get("details", {})
    assert len([path for path in details if path != MORE]) <= MAX_FAULTS
    assert LONG[:120] not in answer.text


@pytest.mark.parametrize(
    "parts",
    [
        {f"part{'x' * 5000}{i}": "a" for i in range(99)},
        {
            "model_id": "writer",
            "input": "a",
            "options": json.dumps({f"o{i}": 1 for i in range(9999)}),
        },
        {"model_id": "writer", "input": "a", "options": json.dumps([0] * (MAX_VALUES + 1))},
        {"model_id": "sees", **{f"input.image{i}": (io.BytesIO(b"a"), "a.png") for i in range(90)}},
    ],
    ids=["unknown parts", "unknown options", "too many values", "unknown files"],
)
def test_an_error_about_a_form_is_short_too(client, parts):
    answer = client.post("/crane/run", data=parts, content_type="multipart/form-data")
    assert answer.status_code == 400
    assert len(answer.data) < LONGEST_ANSWER
    assert len(answer.json["error"]["details"]) <= MAX_FAULTS + 1
    assert LONG[:120] not in answer.text


@pytest.mark.parametrize("end", ["", "[]"])
def test_a_long_name_of_a_part_is_cut(client, end):
    name = LONG[:5000]
    parts = MultiDict([(name, "a"), (f"{name}{end}", "b"), (name, "c")])
    answer = client.post("/v1/images/edits", data=parts, content_type="multipart/form-data")
    assert answer.status_code == 400
    assert "is there " in answer.text
    assert LONG[:120] not in answer.text


def test_what_is_not_named_is_counted(client):
    path, body = HOSTILE["unknown options"]
    error = client.post(path, json=body).json["error"]
    assert (
        error["details"]["options.…"] == f"{100_000 - MAX_FAULTS + 1} more keys are not known here"
    )
    assert len(error["details"]) == MAX_FAULTS
    path, body = HOSTILE["wrong documents"]
    error = client.post(path, json=body).json["error"]
    named = MAX_FAULTS - 1
    assert error["details"] == {
        **{f"input.documents[{i}]": "must be a string, not a number" for i in range(named)},
        f"input.documents[{named}:]": "was not checked after so many faults",
    }
    path, body = HOSTILE["uneven rows"]
    error = client.post(path, json=body).json["error"]
    assert error["details"][MORE] == f"{60_000 - MAX_FAULTS} more"
    assert f"(and {60_000 - 3} more, see details)" in error["message"]


def test_as_many_faults_as_are_named_are_named_each():
    faults = {f"a{i}": "is wrong" for i in range(MAX_FAULTS + 5)}
    some = dict(list(faults.items())[:MAX_FAULTS])
    assert InvalidRequest.of(some).details == some
    error = InvalidRequest.of(faults)
    assert error.details == {**some, MORE: "5 more"}
    again = InvalidRequest.of(error.details)  # as under other names
    assert (again.details, again.message) == (error.details, error.message)
    assert "(and 22 more, see details)" in error.message


def test_names_and_faults_are_cut():
    error = InvalidRequest.of({f"{LONG}{i}": LONG for i in range(3)} | {LONG: LONG})
    [(path, fault)] = error.details.items()
    assert (len(path), len(fault)) == (300, 1000)


def test_inputs_are_checked_no_further_than_faults_are_named(client):
    path, body = HOSTILE["wrong inputs"]
    details = client.post(path, json=body).json["error"]["details"]
    named = MAX_FAULTS - 1
    assert details == {
        **{f"input[{i}]": "must be a string, not a number" for i in range(named)},
        f"input[{named}:]": "was not checked after so many faults",
    }


class Counted(Integer):
    """Counts the values that it has looked at."""

    looked = 0

    def accepts(self, value):
        Counted.looked += 1
        return super().accepts(value)


class Inner(StrictSchema):
    numbers = ListOf(Counted(low=0, high=9), high=10**6)


def test_a_list_is_checked_no_further_than_faults_are_named():
    Counted.looked = 0
    field = ListOf(ObjectOf(Inner), high=10**6)
    with pytest.raises(InvalidRequest) as caught:
        load(field, [{"numbers": [1] * 10 + ["a"] * 10}] * 1000, "input")
    assert Counted.looked <= 2 * 20
    assert caught.value.details["input[2:]"] == "was not checked after so many faults"
    assert caught.value.details[MORE] == "1 more"
    Counted.looked = 0
    with pytest.raises(ValidationError):
        field.deserialize([{"numbers": [10] * 1000}])
    assert Counted.looked == MAX_FAULTS - 1


def test_keys_that_are_not_known_do_not_hide_other_faults_and_nulls_are_none(client):
    body = {"model": "embedder", "input": 5, "nothing": None, "inpt": 1}
    error = client.post("/v1/embeddings", json=body).json["error"]
    assert "input must be" in error["message"]
    assert "inpt is not known here; did you mean 'input'?" in error["message"]
    assert "nothing" not in error["message"]
    body = {"model": "nope", "input": "a"} | {f"k{i}": None for i in range(1000)}
    assert client.post("/v1/embeddings", json=body).status_code == 404


@pytest.mark.parametrize("name", ["x" * 10**6, "max_tokens" * 10**5, "é" * 10**6])
def test_a_long_name_is_compared_by_its_beginning(name):
    assert len(did_you_mean(name, list(TASKS["chat"].options().fields))) < 1000
    # 80 characters are as near as that; a million would not be.
    assert did_you_mean("max_tokens" + "x" * 10**6, ["max_tokens" + "x" * 70]).startswith("did you")


def nested(levels, inner=()):
    for _ in range(levels):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("value", "deep"),
    [
        (1, False),
        (nested(MAX_DEPTH - 1, 1), False),
        (nested(MAX_DEPTH, 1), False),
        (nested(MAX_DEPTH + 1, 1), True),
        ({"a": [1, {"b": nested(MAX_DEPTH - 2)}]}, True),
        ([[]] * 1000, False),
    ],
)
def test_depth_is_counted_in_levels_of_values(value, deep):
    assert is_deep(value) == deep


def test_values_are_counted_no_further_than_allowed():
    assert measure({"a": [1, 2, {"b": 3}], "c": "d"}, max_depth=9) == (3, 7)
    assert measure([[0] * 10] * 10, max_depth=9) == (2, 111)
    assert measure([nested(500)] * 10**6, max_depth=9, max_values=100) == (1, 10**6 + 1)
    assert measure(nested(500), max_depth=9)[0] == 10


@pytest.mark.parametrize("path", ["/crane/run", "/v1/chat/completions"])
def test_a_body_of_any_shape_is_refused_where_it_is_too_deep(client, path):
    deep = nested(MAX_BODY_DEPTH + 1)
    answer = client.post(
        path, json={"model": "chat", "max_tokens": deep, "max_completion_tokens": deep}
    )
    assert answer.status_code == 400
    assert f"body is nested deeper than {MAX_BODY_DEPTH} levels" in answer.json["error"]["message"]


def test_a_body_may_have_as_many_values_as_the_largest_batch(make_app):
    client = make_app(max_batch=100_000, queue_size=100_000, threads=1).test_client()
    answer = client.post("/crane/run", json={"model_id": "echo", "input": [1] * 100_001})
    assert "1 to 100000 items" in answer.json["error"]["details"]["input"]
    path, body = HOSTILE["too many values"]
    assert (
        f"more than {MAX_VALUES} values"
        in client.post(path, json=body).json["error"]["details"]["body"]
    )


# What a call comes to before anything is made of it: of each task what multiplies what. ``of``
# makes an input and options of two texts, the first of which is read or written ``times`` times.
def labels(**more):
    return lambda text, other: ({**more, "labels": [other] * 10}, {"hypothesis_template": text})


IMAGE = {"image": "aGk="}
MULTIPLIES = {
    "zero-shot-classification": (
        lambda text, other: ({"text": text, "labels": [other] * 10}, {}),
        10,
    ),
    "zero-shot-classification by its template": (labels(text="a"), 10),
    "zero-shot-image-classification": (labels(**IMAGE), 10),
    "zero-shot-audio-classification": (labels(audio="aGk="), 10),
    "rerank": (lambda text, other: ({"query": text, "documents": [other] * 10}, {}), 10),
    "fill-mask": (lambda text, other: (f"[MASK] <mask> {text}", {"top_k": 5}), 10),
    "decision": (
        lambda text, other: (
            {"state": text, "questions": [{"name": f"{i}", "type": "noul"} for i in range(10)]},
            {},
        ),
        10,
    ),
}
ONCE = {
    "echo": lambda text: ({"a": [text]}, {}),
    "text-generation": lambda text: (text, {}),
    "chat": lambda text: (chat(TOLD | {"content": text}), {}),
    "summarization": lambda text: ("a", {"prefix": text}),
    "translation": lambda text: (text, {"prefix": "a"}),
    "text2text-generation": lambda text: ("a", {"prefix": text}),
    "embeddings": lambda text: (text, {}),
    "text-classification": lambda text: (text, {}),
    "token-classification": lambda text: (text, {}),
    "question-answering": lambda text: ({"question": "a", "context": text}, {}),
    "text-to-image": lambda text: ("a", {"negative_prompt": text, "num_images": 4}),
    "image-to-image": lambda text: ({**IMAGE, "prompt": text}, {}),
    "inpainting": lambda text: ({**IMAGE, "mask": "aGk=", "prompt": text}, {}),
    "text-to-video": lambda text: ({"prompt": "a", "negative_prompt": text}, {}),
    "image-to-video": lambda text: ({**IMAGE, "prompt": text}, {}),
    "text-to-3d": lambda text: (text, {}),
    "text-to-speech": lambda text: (text, {}),
    "text-to-audio": lambda text: (text, {}),
    "automatic-speech-recognition": lambda text: ("aGk=", {"language": text}),
    "image-to-text": lambda text: ("aGk=", {"stop": [text[:900]] * 8}),
    "image-text-to-text": lambda text: (chat(TOLD | {"content": text}), {}),
    "visual-question-answering": lambda text: ({**IMAGE, "question": text}, {}),
    "feature-extraction": lambda text: (text, {}),
    "zero-shot-object-detection": lambda text: ({**IMAGE, "labels": [text]}, {}),
    "document-question-answering": lambda text: ({**IMAGE, "question": text}, {}),
    "table-question-answering": lambda text: (table(["a"], [[text[:9000]]]), {}),
}
# Tasks whose input is one medium, and whose options have no text of any length.
NO_TEXT = {
    "image-classification",
    "object-detection",
    "image-segmentation",
    "depth-estimation",
    "audio-classification",
    "video-classification",
    "mask-generation",
    "image-feature-extraction",
    "keypoint-matching",
}
MAX_TEXT = 10_000


@pytest.fixture
def ask(make_app):
    types = sorted({name.partition(" ")[0] for name in [*MULTIPLIES, *ONCE]})
    entries = [{"id": t, "type": t} | ({"hf_model": "org/m"} if t != "echo" else {}) for t in types]
    client = make_app(entries, max_text=MAX_TEXT, max_batch=64).test_client()

    def refusal(task, input_, options):
        body = {"model_id": task, "input": input_, "options": options}
        answer = client.post("/crane/run", json=body)
        assert answer.status_code == 400, answer.json
        return answer.json["error"]["details"]

    return refusal


def test_every_task_is_listed_with_what_it_multiplies():
    assert {name.partition(" ")[0] for name in MULTIPLIES} | set(ONCE) | NO_TEXT == set(TASKS)
    for name in TASKS:
        if name not in {key.partition(" ")[0] for key in MULTIPLIES}:
            options = TASKS[name].options()
            templates = [f for f in options.fields.values() if type(f).__name__ == "Template"]
            assert not templates, name


def loaded(task, input_, options):
    return load(TASKS[task].input, input_), load(TASKS[task].options(), options)


@pytest.mark.parametrize("name", MULTIPLIES)
def test_a_text_counts_as_often_as_it_is_read_or_written(ask, name):
    of, times = MULTIPLIES[name]
    task = name.partition(" ")[0]

    place = " {}" if "hypothesis_template" in TASKS[task].options().fields else ""

    def characters(text):
        return TASKS[task].expand(*loaded(task, *of(text + place, "b"))).characters

    assert characters("x" * 1005) - characters("x" * 5) == times * 1000
    input_, options = of("x" * (MAX_TEXT - 500) + place, "b")
    details = ask(task, [input_] * 4, options)  # 4 inputs of 95,000 characters
    assert "each text counted as often as it is read or written" in details["input"]


@pytest.mark.parametrize("name", ONCE)
def test_texts_of_inputs_and_options_count_together(ask, name):
    of = ONCE[name]
    expand = TASKS[name].expand
    few, many = (expand(*loaded(name, *of("x" * size))) for size in (10, 510))
    times = len(of("x")[1].get("stop", "x"))
    assert many.sequences == 1
    assert many.characters == many.longest == few.characters + 500 * times


@pytest.mark.parametrize(
    ("task", "input_", "options", "at"),
    [
        ("chat", chat(*[TOLD | {"content": "x" * 999}] * 11), {}, "input"),
        ("summarization", "x" * 6000, {"prefix": "y" * 6000}, "input"),
        ("summarization", "x", {"prefix": "y" * 10_001}, "options.prefix"),
        ("zero-shot-classification", {"text": "x" * 9990, "labels": ["a"]}, {}, "input"),
        ("rerank", {"query": "x" * 9000, "documents": ["a", "y" * 1001]}, {}, "input"),
        ("embeddings", ["a", "x" * 10_001], {}, "input[1]"),
        ("text-generation", ["a", "x" * 5000], {"stop": ["y" * 999] * 8}, "input[1]"),
        ("text-generation", "a", {"stop": ["y" * 1001]}, "options.stop[0]"),
        ("text-to-image", ["a"] * 5, {"num_images": 13}, "options.num_images"),
    ],
)
def test_what_a_call_comes_to_is_bounded_before_it_is_made(ask, task, input_, options, at):
    assert list(ask(task, input_, options)) == [at]


@pytest.mark.parametrize(
    "template",
    ["no place", "{}{}", "{} {0.__class__}", "{0}", "{} {", "{} }", "{{}}", "{}" * 3000, "{!r} {}"],
)
@pytest.mark.parametrize(
    "task",
    [
        "zero-shot-classification",
        "zero-shot-image-classification",
        "zero-shot-audio-classification",
    ],
)
def test_a_template_has_one_place_for_a_label(task, template):
    with pytest.raises(InvalidRequest) as caught:
        load(TASKS[task].options(), {"hypothesis_template": template}, "options")
    assert list(caught.value.details) == ["options.hypothesis_template"]


def test_outputs_of_one_prompt_share_it(make_app, add_task):
    seen = []

    class Adapter(Echo):
        def predict(self, batch):
            seen.append(batch.inputs)
            return super().predict(batch)

    app = make_app([add_task("keeps", Adapter)])
    with app.test_request_context():
        parts = app.extensions["crane"]
        prompts = [["a" * 999], ["b" * 999]]
        output, metadata = run_model(parts, "keeps", prompts, {}, request_id="order-17", repeat=3)
    assert output == [prompts[0]] * 3 + [prompts[1]] * 3
    assert metadata["batch_size"] == 6
    [inputs] = seen
    assert [id(one) for one in inputs] == [id(inputs[0])] * 3 + [id(inputs[3])] * 3


@pytest.mark.parametrize(
    ("prompt", "n", "param"),
    [("a", 9, "n"), (["a"] * 5, 2, "n"), (["a"] * 9, 1, "prompt"), ([""] * 100_000, 128, "n")],
)
def test_n_of_each_prompt_are_counted_before_they_are_made(make_app, prompt, n, param):
    entries = [{"id": "writer", "type": "text-generation", "hf_model": "org/m"}]
    client = make_app(entries, max_batch=8).test_client()
    body = {"model": "writer", "prompt": prompt, "n": n}
    error = client.post("/v1/completions", json=body).json["error"]
    assert error["param"] == param
    assert "must have 1 to 8 items" in error["message"]


@pytest.mark.parametrize(
    "many",
    [
        pytest.param(b"0,", id="numbers"),
        pytest.param(b'"",', id="empty strings"),
        pytest.param(rb'"\\","\"",', id="strings with escapes"),
        pytest.param(b"[],", id="empty lists"),
        pytest.param(b"[" * 50 + b"]" * 50 + b"," * 50, id="lists in lists"),
        pytest.param(b'{"a":1},', id="objects"),
        pytest.param(b" 0 \n,", id="with spaces"),
    ],
)
def test_values_are_counted_before_any_is_made(client, many):
    """So what comes behind the first too many need not even be JSON."""
    body = (
        b'{"model_id":"echo","input":[' + many * (3 * MAX_VALUES // many.count(b",")) + b"no JSON"
    )
    answer = client.post("/crane/run", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert f"has more than {MAX_VALUES} values" in answer.get_json()["error"]["message"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(",[{" * 400_000, id="marks"),
        pytest.param('\\",' * 700_000, id="quotes and backslashes"),
        pytest.param(",\\\\" * 200_000, id="backslashes before the end"),
    ],
)
def test_marks_in_a_text_are_no_values(text):
    check_source(json.dumps({"input": text}).encode(), "body")


def test_a_body_of_all_the_values_it_may_have_is_parsed(client):
    body = json.dumps({"model_id": "echo", "input": [[0] * (MAX_VALUES - 10)]})
    assert client.post("/crane/run", data=body, content_type="application/json").status_code == 200


@pytest.mark.parametrize("depth", [MAX_BODY_DEPTH - 1, MAX_BODY_DEPTH, MAX_BODY_DEPTH + 1])
def test_a_short_body_is_as_deep_as_one_may_be(client, depth):
    """Brackets in texts count for nothing, whatever is looked at first."""
    for text in ("", "[{" * 200):
        nested = "[" * (depth - 1) + "1" + "]" * (depth - 1)  # in the body's own object
        body = f'{{"model_id": "echo", "input": "{text}", "x": {nested}}}'
        answer = client.post("/crane/run", data=body, content_type="application/json")
        details = answer.get_json()["error"]["details"]
        assert ("nested deeper" in details.get("body", "")) == (depth > MAX_BODY_DEPTH)


@pytest.mark.parametrize("encoding", ["gzip", "br"])
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/crane/run", "application/json"),
        ("/crane/run", "multipart/form-data; boundary=XX"),
        ("/v1/embeddings", "application/json"),
        ("/v1/audio/transcriptions", "multipart/form-data; boundary=XX"),
    ],
)
def test_an_encoding_of_a_body_is_refused_by_name(client, path, kind, encoding):
    headers = {"Content-Type": kind, "Content-Encoding": encoding}
    answer = client.post(path, data=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415
    assert f"Content-Encoding; this one's is {encoding}" in answer.get_json()["error"]["message"]


class Plain(StrictSchema):
    needed = Integer(low=1, high=9, required=True)
    named = Integer(low=1, high=9, data_key="n", load_default=4)
    made = ListOf(Integer(low=1, high=9), high=2, load_default=list)
    left_out = Integer(low=1, high=9)


@pytest.mark.parametrize(
    "sent",
    [
        {"needed": 2},
        {"needed": 2, "n": 3, "made": [1, 2], "left_out": 5},
        {"needed": 2, "n": 30, "made": [1, "2"]},
        {"n": None},
        {},
        [],
        "text",
        None,
    ],
)
def test_an_object_comes_to_what_marshmallow_makes_of_it(sent):
    def made(load):
        try:
            return load(Plain(), sent)
        except ValidationError as error:
            return error.messages

    assert made(StrictSchema.load) == made(Schema.load)


def test_an_object_without_keys_comes_to_the_defaults_of_each_call():
    class Options(StrictSchema):
        seed = Integer(low=0, high=9, load_default=3)

    class Lists(StrictSchema):
        stop = ListOf(Integer(low=0, high=9), high=9, load_default=list)

    class Wanted(StrictSchema):
        seed = Integer(low=0, high=9, required=True)

    options, lists = Options(), Lists()
    for _ in range(3):
        changed, changed_list = options.load({}), lists.load({})
        assert (changed, changed_list) == ({"seed": 3}, {"stop": []})
        changed["seed"] = 4
        changed_list["stop"].append(1)
    for _ in range(2):
        with pytest.raises(ValidationError):
            Wanted().load({})


def test_a_body_that_is_shorter_than_it_says_is_refused(client):
    answer = client.post(
        "/crane/run",
        data=b'{"model_id": "echo", "input": 1}',
        content_type="application/json",
        environ_overrides={"CONTENT_LENGTH": "500"},
    )
    assert answer.status_code == 400
    assert answer.get_json()["error"]["details"] == {"body": "ends before all of it has come"}


def test_a_body_of_a_value_too_many_is_refused(client):
    body = json.dumps({"model_id": "echo", "input": [[0] * MAX_VALUES]})
    answer = client.post("/crane/run", data=body, content_type="application/json")
    assert f"more than {MAX_VALUES} values" in answer.get_json()["error"]["details"]["body"]
