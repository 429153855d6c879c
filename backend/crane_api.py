"""POST /crane/run and GET /crane/models: the controller."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, g

from backend.answers import answered, streamed
from backend.bodies import bare, request_body, wanted_format, wants_stream
from backend.engine.status import nowhere
from backend.errors import ModelUnavailable
from backend.http import crane
from backend.quota_api import Find
from backend.registry import ModelSpec
from backend.schemas import RunRequest
from backend.schemas import load as load_body
from backend.tasks import TASKS

bp = Blueprint("crane", __name__, url_prefix="/crane")


_RUN_REQUEST = RunRequest()


def read(find: Find) -> dict[str, Any]:
    body: dict[str, Any] = load_body(_RUN_REQUEST, request_body())
    find(body["model_id"])
    return body


@bp.post("/run")
def run() -> Response | dict[str, Any]:
    body, spec = g.body, g.spec  # which the hook has read, and found
    if wants_stream(body):
        return streamed()
    format_ = wanted_format(spec, body["options"])
    if format_ is not None and type(body["options"]) is dict:
        body["options"] = {**body["options"], "format": format_}
    output, metadata = answered(one_output=format_ is not None)
    if format_ is not None:
        return bare(output, metadata)
    return {"output": output, "metadata": metadata}


@bp.get("/models")
def models() -> dict[str, Any]:
    states = model_states()
    allowed = [spec for spec in crane().registry if g.caller.may_use(spec.id)]
    return {"models": [describe(spec, states.get(spec.id, {})) for spec in allowed]}


@bp.get("/models/<model_id>")
def model(model_id: str) -> dict[str, Any]:
    spec = crane().registry.get(model_id)
    g.caller.check_may_use(spec.id)
    return describe(spec, model_states().get(spec.id, {}))


@bp.post("/models/<model_id>/load")
def load(model_id: str) -> dict[str, Any]:
    """Load a model, as its next call would; an admin's."""
    spec = administered(model_id)
    crane().engine.load(spec.id)
    return describe(spec, model_states().get(spec.id, {}))


@bp.post("/models/<model_id>/unload")
def unload(model_id: str) -> tuple[dict[str, Any], int]:
    """Unload a model when its calls are done; 202 while they are not."""
    spec = administered(model_id)
    gone = crane().engine.unload(spec.id)
    return describe(spec, model_states().get(spec.id, {})), 200 if gone else 202


def administered(model_id: str) -> ModelSpec:
    spec = crane().registry.get(model_id)
    g.caller.check_may_use(spec.id)
    g.caller.check_admin()
    g.log["model_id"] = spec.id
    return spec


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
        **(status or nowhere()),
        "options": spec.options_schema.describe(),
        "output": task.output,
        "example": {"model_id": spec.id, "input": input_, "options": options},
    }
