"""Answers that are streamed as server-sent events: what every one of them has in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from socket import socket
from typing import Any

from flask import Response, g, request

from backend.engine.calls import Event
from backend.errors import ClientClosedRequest, CraneError, InternalError
from backend.http import add_headers, crane, error_body, to_json
from backend.models import stream_model
from backend.quota_api import settle_stream
from backend.sse import EVENT_STREAM, IDLE, event

logger = logging.getLogger("crane.http")

# For one event to be taken by a caller that reads nothing: its thread is free then.
SEND_TIMEOUT_S = 30.0

Writer = Callable[[Iterator[Event | None], str], Iterator[str]]


def write_events(events: Iterator[Event | None], request_id: str) -> Iterator[str]:
    """``POST /crane/run``'s own: each event under its name."""
    for told in events:
        yield IDLE if told is None else event(to_json(told.data), told.kind)


def write_error(error: CraneError, request_id: str) -> str:
    return event(to_json(error_body(error, request_id)), "error")


def streamed(
    write: Writer = write_events, write_error: Callable[[CraneError, str], str] = write_error
) -> Response:
    """Stream what is told of the call that the hook has read, as ``write`` writes it.

    An error that comes before anything else, within ``IDLE_S``, is raised, and so an answer like
    any other; after that it is the stream's last event.
    """
    known: Any = g._get_current_object()
    parts = crane()
    caller: socket | None = request.environ.get("gunicorn.socket")
    body = known.body
    events = stream_model(
        parts,
        body["model_id"],
        body["input"],
        body["options"],
        request_id=known.request_id,
        caller_socket=caller,
    )

    def seen() -> Iterator[Event | None]:
        for told in chain([first], events):
            if told is not None and told.kind == "done":
                metadata = told.data["metadata"]
                known.usage = metadata["usage"]
                known.log |= {name: metadata[name] for name in ("timings_ms", "batch_size")}
            yield told

    def lines() -> Iterator[str]:
        failed: CraneError | None = ClientClosedRequest("")  # unless it comes to its end
        if caller is not None:
            caller.settimeout(SEND_TIMEOUT_S)
        try:
            yield from write(seen(), known.request_id)
            failed = None
        except ClientClosedRequest:
            pass
        except CraneError as error:
            failed = error
            yield write_error(error, known.request_id)
        except Exception as error:
            failed = InternalError()
            fields = {"request_id": known.request_id}
            logger.error("request failed", exc_info=error, extra={"fields": fields})
            yield write_error(failed, known.request_id)
        finally:
            events.close()
            if failed is not None:
                known.log["error"] = failed.code
            settle_stream(parts.meter, known, failed)
            if caller is not None:
                caller.settimeout(None)

    first = next(events)
    known.streams = True
    add_headers({"X-Accel-Buffering": "no"})  # nginx would keep events until it has some kilobytes
    return Response(lines(), mimetype=EVENT_STREAM)
