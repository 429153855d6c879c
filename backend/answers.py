"""Runs of what the hook has read, of any route: answered at once, or streamed as events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from flask import Response, g, request

from backend.engine.calls import Event
from backend.errors import ClientClosedRequest, CraneError, error_body
from backend.http import add_headers, crane, internal_error, to_json
from backend.models import run_model, stream_model
from backend.quota_api import release_permit
from backend.sse import EVENT_STREAM, IDLE, event
from backend.visibility import visible_error, visible_weights

Writer = Callable[[Iterator[Event | None], str], Iterator[str]]


def answered(*, one_output: bool = False) -> tuple[Any, dict[str, Any]]:
    """The output and the receipt; ``one_output`` refuses what would have several."""
    known: Any = g._get_current_object()
    output, metadata = run_model(crane(), **_asked(known), one_output=one_output)
    _note(known, metadata)
    return output, metadata


def _asked(known: Any) -> dict[str, Any]:
    body = known.body
    return {
        "model_id": body["model_id"],
        "input_": body["input"],
        "options": body["options"],
        "request_id": known.request_id,
        "caller": known.caller.subject,
        "admin": known.caller.admin,
        "repeat": body.get("repeat", 1),
        "charge": known.charge,
        "caller_socket": request.environ.get("gunicorn.socket"),  # other servers keep it
    }


def _note(known: Any, metadata: dict[str, Any]) -> None:
    """Keep what is logged of a call."""
    _hide(known, metadata)
    known.log |= {name: metadata[name] for name in ("timings_ms", "batch_size")}


def _hide(known: Any, metadata: dict[str, Any]) -> None:
    metadata["hf_model"] = visible_weights(known.caller, metadata["hf_model"])


def write_events(events: Iterator[Event | None], request_id: str) -> Iterator[str]:
    """``POST /crane/run``'s own: each event under its name."""
    for told in events:
        yield IDLE if told is None else _written(told)


def _written(told: Event) -> str:
    """An event as text, and no more of its output than that, which its client may read slowly."""
    text = event(to_json(told.data), told.kind)
    if told.kind == "output":
        told.data.clear()
    return text


def write_error(error: CraneError, request_id: str) -> str:
    return event(to_json(error_body(error, request_id)), "error")


def streamed(
    write: Writer = write_events, write_error: Callable[[CraneError, str], str] = write_error
) -> Response:
    """Stream what is told, as ``write`` writes it.

    An error that comes before anything else, within ``IDLE_S``, is raised, and so an answer like
    any other; after that it is the stream's last event.
    """
    known: Any = g._get_current_object()
    parts = crane()
    events = stream_model(parts, **_asked(known))
    del known.body  # whose input would stay until the stream's end

    def seen() -> Iterator[Event | None]:
        for told in chain([first], events):
            if told is not None and told.kind == "start":
                _hide(known, told.data["metadata"])
            if told is not None and told.kind == "done":
                _note(known, told.data["metadata"])
            yield told

    failed: CraneError | None = ClientClosedRequest("")  # unless it comes to its end

    def lines() -> Iterator[str]:
        nonlocal failed
        try:
            yield from write(seen(), known.request_id)
            failed = None
        except ClientClosedRequest:
            pass
        except CraneError as error:
            failed = visible_error(known.caller, parts.registry, error)
            yield write_error(failed, known.request_id)
        except Exception as error:
            failed = internal_error(error, known.request_id)
            yield write_error(failed, known.request_id)

    def end() -> None:
        """However much of it was sent: nothing of ``lines`` runs if its first is not taken."""
        events.close()
        if failed is not None:
            known.log["error"] = failed.code
        release_permit(parts, known)

    first = next(events)
    known.streams = True
    add_headers({"X-Accel-Buffering": "no"})  # nginx would keep events until it has some kilobytes
    response = Response(lines(), mimetype=EVENT_STREAM)
    response.call_on_close(end)
    return response
