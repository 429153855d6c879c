"""Refusals of what never becomes a request of the app, in the app's own shape."""

from __future__ import annotations

import logging
import secrets
from typing import Any

import orjson
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException

from backend import metrics
from backend.errors import CraneError, HeadersTooLarge, InternalError, InvalidRequest, error_body
from backend.headers import SECURITY_HEADERS

logger = logging.getLogger("crane.http")


def error_of(error: Exception) -> CraneError:
    """The error that a client gets: an unforeseen one is ours, and goes to the log."""
    if isinstance(error, CraneError):
        return error
    if isinstance(error, LimitRequestLine | LimitRequestHeaders):
        return HeadersTooLarge(f"The request's head is too large: {error}.")
    if isinstance(error, ParseException):
        return InvalidRequest.of({"request": f"is not HTTP/1.1: {str(error)[:200]}"})
    logger.error("a request could not be read", exc_info=error)
    return InternalError()


def refusal(error: CraneError, path: Any = None) -> bytes:
    """A whole response that closes its connection; logged and counted as any other."""
    from backend.openai.errors import error_of as of_openai

    request_id = secrets.token_hex(16)
    openai = isinstance(path, str) and path.startswith("/v1/")
    body = orjson.dumps(of_openai(error) if openai else error_body(error, request_id))
    status = error.status
    fields = {"request_id": request_id, "route": None, "status": int(status), "error": error.code}
    logger.info("request", extra={"fields": fields})
    metrics.REQUESTS.labels("none", int(status)).inc()
    head = [
        f"HTTP/1.1 {int(status)} {status.phrase if hasattr(status, 'phrase') else 'Error'}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"X-Request-ID: {request_id}",
        *(f"{name}: {value}" for name, value in [*error.headers.items(), *SECURITY_HEADERS]),
    ]
    if error.retry_after_s is not None:
        head.append(f"Retry-After: {max(1, round(error.retry_after_s))}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body
