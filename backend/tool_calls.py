"""The calls of tools that a chat model writes, in the forms that models write them in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import orjson


class Call(TypedDict):
    name: str
    arguments: dict[str, Any]


def to_call(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tools of a chat's input one of which has to be called; none where it need not be."""
    choice = value.get("tool_choice", "auto")
    if choice == "auto":
        return []
    wanted = None if choice == "required" else choice["name"]
    return [tool for tool in value["tools"] if wanted in (None, tool["function"]["name"])]


def schema_of_a_call(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of these tools, in the first form of ``read_calls``."""
    calls, parameters = [], {}
    for place, tool in enumerate(tools):
        function = tool["function"]
        at = f"#/$defs/{place}"
        nothing = {"properties": {}, "additionalProperties": False}
        own = _moved(function.get("parameters") or nothing, at)
        parameters[str(place)] = {**own, "type": "object"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": at}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": parameters}


def _moved(schema: Any, to: str) -> Any:
    """A schema with what it says of its own parts, now that it is part of another."""
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {name: _moved(one, to) for name, one in schema.items()}
    if isinstance(part := moved.get("$ref"), str) and part.startswith("#"):
        moved["$ref"] = to + part[1:]
    return moved


def read_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> list[Call]:
    """The calls that a text is; none where it is not whole, or not all of tools that are offered.

    ``tools`` are as OpenAI has them: ``{"type": "function", "function": {"name": …}}``. What a
    call says can be written as JSON again.
    """
    functions = [tool["function"] for tool in tools]
    offered = {function["name"]: function.get("parameters") or {} for function in functions}
    for form in _FORMS:
        try:
            calls = form(text.strip(), offered)
            # Halves of characters, numbers of any size, and a depth that no message has.
            orjson.dumps(calls)
        except (ValueError, RecursionError, orjson.JSONEncodeError):
            continue
        if calls and all(call["name"] in offered for call in calls):
            return calls
    return []


def _as_json(text: str, offered: Mapping[str, Any]) -> list[Call]:
    """``{"name": …, "arguments": {…}}``, a list of such, or several after each other."""
    calls = []
    while text:
        value, end = _DECODER.raw_decode(text)
        calls += [_call(each) for each in (value if isinstance(value, list) else [value])]
        text = text[end:].lstrip(" \t\r\n;,")
    return calls


def _finite(number: str) -> float:
    if number in ("NaN", "Infinity", "-Infinity") or abs(float(number)) == float("inf"):
        raise ValueError(f"{number} is not JSON")
    return float(number)


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def _call(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("it names no tool")
    given = [value[name] for name in ("arguments", "parameters") if name in value]
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("its arguments are no object")
    return {"name": value["name"], "arguments": arguments}


# Mistral's name[ARGS]{…}, and harmony's name, what is written in, <|message|> and {…}.
_NAMED = re.compile(
    r"([\w.-]+)(?:\[CALL_ID\][\w-]+)?(?:\s*\[ARGS\]|[^{}]{0,80}<\|message\|>)?\s*(\{.*\})",
    re.DOTALL,
)


def _as_named(text: str, offered: Mapping[str, Any]) -> list[Call]:
    found = _NAMED.fullmatch(text)
    if not found:
        raise ValueError("no name is before its arguments")
    return [_call({"name": found[1], "arguments": found[2]})]


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _as_xml(text: str, offered: Mapping[str, Any]) -> list[Call]:
    """Qwen3-Coder's ``<function=name><parameter=key>value</parameter></function>``."""
    calls: list[Call] = []
    for name, inside in _pairs(_FUNCTION, text):
        properties = offered.get(name, {}).get("properties", {})
        arguments = {
            key: _typed(value, properties.get(key)) for key, value in _pairs(_PARAMETER, inside)
        }
        calls.append({"name": name, "arguments": arguments})
    return calls


def _pairs(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Every match's two groups; nothing may be between them."""
    place = 0
    while place < len(text):
        found = pattern.match(text, place)
        if not found:
            if text[place:].isspace():
                return
            raise ValueError("something is outside the tags")
        yield found[1], found[2]
        place = found.end()


def _typed(text: str, schema: Any) -> Any:
    """A value as its parameter's schema types it: the tags hold text alone."""
    if isinstance(schema, Mapping) and schema.get("type", "string") == "string":
        return text
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


_FORMS: tuple[Callable[[str, Mapping[str, Any]], list[Call]], ...] = (_as_json, _as_xml, _as_named)
