"""What every request and answer have in common: an id, one error shape, headers, a log line."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import orjson
from flask import Flask, Response, current_app, g, jsonify, request
from flask.json.provider import JSONProvider
from werkzeug.exceptions import HTTPException

from backend import metrics
from backend.config import Config
from backend.errors import (
    CraneError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    body_too_large,
    error_body,
)
from backend.headers import SECURITY_HEADERS
from backend.media import Media
from backend.models import Crane
from backend.openai.errors import error_of
from backend.visibility import visible_error

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("crane.http")

_HEADERS = "crane.headers"  # of the environ
_REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


class OrjsonProvider(JSONProvider):
    """orjson for every JSON of the app: it takes numpy arrays as they are."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return to_json(obj).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return orjson.loads(s)

    def response(self, *args: Any, **kwargs: Any) -> Response:
        body = self._prepare_response_obj(args, kwargs)
        return Response(to_json(body), mimetype="application/json")


def to_json(value: Any) -> bytes:
    """JSON without line ends; raises ``TypeError``."""
    # Media is a dataclass, and orjson would take it apart by itself.
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    options |= orjson.OPT_PASSTHROUGH_DATACLASS
    return orjson.dumps(value, default=_dump_media, option=options)


def _dump_media(value: Any) -> Any:
    if isinstance(value, Media):
        return value.to_json()
    raise TypeError(f"{type(value).__name__} is not JSON")


def crane() -> Crane:
    """The parts of the service that this request, or this command, is for."""
    parts: Crane = current_app.extensions["crane"]
    return parts


class Headed:
    """A WSGI app whose every answer has ``SECURITY_HEADERS``, and what ``add_headers`` was told.

    Werkzeug would look at each of them three times on its way.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], error: Any = None) -> Any:
            headers = [*headers, *environ.get(_HEADERS, {}).items(), *SECURITY_HEADERS]
            return start_response(status, headers, error)

        return self._app(environ, start)


def add_headers(headers: dict[str, str]) -> None:
    """Have this request's answer say this, too; the names and values must be sound."""
    request.environ.setdefault(_HEADERS, {}).update(headers)


def install(app: Flask, config: Config) -> None:
    """Put the hooks and error handlers on an app."""
    app.wsgi_app = Headed(app.wsgi_app)  # type: ignore[method-assign]
    app.json = OrjsonProvider(app)
    app.before_request(begin)
    app.after_request(finish)
    app.register_error_handler(CraneError, render)
    app.register_error_handler(HTTPException, lambda error: render(of_http(error, config)))
    app.register_error_handler(Exception, unexpected)
    if config.allowed_origins:
        from flask_cors import CORS

        CORS(
            app,
            origins=list(config.allowed_origins),
            methods=["GET", "POST"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "X-API-Key",
                "X-Request-ID",
                r"X-Stainless-[\w-]+",  # which OpenAI's client for browsers sends about itself
            ],
            expose_headers=[
                "Content-Disposition",
                "RateLimit",
                "RateLimit-Policy",
                "Retry-After",
                "X-Crane-Metadata",
                "X-RateLimit-Limit",
                "X-RateLimit-Remaining",
                "X-RateLimit-Reset",
                "X-Request-ID",
            ],
            max_age=600,
        )


def begin() -> None:
    # Each look through Flask's `g` finds the context anew: one does.
    known: Any = g._get_current_object()
    known.started = time.perf_counter()
    known.cpu_s = time.thread_time()
    known.log = {}
    sent = request.headers.get("X-Request-ID")
    known.request_id = sent if sent and _REQUEST_ID.fullmatch(sent) else secrets.token_hex(16)


def finish(response: Response) -> Response:
    known: Any = g._get_current_object()
    rule, method, status = request.url_rule, request.method, response.status_code
    route, address = rule.rule if rule else None, request.remote_addr
    add_headers({"X-Request-ID": known.request_id})

    def record() -> None:
        fields = {
            "request_id": known.request_id,
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round((time.perf_counter() - known.started) * 1e3, 2),
            **known.log,
        }
        if "key_id" not in known.log:
            fields["address"] = address
        logger.info("request", extra={"fields": fields})
        metrics.REQUESTS.labels(route or "none", status).inc()

    if known.get("streams"):
        response.call_on_close(record)
    else:
        record()
    return response


def render(error: CraneError) -> Response:
    g.log["error"] = error.code
    error = visible_error(g.get("caller"), crane().registry, error)
    openai = request.path.startswith("/v1/")
    response = jsonify(error_of(error) if openai else error_body(error, g.request_id))
    response.status_code = error.status
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    response.headers.update(error.headers)
    return response


def of_http(error: HTTPException, config: Config) -> CraneError:
    """Flask's and Werkzeug's own refusals, in our shape."""
    if error.code == 404:
        return RouteNotFound(f"There is nothing at {request.path[:200]}.")
    if error.code == 405:
        allowed = ", ".join(sorted(set(error.valid_methods or ()) - {"OPTIONS", "HEAD"}))  # type: ignore[attr-defined]
        return MethodNotAllowed(
            f"{request.path[:200]} takes {allowed}, not {request.method[:20]}.",
            headers={"Allow": ", ".join(sorted(error.valid_methods or ()))},  # type: ignore[attr-defined]
        )
    if error.code == 413:
        return body_too_large(config.max_body)
    if error.code is not None and error.code < 500:
        return InvalidRequest.of({"request": f"is malformed: {error.name}"})
    logger.error("unexpected HTTP error", exc_info=error)
    return InternalError()


def unexpected(error: Exception) -> Response:
    return render(internal_error(error, g.request_id))


def internal_error(error: Exception, request_id: str) -> InternalError:
    """A fault of ours: all of it for the log, nothing of it for the caller."""
    logger.error("request failed", exc_info=error, extra={"fields": {"request_id": request_id}})
    return InternalError()
