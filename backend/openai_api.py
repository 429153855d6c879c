"""/v1: what OpenAI's clients send, translated for the same ``run_model``."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from flask import Blueprint, Response, g, request
from marshmallow import EXCLUDE

from backend.answers import answered, streamed
from backend.bodies import bare, form_lists, json_body
from backend.errors import CraneError
from backend.http import crane
from backend.media import Media
from backend.openai import ROUTES, Order, Page
from backend.openai.base import Named, order
from backend.openai.streaming import write_error
from backend.quota_api import Find, Reader
from backend.registry import ModelSpec
from backend.schemas import load
from backend.visibility import find_model, visible_models

bp = Blueprint("openai", __name__, url_prefix="/v1")

_NAMED = Named(unknown=EXCLUDE)  # what else there is, the model's route knows
_STARTED = int(time.time())


def read(find: Find) -> dict[str, Any]:
    """A request to one of ``ROUTES`` as the body of ``/crane/run`` that it stands for."""
    route = ROUTES[str(request.url_rule)]
    sent = form_lists() if route.form else json_body()
    named = (
        {name: sent[name] for name in ("model",) if name in sent} if type(sent) is dict else sent
    )
    spec = find(load(_NAMED, named)["model"])
    found = g.order = order(route, spec, sent, ROUTES.values())
    return {
        "model_id": spec.id,
        "input": found.input,
        "options": found.options,
        "repeat": found.repeat,
    }


def run() -> Response | dict[str, Any]:
    asked: Order = g.order
    try:
        if asked.streams and asked.route.chunks:
            return streamed(partial(asked.route.chunks, asked), partial(write_error, asked))
        output, metadata = answered()
    except CraneError as error:
        raise asked.renamed(error) from error
    answer: Media | Page | dict[str, Any] = asked.route.answer(asked, output, metadata)
    if isinstance(answer, Media):
        return bare(answer, metadata)
    if isinstance(answer, Page):
        return Response(answer.text, mimetype=answer.mime_type)
    return answer


READERS: dict[str, Reader] = {f"{bp.name}.{route.name}": read for route in ROUTES.values()}
for _route in ROUTES.values():
    bp.add_url_rule(_route.path.removeprefix("/v1"), _route.name, run, methods=["POST"])


@bp.get("/models")
def models() -> dict[str, Any]:
    allowed = visible_models(g.caller, crane().registry)
    return {"object": "list", "data": [_model(spec) for spec in allowed]}


@bp.get("/models/<path:model_id>")
def model(model_id: str) -> dict[str, Any]:
    return _model(find_model(g.caller, crane().registry, model_id))


def _model(spec: ModelSpec) -> dict[str, Any]:
    return {"id": spec.id, "object": "model", "created": _STARTED, "owned_by": "crane"}
