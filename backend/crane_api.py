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
from backend.visibility import find_model, visible_models, visible_weights, without_hidden

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
    return {"models": [shown(spec, states) for spec in visible_models(g.caller, crane().registry)]}


@bp.get("/models/<model_id>")
def model(model_id: str) -> dict[str, Any]:
    return shown(find_model(g.caller, crane().registry, model_id), model_states())


@bp.post("/models/<model_id>/load")
def load(model_id: str) -> dict[str, Any]:
    """Load a model, as its next call would; an admin's."""
    spec = administered(model_id)
    crane().engine.load(spec.id)
    return shown(spec, model_states())


@bp.post("/models/<model_id>/unload")
def unload(model_id: str) -> tuple[dict[str, Any], int]:
    """Unload a model when its calls are done; 202 while they are not."""
    spec = administered(model_id)
    gone = crane().engine.unload(spec.id)
    return shown(spec, model_states()), 200 if gone else 202


def administered(model_id: str) -> ModelSpec:
    g.caller.check_admin()
    spec = find_model(g.caller, crane().registry, model_id)
    g.log["model_id"] = spec.id
    return spec


def model_states() -> dict[str, Any]:
    """Each model's state; empty where no engine answers, so that the list itself still does."""
    try:
        states: dict[str, Any] = crane().engine.status()["models"]
    except ModelUnavailable:
        return {}
    return states


def shown(spec: ModelSpec, states: dict[str, Any]) -> dict[str, Any]:
    """A model as this request's caller may see it."""
    status = without_hidden(g.caller, crane().registry, states.get(spec.id, {}))
    return {**describe(spec, status), "hf_model": visible_weights(g.caller, spec.hf_model)}


def describe(spec: ModelSpec, status: dict[str, Any]) -> dict[str, Any]:
    """A model as an operator sees it: what to send it, what comes back, and where it stands."""
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
