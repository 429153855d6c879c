"""Every error a caller may see: its HTTP status, its code, and nothing of our internals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from http import HTTPStatus
from itertools import islice
from typing import Any, ClassVar, Self

MAX_FAULTS = 20  # of one call that are named; whoever mends them learns of the others
LONGEST_ECHO = 80  # characters of a key or a value that an error repeats
MORE = "…"  # the key in an error's details that counts the others


class CraneError(Exception):
    """An expected failure that knows its HTTP answer.

    The message is for the caller: what happened, what was expected, what to do. ``details`` is
    JSON that names each fault; ``retry_after_s`` becomes the ``Retry-After`` header, and
    ``headers`` are sent besides. ``usage`` is of those inputs of a call that were run though it
    failed; None where nothing of it had begun to run.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    usage: Mapping[str, float] | None = None

    def __init__(
        self,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, faults: Mapping[str, str], *, most: int = 3) -> Self:
        """Name the faults of a request, keyed by the path of the field each is in.

        The details have ``MAX_FAULTS`` of them, and under ``MORE`` how many others there are; the
        message tells ``most`` of those.
        """
        named = dict(faults)
        counted = re.match(r"(\d+) more", named.get(MORE, ""))  # by an error that this one renames
        if counted:
            del named[MORE]
        hidden = max(0, len(named) - MAX_FAULTS) + (int(counted[1]) if counted else 0)
        details = {
            clipped(path, 300): clipped(fault, 1000)
            for path, fault in islice(named.items(), MAX_FAULTS)
        }
        shown = "; ".join(f"{path} {fault}" for path, fault in islice(details.items(), most))
        left = max(0, len(details) - most) + hidden
        see = ", see details" if len(details) > most else ""
        more = f" (and {left} more{see})" if left else ""
        end = "" if f"{shown}{more}".endswith("?") else "."
        if hidden:
            details[MORE] = f"{hidden} more"
        return cls(f"The request is not valid: {shown}{more}{end}", details=details)


class InvalidRequest(CraneError):
    status = HTTPStatus.BAD_REQUEST
    code = "VALIDATION_ERROR"


class InvalidApiKey(CraneError):
    status = HTTPStatus.UNAUTHORIZED
    code = "INVALID_API_KEY"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(CraneError):
    status = HTTPStatus.FORBIDDEN
    code = "FORBIDDEN"


class ModelNotFound(CraneError):
    status = HTTPStatus.NOT_FOUND
    code = "MODEL_NOT_FOUND"


class RouteNotFound(CraneError):
    status = HTTPStatus.NOT_FOUND
    code = "NOT_FOUND"


class MethodNotAllowed(CraneError):
    status = HTTPStatus.METHOD_NOT_ALLOWED
    code = "METHOD_NOT_ALLOWED"


class NotAcceptable(CraneError):
    status = HTTPStatus.NOT_ACCEPTABLE
    code = "NOT_ACCEPTABLE"


class RequestTimeout(CraneError):
    status = HTTPStatus.REQUEST_TIMEOUT
    code = "REQUEST_TIMEOUT"


class PayloadTooLarge(CraneError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "PAYLOAD_TOO_LARGE"


def body_too_large(max_body: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {max_body} bytes, the most allowed.")


class UnsupportedMediaType(CraneError):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "UNSUPPORTED_MEDIA_TYPE"


class HeadersTooLarge(CraneError):
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "HEADERS_TOO_LARGE"


class RateLimitExceeded(CraneError):
    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "RATE_LIMIT_EXCEEDED"


class ConcurrencyLimitExceeded(CraneError):
    status = HTTPStatus.TOO_MANY_REQUESTS
    code = "CONCURRENCY_LIMIT_EXCEEDED"


class ClientClosedRequest(CraneError):
    status = 499  # nginx's own, for log lines: there is none in HTTP
    code = "CLIENT_CLOSED_REQUEST"


class QuotaUnavailable(CraneError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "QUOTA_UNAVAILABLE"


class ModelLoading(CraneError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "MODEL_LOADING"


class ModelUnavailable(CraneError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "MODEL_UNAVAILABLE"


class OutOfMemory(CraneError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "OUT_OF_MEMORY"


class Overloaded(CraneError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "OVERLOADED"


class KeysUnavailable(CraneError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "KEYS_UNAVAILABLE"


class DeadlineExceeded(CraneError):
    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "TIMEOUT_ERROR"


class InternalError(CraneError):
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "INTERNAL_ERROR"

    def __init__(
        self,
        message: str = "Something went wrong on our side. The log has it under this request id.",
        *,
        details: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, details=details, retry_after_s=retry_after_s)


ERRORS: dict[str, type[CraneError]] = {
    error.code: error
    for error in (
        InvalidRequest,
        InvalidApiKey,
        Forbidden,
        ModelNotFound,
        RouteNotFound,
        MethodNotAllowed,
        NotAcceptable,
        RequestTimeout,
        PayloadTooLarge,
        UnsupportedMediaType,
        HeadersTooLarge,
        RateLimitExceeded,
        ConcurrencyLimitExceeded,
        ClientClosedRequest,
        QuotaUnavailable,
        ModelLoading,
        ModelUnavailable,
        OutOfMemory,
        Overloaded,
        KeysUnavailable,
        DeadlineExceeded,
        InternalError,
    )
}


def error_body(error: CraneError, request_id: str) -> dict[str, Any]:
    """What every error looks like to callers."""
    told = {"code": error.code, "message": error.message, "details": error.details}
    return {"error": told, "request_id": request_id}


def did_you_mean(name: object, known: list[str], *, what: str = "it is one of") -> str:
    """Say the nearest known name, or all of them: ``did you mean 'max_tokens'?``"""
    # Names are compared in a time that grows with their lengths.
    if near := get_close_matches(clipped(str(name), LONGEST_ECHO), known, n=1):
        return f"did you mean {near[0]!r}?"
    return f"{what}: {', '.join(sorted(known)) or 'none'}"


def clipped(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def echoed(value: object) -> str:
    """A caller's value as an error repeats it."""
    return repr(clipped(value, LONGEST_ECHO) if isinstance(value, str) else value)
