"""What an HTTP worker and an engine say to each other, and what each takes from the other.

An HTTP worker's thread has a connection of its own and one request on it at a time: a call, an
order (``["load", model_id]``), or None to ask for the engine's status. Closing the connection says
that nobody waits any more. Each end checks the fields and types of what comes in, so that a wrong
message costs its connection and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from backend.engine.calls import Answer, Call, Event
from backend.errors import ERRORS, CraneError, InternalError
from backend.messages import BadMessage, Part, pack, unpack

__all__ = ["BadMessage", "pack", "unpack"]

# Asks what was used of the call on this connection, if it began to run; so is the event called.
BEGUN = "begun"
# Says that the engine ends before it would begin the call: another may do it.
ENDING = "ending"
ORDERS = ("load", "unload", "prepare", BEGUN)
MAX_RUNS = 100_000  # of a call: the most that CRANE_MAX_BATCH may be

_Kinds = Mapping[str, tuple[type, ...]]
_NUMBER = (float, int)


def _kinds(message: type) -> _Kinds:
    """The types that each field of a dataclass may be of, once it has travelled."""
    kinds: dict[str, tuple[type, ...]] = {}
    for name, hint in get_type_hints(message).items():
        union = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = [get_origin(one) or one for one in union]
        kinds[name] = tuple(
            {kind for one in plain for kind in (_NUMBER if one is float else (one,))}
        )
    return kinds


_CALL, _ANSWER = _kinds(Call), _kinds(Answer)
_ERROR: _Kinds = {
    "code": (str,),
    "message": (str,),
    "details": (dict,),
    "retry_after_s": (*_NUMBER, NoneType),
    "usage": (dict, NoneType),
}


def read_request(parts: Sequence[Part]) -> Call | tuple[str, str] | None:
    """A call, an order and its model, or None; raises ``BadMessage``."""
    message = unpack(parts)
    if message is None:
        return None
    if type(message) is not list:
        return _call(message)
    if len(message) != 2 or message[0] not in ORDERS or type(message[1]) is not str:
        raise BadMessage("it is an order that is not known")
    return message[0], message[1]


def _call(message: Any) -> Call:
    call = Call(**_checked(message, _CALL, "call"))
    runs = len(call.inputs) * call.repeat
    if call.repeat < 1 or not 1 <= runs <= MAX_RUNS:
        raise BadMessage(f"its call has no inputs, or more than {MAX_RUNS} runs of them")
    if call.seeds is not None and len(call.seeds) != runs:
        raise BadMessage("its call has not a seed for each run of its inputs")
    if any(type(name) is not str for name in call.options):
        raise BadMessage("its call has an option whose name is no text")
    if any(type(seed) is not int for seed in call.seeds or ()):
        raise BadMessage("its call has a seed that is no whole number")
    if not math.isfinite(call.timeout_s) or math.isnan(call.keep_alive_s or 0):
        raise BadMessage("its call has a time that is none")
    return call


def _checked(message: Any, kinds: _Kinds, what: str) -> dict[str, Any]:
    """The fields of a message, each there and of its type, and no others."""
    if type(message) is not dict or message.keys() != kinds.keys():
        raise BadMessage(f"its {what} has other fields than {', '.join(kinds)}")
    for name, value in message.items():
        if type(value) not in kinds[name]:
            raise BadMessage(f"its {what} has {name} of type {type(value).__name__}")
    return message


def pack_answer(call_id: str, answer: Event | Answer | CraneError | None) -> list[Part]:
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
        "usage": answer.usage,
    }
    return pack({"id": call_id, "error": error})


def unpack_answer(call_id: str, parts: Sequence[Part]) -> Event | Answer | CraneError | None:
    """The answer to ``call_id``, or an event of it; raises ``BadMessage``, as for another's."""
    message = unpack(parts)
    if type(message) is not dict or len(message) != 2 or message.get("id") != call_id:
        raise BadMessage(f"it is no answer to {call_id!r}")
    if "event" in message:
        event = message["event"]
        if type(event) is not list or [type(one) for one in event] != [str, dict]:
            raise BadMessage("its event is not a kind and what there is to tell")
        return Event(*event)
    if "answer" in message:
        answer = message["answer"]
        return None if answer is None else Answer(**_checked(answer, _ANSWER, "answer"))
    told = _checked(message.get("error"), _ERROR, "error")
    kind = ERRORS.get(told["code"], InternalError)
    try:
        error = kind(told["message"], details=told["details"], retry_after_s=told["retry_after_s"])
    except TypeError:  # an error of HTTP's, which an engine does not know
        raise BadMessage(f"its error is {told['code']!r:.40}") from None
    error.usage = told["usage"]
    return error


def unpack_status(parts: Sequence[Part]) -> dict[str, Any]:
    """What ``Engine.status`` said; raises ``BadMessage``."""
    message = unpack(parts)
    if type(message) is not dict or type(message.get("models")) is not dict:
        raise BadMessage("it is no status")
    return message
