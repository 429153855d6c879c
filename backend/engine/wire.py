"""How messages look between an HTTP worker and an engine: msgpack, with numpy arrays as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from backend.engine.calls import Answer
from backend.errors import ERRORS, CraneError, InternalError

RUN, CANCEL, STATUS = b"run", b"cancel", b"status"

_ARRAY = 1  # msgpack's code for an extension type of ours


def lifeline_of(path: Path) -> Path:
    """The socket beside the engine's own that is open as long as the engine lives."""
    return path.with_suffix(".alive")


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


def pack_answer(answer: Answer | CraneError) -> bytes:
    if isinstance(answer, Answer):
        return pack({"answer": answer.to_wire()})
    error = {
        "code": answer.code,
        "message": answer.message,
        "details": answer.details,
        "retry_after_s": answer.retry_after_s,
    }
    return pack({"error": error})


def unpack_answer(data: bytes) -> Answer | CraneError:
    message = unpack(data)
    if "answer" in message:
        return Answer(**message["answer"])
    error = message["error"]
    return ERRORS.get(error.pop("code"), InternalError)(error.pop("message"), **error)
