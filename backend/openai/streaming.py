"""From the events of a model's stream to the lines of OpenAI's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from backend import sse
from backend.engine.calls import Event
from backend.errors import CraneError
from backend.openai.base import Order, each
from backend.openai.errors import error_of
from backend.openai.writing import facts, head, usage

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a route words the choices of its chunks.

    ``first`` is the begin of each reply, if it has one; ``more`` is some text of it, which may be
    of the kind ``reasoning``; ``last`` are its last chunks, by the receipt's facts.
    """

    kind: str
    first: Callable[[], dict[str, Any]] | None
    more: Callable[[str, str | None], dict[str, Any]]
    last: Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]


def chunks_of(
    style: Style, order: Order, events: Iterable[Event | None], request_id: str
) -> Iterator[str]:
    """Server-sent events; a comment where there is nothing to tell."""
    wants_usage = order.body.get("stream_options", {}).get("include_usage", False)
    begun = head(style.kind, order.spec.id, request_id)
    # OpenAI's have the key in every chunk where the last one has the usage.
    between = {"usage": None} if wants_usage else {}
    places = range(order.repeat * (len(order.input) if type(order.input) is list else 1))
    spoken = set()

    def chunk(place: int, choice: Mapping[str, Any]) -> str:
        return line({**begun, "choices": [{"index": place, **choice}], **between})

    for event in events:
        if event is None:
            yield sse.IDLE
            continue
        data = event.data
        if event.kind == "start" and style.first:
            for place in places:
                yield chunk(place, style.first())
        elif event.kind == "delta":
            if data.get("kind") != "reasoning":
                spoken.add(data["index"])
            yield chunk(data["index"], style.more(data["text"], data.get("kind")))
        elif event.kind == "output":
            # Whatever came in pieces is known by now; a model may have none of them.
            for place, text in enumerate(each(order, data["output"])):
                if text and place not in spoken:
                    yield chunk(place, style.more(text, None))
        elif event.kind == "done":
            metadata = data["metadata"]
            for place in places:
                for choice in style.last(facts(metadata, place, batched=order.batched)):
                    yield chunk(place, choice)
            if wants_usage:
                yield line({**begun, "choices": [], "usage": usage(metadata)})
    yield DONE


def write_error(order: Order, error: CraneError, request_id: str) -> str:
    """What a stream ends with that has begun and cannot go on."""
    return line(error_of(order.renamed(error)))


def line(body: Mapping[str, Any]) -> str:
    return sse.event(orjson.dumps(body))
