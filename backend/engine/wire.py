"""How messages look between an HTTP worker and an engine: msgpack, with numpy arrays as bytes.

An HTTP worker's thread has a connection of its own and one request on it at a time: a call, an
order (``["load", model_id]``), or None to ask for the engine's status. Closing the connection says
that nobody waits any more.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

from backend.engine.calls import Answer, Event
from backend.errors import ERRORS, CraneError, InternalError

_ARRAY = 1  # msgpack's code for an extension type of ours


def pack(message: Any) -> bytes:
    data: bytes = msgpack.packb(message, default=_pack_other)
    return data


def unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_unpack_other, strict_map_key=False)


def _pack_other(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        header = msgpack.packb((value.dtype.str, value.shape))
        return msgpack.ExtType(_ARRAY, header + np.ascontiguousarray(value).tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not travel between processes")


def _unpack_other(code: int, data: bytes) -> Any:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    dtype, shape = unpacker.unpack()
    return np.frombuffer(data, dtype=dtype, offset=unpacker.tell()).reshape(shape)


def pack_answer(call_id: str, answer: Event | Answer | CraneError | None) -> bytes:
    """An answer to a call, or an event before it; ``call_id`` is the request's own.

    To an order it is None, or an error, and the id is the model's.
    """
    if isinstance(answer, Event):
        return pack({"id": call_id, "event": (answer.kind, answer.data)})
    if not isinstance(answer, CraneError):
        return pack({"id": call_id, "answer": answer and answer.to_wire()})
    error = {
        "code": answer.code,
        "message": answer.message,
        "details": answer.details,
        "retry_after_s": answer.retry_after_s,
    }
    return pack({"id": call_id, "error": error})


def unpack_answer(call_id: str, data: bytes) -> Event | Answer | CraneError | None:
    """The answer to ``call_id``, or an event of it; raises ``ValueError`` for another call's."""
    message = unpack(data)
    if message["id"] != call_id:
        raise ValueError(f"the answer is to {message['id']!r}, not to {call_id!r}")
    if "event" in message:
        return Event(*message["event"])
    if "answer" in message:
        return message["answer"] and Answer(**message["answer"])
    error = message["error"]
    return ERRORS.get(error.pop("code"), InternalError)(error.pop("message"), **error)
