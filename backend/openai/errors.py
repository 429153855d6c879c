"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from backend.errors import MORE, CraneError, InvalidRequest, ModelNotFound, PayloadTooLarge

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Paths in our details that are no field of a body.
_NO_FIELD = ("body", "request", MORE)


def error_of(error: CraneError) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}`` with our own code.

    ``param`` is the first field at fault. As there is no place for details, the message has them
    all.
    """
    message, param = error.message, None
    if isinstance(error, ModelNotFound):
        param = "model"
    elif names_fields(error):
        message = type(error).of(error.details, most=len(error.details)).message
        param = next((path for path in error.details if path not in _NO_FIELD), None)
    type_ = _TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": type_, "param": param, "code": error.code}}


def names_fields(error: CraneError) -> bool:
    """Whether an error's details are faults by the path of the field that they are in."""
    return bool(error.details) and isinstance(error, InvalidRequest | PayloadTooLarge)
