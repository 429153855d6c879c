"""The hooks that know who calls and hold callers to their quota, and GET /crane/quota."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from flask import Blueprint, Flask, Request, Response, g, request

from backend.charges import Charge
from backend.http import add_headers, crane
from backend.meter import units
from backend.models import Crane
from backend.pacing import SERVER_S, Pacing
from backend.quota.tiers import UNIT
from backend.registry import ModelSpec
from backend.server.sockets import ClientSocket
from backend.visibility import find_model

bp = Blueprint("quota", __name__, url_prefix="/crane")

# Finds the model of a request, once its body names it.
Find = Callable[[str], ModelSpec]
# Reads a request that is metered: ``{"model_id", "input", "options"}``, of a model that was found.
Reader = Callable[[Find], dict[str, Any]]

# What callers may ask without a key, a load balancer having none; each says itself what to whom.
UNPAID = {401, 403, 429, 503}  # statuses of calls that were refused before they cost anything
OPEN = {"ops.livez", "ops.readyz", "ops.metrics"}


def install(app: Flask, readers: Mapping[str, Reader]) -> None:
    """Put the hooks on an app; ``readers`` has that of each endpoint which is metered."""
    app.before_request(partial(hold, readers))
    app.after_request(partial(pace, Pacing(), frozenset(readers)))
    app.after_request(settle)
    app.teardown_request(end)


def hold(readers: Mapping[str, Reader]) -> None:
    """Find the caller, and spend a unit of its quota before a byte of the body is read.

    So what is malformed, too large or refused costs a unit, and bodies are read by no more threads
    than the caller may have calls at once. What a call may cost beside that is reserved once its
    inputs are known: see ``Charge``.
    """
    # Each use of Flask's `request` and `g` finds their context anew: one does.
    asking: Request = request._get_current_object()  # type: ignore[attr-defined]
    known: Any = g._get_current_object()
    endpoint = asking.endpoint
    if endpoint is None or endpoint in OPEN or asking.method == "OPTIONS":
        return
    parts = crane()
    caller = known.caller = parts.callers.identify(asking.environ)
    if caller.key_id is not None:
        known.log["key_id"] = caller.key_id
    if endpoint not in readers:
        return
    metered = parts.config.quota == "on"
    parts.permits.take(caller.subject, caller.tier.concurrency if metered else parts.permits.count)
    known.has_permit = True
    known.charge = None

    def find(model_id: str) -> ModelSpec:
        known.log["model_id"] = model_id[:100]
        spec = known.spec = find_model(caller, parts.registry, model_id)
        return spec

    # Of another server's body it is not known whether it has come.
    missing = getattr(asking.environ["wsgi.input"], "missing", 0)
    with parts.permits.body_of(caller.subject) if missing else nullcontext():
        if metered:
            lease = parts.meter.let_in(caller.subject, caller.tier, UNIT)
            known.charge = Charge(parts.meter, lease)
        size = _most_bytes(asking, parts.config.max_body)
        known.held_bytes = parts.bodies.take(caller.subject, size)
        known.body = readers[endpoint](find)
    if asking.content_length is None:  # it came in chunks, and how many is known by now
        surplus = max(0, known.held_bytes - known.get("body_bytes", known.held_bytes))
        parts.bodies.release(caller.subject, surplus)
        known.held_bytes -= surplus


def _most_bytes(asking: Request, max_body: int) -> int:
    length = asking.content_length
    return max_body if length is None else min(length, max_body)


def pace(pacing: Pacing, metered: Collection[str], response: Response) -> Response:
    """Send later what costs no quota, to a caller that asks for more of it than anybody reads."""
    asking: Request = request._get_current_object()  # type: ignore[attr-defined]
    if asking.endpoint in metered and response.status_code not in UNPAID:
        return response
    sock = asking.environ.get("gunicorn.socket")
    if asking.endpoint == "ops.livez" or not isinstance(sock, ClientSocket):
        return response
    known: Any = g._get_current_object()
    caller = known.get("caller")
    whose = caller.subject if caller else f"address:{asking.remote_addr}"
    if delay_s := pacing.delay(whose, time.thread_time() - known.cpu_s + SERVER_S):
        sock.keep_for(delay_s)
    return response


def end(error: BaseException | None) -> None:
    """Release the permit of a call that is answered; a stream has its own until its end."""
    known: Any = g._get_current_object()
    if not known.get("streams"):
        release_permit(crane(), known)


def release_permit(parts: Crane, known: Any) -> None:
    if known.pop("has_permit", False):
        parts.permits.release(known.caller.subject)
        parts.bodies.release(known.caller.subject, known.get("held_bytes", 0))


def settle(response: Response) -> Response:
    """Have a call cost what it does, and say what is left: now, or when its stream has ended."""
    known: Any = g._get_current_object()
    charge: Charge | None = known.get("charge")
    if charge is None:
        return response
    if known.get("streams"):
        response.call_on_close(charge.settle)
    else:
        charge.settle()
    add_headers(charge.headers())
    return response


@bp.get("/quota")
def quota() -> dict[str, Any]:
    """The caller's tier and models, its limits, and what is left of them."""
    caller = g.caller
    answer: dict[str, Any] = {
        "tier": caller.tier.name,
        "key_id": caller.key_id,
        "models": None if caller.models is None else sorted(caller.models),
        "metered": crane().config.quota == "on",
    }
    standing = crane().meter.look(caller.subject, caller.tier) if answer["metered"] else None
    if standing is None:
        return answer
    limits = [
        {
            "name": limit.name,
            "units": limit.units,
            "window_s": limit.window_s,
            "left": units(left),
            "reset_s": round(reset_ms / 1000, 3),
        }
        for limit, left, reset_ms in zip(
            caller.tier.limits, standing.left, standing.reset_ms, strict=True
        )
    ]
    concurrency = {"limit": caller.tier.concurrency, "running": standing.running}
    return {**answer, "limits": limits, "concurrency": concurrency}
