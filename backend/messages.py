"""Values as messages between processes: msgpack, with large arrays and files beside it.

A message is a list of parts: the first is msgpack, and each array or file of ``BESIDE`` bytes or
more is a part of its own, so that it is sent and received without a copy. What comes in is checked:
whatever it is, ``unpack`` returns a value of JSON's kinds, arrays and ``Media``, or raises
``BadMessage``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgpack
import numpy as np
import orjson

from backend.media import Media

BESIDE = 65536  # bytes; what is smaller costs less as a copy than as a part
MAX_DIMENSIONS = 8
# What a dict of two or three short values takes beside its JSON, such as a token's log probability.
OBJECT_BYTES = 400

# msgpack's codes for extension types of ours. The head of each says what it is; then come its
# bytes, or none where they are a part of their own, whose index the head has.
_ARRAY, _MEDIA = 1, 2
_MAX_HEAD = 1024  # bytes
_KINDS = "biuf"  # numpy's: booleans, integers, floats; never objects, which would be pointers

Part = bytes | memoryview


class BadMessage(ValueError):
    """What came is no message of ours. It is for the log: callers are not told of it."""


def pack(value: Any) -> list[Part]:
    """The parts of a message. Raises ``TypeError`` for what does not travel."""
    parts: list[Part] = []
    first: bytes = msgpack.packb(value, default=partial(_pack_other, parts))
    return [first, *parts]


def unpack(parts: Sequence[Part]) -> Any:
    """The value of a message; raises ``BadMessage``. Arrays are views of its parts."""
    try:
        return msgpack.unpackb(
            parts[0], ext_hook=partial(_unpack_other, parts), strict_map_key=False
        )
    except BadMessage:
        raise
    except Exception as error:  # msgpack's errors have no common parent, and hooks raise others
        raise BadMessage(f"it is not msgpack as we write it: {error!r:.200}") from None


def weight(value: Any) -> int:
    """About how many bytes a value takes, as JSON and as Python's objects.

    It is its JSON, of which none is made here of arrays and files, and ``OBJECT_BYTES`` for each
    object. Raises ``TypeError`` for what does not travel.
    """
    beside = 0

    def other(one: Any) -> Any:
        nonlocal beside
        if isinstance(one, np.ndarray):
            # 255 has three digits, and most of float32 up to 12 characters; so has a float16.
            narrow = 4 if one.dtype.kind == "f" else 1
            beside += one.size * (3 * max(one.itemsize, narrow) + 1)
            return None
        if isinstance(one, Media):
            beside += 4 * len(one.data) // 3 + 64  # base64, and the object around it
            return one.mime_type
        if isinstance(one, np.generic):
            return one.item()
        raise TypeError(f"{type(one).__name__} does not travel between processes")

    options = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS
    data = orjson.dumps(value, default=other, option=options)
    objects = data.count(b'{"')  # which no text has, where a quote has a backslash before it
    return len(data) + OBJECT_BYTES * objects + beside


def _pack_other(parts: list[Part], value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return _extension(_ARRAY, parts, flat.data, value.dtype.str, value.shape)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Media):
        return _extension(_MEDIA, parts, memoryview(value.data), value.mime_type)
    raise TypeError(f"{type(value).__name__} does not travel between processes")


def _extension(code: int, parts: list[Part], data: memoryview, *head: Any) -> msgpack.ExtType:
    if len(data) < BESIDE:
        return msgpack.ExtType(code, msgpack.packb((0, *head)) + data)
    parts.append(data)
    return msgpack.ExtType(code, msgpack.packb((len(parts), *head)))


def _unpack_other(parts: Sequence[Part], code: int, data: bytes) -> Any:
    # Only a head is unpacked here, whatever the extension weighs.
    unpacker = msgpack.Unpacker(max_buffer_size=_MAX_HEAD)
    unpacker.feed(memoryview(data)[:_MAX_HEAD])
    index, *head = unpacker.unpack()
    if type(index) is not int or not 0 <= index < len(parts):
        raise BadMessage("it names a part that it does not have")
    body = memoryview(parts[index] if index else data)
    body = body if index else body[unpacker.tell() :]
    if code == _ARRAY:
        return _array(body, *head)
    if code == _MEDIA:
        [mime_type] = head
        return Media(mime_type, bytes(body))
    raise BadMessage(f"it has an extension of the unknown type {code}")


def _array(body: memoryview, dtype: str, shape: list[int]) -> np.ndarray:
    """An array over its bytes, once they are as many as its shape needs."""
    kind = np.dtype(dtype)
    if kind.kind not in _KINDS or len(shape) > MAX_DIMENSIONS:
        raise BadMessage(f"it has an array of {kind} with {len(shape)} dimensions")
    if any(type(side) is not int or side < 0 for side in shape):
        raise BadMessage("it has an array whose shape is none")
    if math.prod(shape) * kind.itemsize != len(body):
        raise BadMessage("it has an array that is not as long as its shape")
    return np.frombuffer(body, kind).reshape(shape)
