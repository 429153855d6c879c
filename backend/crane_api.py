"""POST /crane/run and GET /crane/models: the controller."""

from __future__ import annotations

from typing import Any

import orjson
from flask import Blueprint, current_app, g, request

from backend.engine.calls import ModelStatus
from backend.errors import InvalidRequest, ModelUnavailable, NotAcceptable, UnsupportedMediaType
from backend.models import Crane, run_model
from backend.registry import ModelSpec
from backend.schemas import RunRequest, load
from backend.tasks import TASKS

bp = Blueprint("crane", __name__, url_prefix="/crane")

_RUN_REQUEST = RunRequest()


@bp.post("/run")
def run() -> dict[str, Any]:
    body = load(_RUN_REQUEST, json_body())
    refuse_unless_json_accepted()
    g.log["model_id"] = body["model_id"][:100]
    with crane().admission():
        output, metadata = run_model(
            crane(), body["model_id"], body["input"], body["options"], request_id=g.request_id
        )
    g.log |= {"timings_ms": metadata["timings_ms"], "batch_size": metadata["batch_size"]}
    return {"output": output, "metadata": metadata}


@bp.get("/models")
def models() -> dict[str, Any]:
    states = model_states()
    return {"models": [describe(spec, states.get(spec.id, {})) for spec in crane().registry]}


@bp.get("/models/<model_id>")
def model(model_id: str) -> dict[str, Any]:
    spec = crane().registry.get(model_id)
    return describe(spec, model_states().get(spec.id, {}))


def crane() -> Crane:
    parts: Crane = current_app.extensions["crane"]
    return parts


def json_body() -> Any:
    """The request's JSON; raises ``UnsupportedMediaType`` or ``InvalidRequest``."""
    if not request.is_json:
        sent = request.mimetype[:100] or "none"
        raise UnsupportedMediaType(
            f"Send the body as Content-Type: application/json; this one's is {sent}."
        )
    try:
        # Strict: no NaN, no bad UTF-8, no lone surrogates, no endless nesting.
        return orjson.loads(request.get_data())
    except orjson.JSONDecodeError as error:
        raise InvalidRequest.of({"body": f"is not valid JSON: {error}"}) from None


def refuse_unless_json_accepted() -> None:
    accepted = request.accept_mimetypes
    if accepted and not accepted.quality("application/json"):
        raise NotAcceptable("The answer is application/json, which the Accept header leaves out.")


def model_states() -> dict[str, Any]:
    """Each model's state; empty where no engine answers, so that the list itself still does."""
    try:
        states: dict[str, Any] = crane().engine.status()["models"]
    except ModelUnavailable:
        return {}
    return states


def describe(spec: ModelSpec, status: dict[str, Any]) -> dict[str, Any]:
    """A model as callers see it: what to send it, what comes back, and where it stands."""
    task = TASKS[spec.type]
    input_, options = task.example
    return {
        "id": spec.id,
        "task": spec.type,
        "hf_model": spec.hf_model,
        **(status or ModelStatus().to_wire()),
        "options": spec.options_schema.describe(),
        "output": task.output,
        "example": {"model_id": spec.id, "input": input_, "options": options},
    }
