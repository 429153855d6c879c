"""What a call's body may be, and what its answer: JSON, a form with files, bare bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson
from flask import Response, current_app, g, request
from werkzeug.exceptions import RequestEntityTooLarge

from backend.bounds import check_body, check_source, is_harmless
from backend.errors import InvalidRequest, NotAcceptable, PayloadTooLarge, UnsupportedMediaType
from backend.fair_lock import FairLock
from backend.held_bodies import SMALL
from backend.media import Media
from backend.media.parts import Upload
from backend.registry import ModelSpec
from backend.sse import EVENT_STREAM
from backend.tasks import TASKS

JSON = "application/json"
FORM = "multipart/form-data"
MAX_FORM_PARTS = 100
PARTS = ("model_id", "input", "options", "stream")  # of a form, beside those of its input
_large = FairLock()
HEADER_TEXT = 200  # characters of one option's text in X-Crane-Metadata


def request_body() -> Any:
    """The request's JSON or form; raises ``UnsupportedMediaType`` or ``InvalidRequest``."""
    if request.is_json:
        return _json()
    if request.mimetype == FORM:
        return form_body()
    raise _not_sent_as(f"{JSON}, or files as {FORM}")


def json_body() -> Any:
    """The request's JSON; raises ``UnsupportedMediaType`` or ``InvalidRequest``."""
    if not request.is_json:
        raise _not_sent_as(JSON)
    return _json()


def _json() -> Any:
    data = _body_bytes()
    if len(data) <= SMALL:
        return json_of(data, "body")
    with _large.hold(g.caller.subject):
        return json_of(data, "body")


def _body_bytes() -> bytes:
    """The body, which nothing keeps: its values take as much again."""
    _check_encoding()
    length = request.content_length
    if length is None or length > min(SMALL, current_app.config["MAX_CONTENT_LENGTH"]):
        data = request.get_data(cache=False)
    else:  # at once: Werkzeug would ask four times more for what comes behind it
        data = request.environ["wsgi.input"].read(length)
        if len(data) < length:
            raise InvalidRequest.of({"body": "ends before all of it has come"})
    g.body_bytes = len(data)
    return data


def _check_encoding() -> None:
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        fault = f"Send the body without Content-Encoding; this one's is {encoding[:100]}."
        raise UnsupportedMediaType(fault)


def form_lists() -> dict[str, Any]:
    """The parts of a form by name; those whose name ends with ``[]`` are a list without it.

    Raises ``UnsupportedMediaType`` or ``InvalidRequest``.
    """
    if request.mimetype != FORM:
        raise _not_sent_as(FORM)
    parts: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for name, value in form_parts():
        bare_name = name.removesuffix("[]")
        if bare_name == name and name in parts:
            faults[name[:80]] = f"is there twice; the parts of a list are called {name[:80]}[]"
        elif bare_name == name:
            parts[name] = value
        elif type(parts.setdefault(bare_name, [])) is list:
            parts[bare_name].append(value)
        else:
            faults[name[:80]] = f"is there as {bare_name[:80]} too"
    if faults:
        raise InvalidRequest.of(faults)
    return parts


def _not_sent_as(wanted: str) -> UnsupportedMediaType:
    sent = request.mimetype[:100] or "none"
    return UnsupportedMediaType(f"Send the body as Content-Type: {wanted}; this one's is {sent}.")


def json_of(data: bytes | str, at: str) -> Any:
    if len(data) > SMALL:
        check_source(data.encode(errors="replace") if isinstance(data, str) else data, at)
    try:
        # Strict: no NaN, no bad UTF-8, no lone surrogates, no endless nesting.
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest.of({at: f"is not valid JSON: {error}"}) from None
    if not is_harmless(data):
        check_body(value, at)
    return value


