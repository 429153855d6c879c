"""/livez, /readyz and /health: what a load balancer and an operator ask."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from flask import Blueprint, Response

from backend import metrics
from backend.errors import ModelUnavailable
from backend.http import crane

bp = Blueprint("ops", __name__)

_STARTED = time.monotonic()


@bp.get("/livez")
def livez() -> dict[str, str]:
    """Whether this process answers at all; asks nothing of the engine."""
    return {"status": "alive"}


@bp.get("/readyz")
@bp.get("/health")
def readyz() -> tuple[dict[str, Any], int]:
    """Whether a call would be taken, why not, and the service's condition."""
    condition: dict[str, Any] = {"uptime_s": round(time.monotonic() - _STARTED, 1)}
    reasons = []
    try:
        status = crane().engine.status()
    except ModelUnavailable as error:
        reasons.append(error.message)
    else:
        models = status["models"]
        reasons += [
            f"{model_id} stopped working. {model['error']}"
            for model_id, model in models.items()
            if model["state"] == "defunct"
        ]
        reasons += [
            f"{spec.id} is pinned and not loaded yet."
            for spec in crane().registry
            if spec.pinned and models.get(spec.id, {}).get("state") != "ready"
        ]
        condition["engines"] = status["engines"]
        condition["models"] = {
            "unloaded": sum(1 for spec in crane().registry if spec.id not in models),
            **Counter(model["state"] for model in models.values()),
        }
    if crane().config.quota == "on":
        condition["quota"] = crane().meter.status()
    ready = "not ready" if reasons else "ready"
    return {"status": ready, "reasons": reasons, **condition}, 503 if reasons else 200


@bp.get("/metrics", endpoint="metrics")
def metrics_page() -> Response:
    return Response(metrics.dump(), content_type=metrics.CONTENT_TYPE)
