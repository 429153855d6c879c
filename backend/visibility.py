"""What a caller gets to know of models: a key for some of them learns nothing of the others."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from backend.callers import Caller
from backend.errors import CraneError
from backend.registry import ModelSpec, Registry

HIDDEN = "another model"


def visible_models(caller: Caller, registry: Registry) -> list[ModelSpec]:
    return [spec for spec in registry if caller.may_use(spec.id)]


def find_model(caller: Caller, registry: Registry, model_id: str) -> ModelSpec:
    """The model of a caller's call.

    Raises ``Forbidden`` for what its key does not name, be it there or not, and ``ModelNotFound``.
    """
    caller.check_may_use(model_id)
    return registry.get(model_id, among=caller.models)


def visible_weights(caller: Caller, hf_model: str | None) -> str | None:
    """An entry's ``hf_model``, which may be a private repository or a path on this host.

    A key for some models sees none. A path is for admins, and for those who need no key.
    """
    if hf_model is None or caller.models is not None:
        return None
    is_path = hf_model[0] in "./~"
    return hf_model if caller.admin or caller.is_keyless or not is_path else None


def visible_error(caller: Caller | None, registry: Registry, error: CraneError) -> CraneError:
    """An error without the names of models that the caller may not use.

    Those of an engine name what else it holds or loads. Others are about what the caller sent
    itself, and to change them would tell whether a name in there is a model's.
    """
    if error.status != HTTPStatus.SERVICE_UNAVAILABLE or caller is None or caller.models is None:
        return error
    return type(error)(
        without_hidden(caller, registry, error.message),
        details=without_hidden(caller, registry, error.details),
        retry_after_s=error.retry_after_s,
        headers=error.headers,
    )


def without_hidden(caller: Caller, registry: Registry, value: Any) -> Any:
    """A JSON value with ``HIDDEN`` in place of each model that the caller may not use."""
    hidden = sorted((spec.id for spec in registry if not caller.may_use(spec.id)), key=len)
    if not hidden:
        return value
    names = "|".join(re.escape(name) for name in reversed(hidden))
    pattern = re.compile(rf"(?<![\w.-])(?:{names})(?![\w-]|\.\w)")

    def clean(value: Any) -> Any:
        if type(value) is str:
            return pattern.sub(HIDDEN, value)
        if type(value) is list:
            return [clean(one) for one in value]
        if type(value) is dict:
            return {clean(name): clean(inner) for name, inner in value.items()}
        return value

    return clean(value)