def form_body() -> dict[str, Any]:
    """The form's parts as the JSON body they stand for.

    ``model_id`` and ``input.…`` are text, ``input.…`` or ``input`` may be files, ``options`` and
    ``stream`` are JSON. ``input`` by itself is text; where there are ``input.…`` too, it is the
    JSON object that they are put into. Raises ``InvalidRequest``.
    """
    parts: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for name, value in form_parts():
        at = name[:80]
        if name in parts:
            faults[at] = "is there twice; send a batch as JSON"
        elif name not in PARTS and not re.fullmatch(r"input\.\w+", name):
            faults[at] = f"is not a part that is known here: {', '.join(PARTS)} or input.…"
        parts[name] = value
    if faults:
        raise InvalidRequest.of(faults)
    body: dict[str, Any] = {name: parts[name] for name in ("model_id", "input") if name in parts}
    body |= {n: json_part(parts[n], n) for n in ("options", "stream") if n in parts}
    if inside := {name: parts[name] for name in parts if name.startswith("input.")}:
        body["input"] = json_part(body.get("input", "{}"), "input")
        if type(body["input"]) is not dict:
            fault = "must be a JSON object where there are input.… parts too"
            raise InvalidRequest.of({"input": fault})
        body["input"] |= {name.removeprefix("input."): part for name, part in inside.items()}
    return body


def json_part(part: str | Upload, at: str) -> Any:
    return json_of(part.data if isinstance(part, Upload) else part, at)


def form_parts() -> Iterator[tuple[str, str | Upload]]:
    _check_encoding()
    if "boundary" not in request.mimetype_params:
        raise InvalidRequest.of({"body": "is multipart/form-data without a boundary"})
    try:
        for name, text in request.form.items(multi=True):
            yield _named(name), text
    except RequestEntityTooLarge:
        most = current_app.config["MAX_CONTENT_LENGTH"]
        raise PayloadTooLarge(
            f"The form is larger than {most} bytes or has more than {MAX_FORM_PARTS} parts."
        ) from None
    for name, file in request.files.items(multi=True):
        with file.stream:
            yield _named(name), Upload(file.stream.read(), file.mimetype or None)


def _named(name: str | None) -> str:
    """A part's name, which Werkzeug does not ask for."""
    if not name:
        raise InvalidRequest.of({"body": "has a part without a name in its Content-Disposition"})
    return name


def wants_stream(body: dict[str, Any]) -> bool:
    """Whether the answer is to be a stream: as the body says, or else as the Accept header does."""
    if body["stream"] is not None:
        return bool(body["stream"])
    if EVENT_STREAM not in request.headers.get("Accept", ""):
        return False
    return request.accept_mimetypes.best_match([JSON, EVENT_STREAM]) == EVENT_STREAM


def wanted_format(spec: ModelSpec, options: Any) -> str | None:
    """The ``format`` of an output that is to be sent as bare bytes; None for the usual JSON.

    Raises ``NotAcceptable`` where the Accept header leaves out all that there is.
    """
    if "Accept" not in request.headers:
        return None
    accepted = request.accept_mimetypes
    formats = TASKS[spec.type].formats
    best = accepted.best_match([JSON, *formats.values()]) if accepted else JSON
    if best is None:
        offered = ", ".join([JSON, *formats.values()])
        raise NotAcceptable(f"The answer is {offered}, which the Accept header leaves out.")
    if best == JSON:
        return None
    given = options.get("format") if type(options) is dict else None
    if given is not None:
        if type(given) is str and given in formats and not accepted.quality(formats[given]):
            raise NotAcceptable(
                f"options.format is {given}, and the Accept header leaves out {formats[given]}."
            )
        return str(given)
    own = spec.options_schema.fields["format"].load_default
    # The model's own first: of formats that are as welcome, the first is taken.
    names = {formats[name]: name for name in sorted(formats, key=lambda name: name != own)}
    return names[accepted.best_match(names) or best]


def bare(output: Media, metadata: dict[str, Any]) -> Response:
    """An output as it is, with its receipt in a header."""
    response = Response(output.data, mimetype=output.mime_type)
    name = f"{metadata['model_id']}.{metadata['options']['format']}"
    response.headers["Content-Disposition"] = f'inline; filename="{name}"'
    response.headers["X-Crane-Metadata"] = header_of(metadata)
    return response


def header_of(metadata: dict[str, Any]) -> str:
    """A receipt as one ASCII line; long texts in it are cut, for a header has a few kilobytes."""
    options = dict(metadata["options"])
    for name, value in options.items():
        if isinstance(value, str) and len(value) > HEADER_TEXT:
            options[name] = f"{value[:HEADER_TEXT]}…"
    return json.dumps({**metadata, "options": options}, separators=(",", ":"))
