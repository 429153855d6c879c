"""What several engines say of themselves, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backend.engine.calls import ModelStatus, State

# Of a model's copies the one that says most of how its next call will fare.
_ORDER = [State.READY, State.LOADING, State.WAITING, State.FAILED, State.DEFUNCT, State.UNLOADED]


def together(names: Sequence[str], looks: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """``engines``, each as it is, and ``models``: each as it is on all of them.

    ``names`` are the engines' devices, and ``looks`` what those say that answered, by index. A
    model's ``copies`` are what each engine says that was ever asked for it. Beside them stands what
    its best copy says, with the inputs of all that are queued and running.
    """
    engines = []
    copies: dict[str, list[dict[str, Any]]] = {}
    for index, name in enumerate(names):
        look = looks.get(index)
        if look is None:
            engines.append({"device": name, "error": "It does not answer."})
            continue
        engines.append({key: value for key, value in look.items() if key != "models"})
        for model_id, model in look["models"].items():
            copies.setdefault(model_id, []).append({"engine": index, **model})
    models = {model_id: _as_one(found) for model_id, found in copies.items()}
    return {"engines": engines, "models": models}


def nowhere() -> dict[str, Any]:
    """A model that no engine was ever asked for."""
    return {**ModelStatus().to_wire(), "copies": []}


def _as_one(copies: list[dict[str, Any]]) -> dict[str, Any]:
    best = min(copies, key=lambda copy: _ORDER.index(State(copy["state"])))
    running = [copy["running"] for copy in copies if copy["running"]]
    return {
        **{name: value for name, value in best.items() if name != "engine"},
        "queue": sum(copy["queue"] for copy in copies),
        "running": {**running[0], "inputs": sum(one["inputs"] for one in running)}
        if running
        else None,
        "copies": copies,
    }
