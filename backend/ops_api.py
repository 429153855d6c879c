"""/livez, /readyz and /health: what a load balancer and an operator ask."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from flask import Blueprint, Response, request

from backend import metrics
from backend.callers import Caller
from backend.engine.status import nowhere
from backend.errors import CraneError, ModelUnavailable
from backend.http import crane
from backend.visibility import without_hidden

bp = Blueprint("ops", __name__)

_STARTED = time.monotonic()


@bp.get("/livez")
def livez() -> dict[str, str]:
    """Whether this process answers at all; asks nothing of the engine."""
    return {"status": "alive"}


@bp.get("/readyz")
@bp.get("/health")
def readyz() -> tuple[dict[str, Any], int]:
    """Whether a call would be taken, why not, and the service's condition.

    Names of models are for those who may use them.
    """
    condition: dict[str, Any] = {"uptime_s": round(time.monotonic() - _STARTED, 1)}
    reasons = []
    caller = watcher()
    try:
        status = crane().engine.status()
    except ModelUnavailable as error:
        reasons.append(error.message)
    else:
        models = status["models"]
        reasons += [
            _about(caller, model_id, "stopped working.", f" {model['error']}")
            for model_id, model in models.items()
            if model["state"] == "defunct"
        ]
        reasons += [
            _about(caller, spec.id, "is pinned and not loaded yet.")
            for spec in crane().registry
            if spec.pinned and models.get(spec.id, {}).get("state") != "ready"
        ]
        condition["engines"] = status["engines"]
        condition["models"] = Counter(
            models.get(spec.id, nowhere())["state"] for spec in crane().registry
        )
    if crane().config.quota == "on":
        condition["quota"] = crane().meter.status()
    if crane().meter.refuses_all:
        reasons.append("Quotas are not known now, and CRANE_QUOTA_ON_OUTAGE is deny.")
    reasons = list(dict.fromkeys(reasons))  # without names some are the same
    ready = "not ready" if reasons else "ready"
    return {"status": ready, "reasons": reasons, **condition}, 503 if reasons else 200


def watcher() -> Caller | None:
    """Who asks, if that is known: whoever asks is answered, be its key wrong or missing."""
    try:
        return crane().callers.identify_watcher(request.environ)
    except CraneError:
        return None


def _about(caller: Caller | None, model_id: str, what: str, more: str = "") -> str:
    """A sentence about a model, with its name and with ``more`` for those who may use it."""
    if caller is None or not caller.may_use(model_id):
        return f"A model {what}"
    said: str = without_hidden(caller, crane().registry, f"{model_id} {what}{more}")
    return said


@bp.get("/metrics", endpoint="metrics")
def metrics_page() -> Response:
    """All counters, with models' and tiers' names: for this host, and for admins."""
    caller = crane().callers.identify_watcher(request.environ)
    if not caller.is_keyless:
        caller.check_admin()
    return Response(metrics.dump(), content_type=metrics.CONTENT_TYPE)
