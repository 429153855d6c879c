"""How many values a body may have, and how deep: what checks it costs no more than its parsing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from backend.errors import InvalidRequest

MAX_DEPTH = 64  # levels of nesting; no task's input needs ten, and msgpack refuses 512
TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels"
# Of a whole body, in which an input is nested once or twice more: Python's own functions (repr,
# ==) stop at a thousand.
MAX_BODY_DEPTH = 2 * MAX_DEPTH
# An object takes some 10 µs to check, and has 2 values or more: half a second for a body. A batch
# of CRANE_MAX_BATCH texts fits, whatever the setting.
MAX_VALUES = 2**17
TOO_MANY = f"has more than {MAX_VALUES} values (list items and keys); send less at once"
STARTS = b",", b"[", b"{"  # of a value, but the first in a list or object
NO_MARKS = bytes(set(range(256)) - set(b',[{"'))
# What the inputs of a call come to, in texts of CRANE_MAX_TEXT: by default as many characters as
# the largest body has bytes, so that no call is more work to read than one that sends it all.
MAX_TEXTS = 32


def check_source(data: bytes, at: str) -> None:
    """Refuse a body that is going to have too many values, before any is made: ``InvalidRequest``.

    What 32 MB of zeros come to takes a gigabyte and a second of all threads. It may have twice
    ``MAX_VALUES``, as a list or object that is empty is counted twice here.
    """
    most = 2 * MAX_VALUES
    if sum(map(data.count, STARTS)) <= most:
        return
    # Without strings: what is in them is text.
    if b"\\" in data:
        data = data.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = data.translate(None, NO_MARKS)
    if marks.count(b'"') <= 4 * most:  # which is two keys and texts for each
        outside = b"".join(marks.split(b'"')[::2])
        if len(outside) <= most:
            return
    raise InvalidRequest.of({at: TOO_MANY})


def is_harmless(data: bytes | str) -> bool:
    """Whether JSON is too short for too many values, and has too few brackets to be too deep."""
    if len(data) > MAX_VALUES:
        return False
    if isinstance(data, str):
        return data.count("{") + data.count("[") <= MAX_BODY_DEPTH
    return data.count(b"{") + data.count(b"[") <= MAX_BODY_DEPTH


def check_body(value: Any, at: str) -> None:
    """Refuse JSON with too many values, or nested too deeply: ``InvalidRequest``."""
    depth, values = measure(value, max_depth=MAX_BODY_DEPTH, max_values=MAX_VALUES)
    if values > MAX_VALUES:
        raise InvalidRequest.of({at: TOO_MANY})
    if depth > MAX_BODY_DEPTH:
        raise InvalidRequest.of({at: f"is nested deeper than {MAX_BODY_DEPTH} levels"})


def is_deep(value: Any) -> bool:
    """Whether a value is nested past ``MAX_DEPTH``."""
    return measure(value, max_depth=MAX_DEPTH)[0] > MAX_DEPTH


def measure(value: Any, *, max_depth: int, max_values: float = math.inf) -> tuple[int, int]:
    """How many levels of values are below one, and how many values; no further than a maximum."""
    depth, values = 0, 1
    level = [value] if type(value) in (list, dict) else []
    while (count := sum(map(len, level))) and depth <= max_depth:
        depth, values = depth + 1, values + count
        if values > max_values:
            break
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is list or type(inner) is dict
        ]
    return depth, values


def text_size(value: Any) -> int:
    """The characters of all strings in a value of sound depth, keys included; media are none."""
    if type(value) is str:
        return len(value)
    if type(value) is list:
        return sum(map(text_size, value))
    if type(value) is dict:
        return sum(map(len, value)) + sum(map(text_size, value.values()))
    return 0


def long_texts(value: Any, max_text: int, at: str) -> Iterator[tuple[str, int]]:
    """The path and the length of each string above ``max_text`` characters in a value."""
    if type(value) is str:
        if len(value) > max_text:
            yield at, len(value)
    elif type(value) is list:
        for index, one in enumerate(value):
            yield from long_texts(one, max_text, f"{at}[{index}]")
    elif type(value) is dict:
        for key, one in value.items():
            yield from long_texts(one, max_text, f"{at}.{key[:80]}")
