"""The hooks that know who calls and hold callers to their quota, and GET /crane/quota."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flask import Blueprint, Flask, Request, Response, g, request

from backend.errors import ClientClosedRequest
from backend.http import add_headers, crane
from backend.meter import Lease, Meter, quota_headers, units
from backend.models import Crane
from backend.quota.decisions import Decision
from backend.registry import ModelSpec
from backend.visibility import find_model

bp = Blueprint("quota", __name__, url_prefix="/crane")

# Finds the model of a request, once its body names it.
Find = Callable[[str], ModelSpec]
# Reads a request that is metered: ``{"model_id", "input", "options"}``, of a model that was found.
Reader = Callable[[Find], dict[str, Any]]

# What callers may ask without a key, a load balancer having none; each says itself what to whom.
OPEN = {"ops.livez", "ops.readyz", "ops.metrics"}


def install(app: Flask, readers: Mapping[str, Reader]) -> None:
    """Put the hooks on an app; ``readers`` has that of each endpoint which is metered."""
    app.before_request(partial(hold, readers))
    app.after_request(settle)
    app.teardown_request(end)


def hold(readers: Mapping[str, Reader]) -> None:
    """Find the caller, and spend of its quota what the call may cost; a refusal costs nothing.

    The cost is the model's, so the body is read before: what is malformed, or asks for a model that
    is not there or not allowed, is told so and never metered.
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

    def find(model_id: str) -> ModelSpec:
        known.log["model_id"] = model_id[:100]
        spec = known.spec = find_model(caller, parts.registry, model_id)
        return spec

    parts.take_permit()
    known.has_permit = True
    body = known.body = readers[endpoint](find)
    spec = known.spec
    if parts.config.quota == "on":
        count = len(body["input"]) if type(body["input"]) is list else 1
        count *= body.get("repeat", 1)
        cost = spec.cost.reserve(asked(spec, body["options"]), count)
        known.lease = parts.meter.let_in(caller.subject, caller.tier, cost)


def end(error: BaseException | None) -> None:
    """Release the permit of a call that is answered; a stream has its own until its end."""
    known: Any = g._get_current_object()
    if not known.get("streams"):
        release_permit(crane(), known)


def release_permit(parts: Crane, known: Any) -> None:
    if known.pop("has_permit", False):
        parts.release_permit()


def asked(spec: ModelSpec, options: Any) -> dict[str, Any]:
    """The options that tell what a call may cost, as sent or else as the model has them.

    They are not checked yet. Where one is wrong the call will be refused, and cost nothing.
    """
    sent = options if type(options) is dict else {}
    found = {}
    for name in ("num_images", "max_tokens", "duration"):
        field = spec.options_schema.fields.get(name)
        if field is not None:
            value = sent.get(name, field.load_default)
            found[name] = value if type(value) in (int, float) and 0 <= value <= 1e9 else None
    return found


def settle(response: Response) -> Response:
    """Have an answer cost what it does, and say what is left."""
    known: Any = g._get_current_object()
    lease: Lease | None = known.get("lease")
    if lease is None:
        return response
    standing: Decision | None = lease.standing
    if known.get("streams"):
        add_headers(quota_headers(lease.call.tier, lease.standing))
        return response  # ``settle_stream`` will, at its end
    known.lease = None
    cost = _cost(known, lease, response.status_code)
    meter = crane().meter
    if cost == lease.call.cost and lease.has_room:
        # The answer need not wait for it: the caller cannot miss that place until its next call.
        response.call_on_close(lambda: meter.end(lease))
    else:
        standing = meter.settle(lease, cost)
    if standing is not None:
        add_headers(quota_headers(lease.call.tier, standing))
    return response


def settle_stream(meter: Meter, known: Any, status: int) -> None:
    """Have an answer that was streamed cost what it does; at its end it would have ``status``."""
    lease: Lease | None = known.get("lease")
    if lease is not None:
        meter.settle(lease, _cost(known, lease, status))


def _cost(known: Any, lease: Lease, status: int) -> int:
    """An answer costs what it used, and a call that failed nothing.

    A call whose caller has left costs what was held for it, whether or not a model had begun: that
    only the engine knows, and to leave must not be a way to use it for nothing.
    """
    if status == ClientClosedRequest.status:
        return lease.call.cost
    cost: int = known.spec.cost.settle(known.usage) if status < 400 else 0
    return cost


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
