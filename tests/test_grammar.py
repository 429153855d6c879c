"""Documents that a model writes: random scores, the worst of models, and still each one parses."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import wait

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from backend.adapters import grammar
from backend.adapters.grammar import Form, Grammars
from backend.errors import InvalidRequest
from tests.checkpoints import checkpoint

__all__ = ["checkpoint"]

OBJECT = {"type": "object"}
SCHEMAS = {
    "flat": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 3, "maximum": 120},
            "kind": {"enum": ["crane", "héron", "bee"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "birds": {
                "type": "array",
                "minItems": 2,
                "items": {"type": "object", "properties": {"wings": {"type": "number"}}},
            },
            "more": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}}]},
        },
        "required": ["birds", "more"],
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"under": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["under"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "texts": {
        "type": "array",
        "items": {"type": "string", "minLength": 4, "maxLength": 9},
        "minItems": 1,
        "maxItems": 3,
    },
    "pattern": {"type": "string", "pattern": "^[a-c]{3}-[0-9]+$"},
    "number": {"type": "number"},
}
# Parts that refer to one another, with nothing else in them.
MUTUAL = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
CROSSED = {name: {"allOf": [one]} for name, one in MUTUAL.items()}
PATTERNS = {"allOf": [{"type": "string", "pattern": f".*{c}.*{c}"} for c in "abcdefghijkl"]}


@pytest.fixture(scope="module")
def grammars(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    return Grammars(tokenizer, [1]), tokenizer


def form(schema):
    return Form(schema, "options.response_format")


class Caller:
    """An input whose caller waits for a grammar, as a run has it."""

    caller, prepared = "one", None

    def cancelled(self):
        return False


def start(grammars, form, room, caller=None):
    """Keep a text to a form, once its schema is compiled."""
    compiled = grammars.compile(form, caller or Caller())
    wait([compiled], timeout=60)
    return grammars.start(compiled, form, room)


def write(grammars, schema, room, seed):
    """A document of random tokens, and how many."""
    model, tokenizer = grammars
    draw = torch.Generator().manual_seed(seed)
    constraint, ids = start(model, form(schema), room), []
    while not constraint.done:
        scores = torch.randn(len(tokenizer) + 5, generator=draw) * 3
        constraint.mask(scores)
        assert scores.isfinite().any()
        ids.append(constraint.take(int(scores.argmax())))
        assert len(ids) <= room + 1
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


@pytest.mark.parametrize("seed", range(60))
def test_an_object_always_parses_however_little_room_there_is(grammars, seed):
    room = random.Random(seed).choice([2, 3, 4, 5, 8, 13, 40, 150])
    text, _ = write(grammars, OBJECT, room, seed)
    assert type(json.loads(text)) is dict


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("seed", range(12))
def test_a_document_satisfies_its_schema_however_little_room_there_is(grammars, name, seed):
    with pytest.raises(InvalidRequest) as refusal:
        start(grammars[0], form(SCHEMAS[name]), 0)
    [fault] = refusal.value.details.values()
    least = int(fault.split()[-1])
    room = least + random.Random(seed).choice([0, 1, 2, 7, 30, 90])
    text, _ = write(grammars, SCHEMAS[name], room, seed)
    jsonschema.validate(json.loads(text), SCHEMAS[name])


def test_a_document_that_is_ended_by_the_model_is_left_so(grammars):
    lengths = {write(grammars, SCHEMAS["number"], 50, seed)[1] for seed in range(20)}
    assert len(lengths) > 3


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"type": "string", "pattern": "("}, "a pattern that is not supported: unclosed group"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-ahead"),
        ({"$ref": "#/$defs/none"}, "has a $ref to /$defs/none, which is not in it"),
        ({"$ref": "https://example.com/schema"}, "put it under $defs"),
        ({"$ref": "#"}, "leads back to itself and to nothing else; give it an alternative"),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, "leads back to itself and to nothing else"),
        ({"$ref": "#/$defs/a", "$defs": MUTUAL}, "leads back to itself and to nothing else"),
        ({"allOf": [{"$ref": "#"}, {"type": "string"}]}, "leads back to itself, and other"),
        ({"allOf": [{"$ref": f"#/$defs/{one}"} for one in "ab"], "$defs": CROSSED}, "each other"),
        ({"not": {}, "uniqueItems": True}, 'not supported: "not", "uniqueItems"; leave them out'),
        ({"oneOf": [{"minLength": 1}, {"type": "string"}]}, "use anyOf"),
        ({"allOf": [{"pattern": "^a"}, {"pattern": "^b"}], "type": "string"}, "contradict"),
        ({"allOf": [{"type": "null"}, {"type": "string"}]}, "allows no document"),
        ({"enum": []}, "allows no document"),
        ({"required": "a"}, "Expected array for"),
        ({"type": "number", "multipleOf": 0}, "multipleOf"),
        ({"type": "number", "multipleOf": 0.123456789123}, "too many digits"),
        (PATTERNS, "is too complex; use fewer"),
        ({"type": "array", "minItems": 10**6, "items": {"type": "null"}}, ""),
        ({"type": "string", "minLength": 10**6}, ""),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, ""),
        ({"enum": [f"number {place}" for place in range(20_000)]}, None),
        ({"type": "string", "pattern": "(a?){200}a{200}"}, None),
        ({"anyOf": [{"type": "string", "minLength": one} for one in range(300)]}, None),
        (json.loads('{"items": ' * 60 + "{}" + "}" * 60), None),
    ],
)
def test_a_schema_is_refused_or_kept_to_and_neither_takes_long(grammars, schema, fault):
    started = time.monotonic()
    found = attempt(grammars, schema, 1000)
    assert time.monotonic() - started < 20  # it is a second or so; others may use the machine
    if isinstance(found, InvalidRequest):
        assert fault is None or fault in str(found.details)
    else:
        assert fault is None
        jsonschema.validate(json.loads(found), schema)


def attempt(grammars, schema, room):
    """A document, or its refusal."""
    try:
        return write(grammars, schema, room, 1)[0]
    except InvalidRequest as refusal:
        return refusal


def test_grammars_are_kept_and_the_oldest_go(grammars):
    kept = grammars[0]._kept
    for place in range(20):
        start(grammars[0], form({"const": place}), 50)
    assert len(kept) == 16
    first = next(iter(kept))
    start(grammars[0], form(json.loads(first)), 50)
    assert next(iter(kept)) != first


def test_grammars_are_kept_within_a_sum_of_bytes(grammars, monkeypatch):
    monkeypatch.setattr(grammar, "MAX_KEPT_BYTES", 16 * 2**20)
    kept = grammars[0]._kept
    for name in "abc":  # of some 6 MB
        schema = {"enum": [f"{name} {place}" for place in range(20_000)]}
        start(grammars[0], form(schema), 50)
    assert [json.loads(schema)["enum"][0] for schema in kept] == ["b 0", "c 0"]
    sizes = [compiled.result().size for compiled in kept.values()]
    assert all(size > 3 * 2**20 for size in sizes), sizes


@pytest.mark.parametrize("name", ["t5", "masked_lm"])
def test_a_tokenizer_of_another_kind_is_refused_or_serves(checkpoint, name):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    found = attempt((Grammars(tokenizer, [1]), tokenizer), OBJECT, 60)
    if isinstance(found, InvalidRequest):
        assert "options.response_format" in found.details
    else:
        json.loads(found)


def test_a_model_without_an_end_is_refused(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    with pytest.raises(InvalidRequest, match="no token for the end"):
        start(Grammars(tokenizer, []), form(OBJECT), 50)
