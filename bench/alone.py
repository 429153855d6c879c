"""Crane without the hop: the same app and route, answered in the HTTP worker's own thread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from backend import create_app
from backend.engine.calls import Answer, Call
from backend.engine.client import EngineClient, Stream


class AnswersItself(EngineClient):
    def stream(self, call: Call, caller_socket: Any = None) -> Stream:
        yield Answer(
            outputs=call.inputs,
            usage=[{}] * len(call.inputs),
            facts=[{}] * len(call.inputs),
            applied=[{}] * len(call.inputs),
            revision=None,
            device="cpu",
            dtype="none",
            batch_size=1,
            timings_ms={"queue": 0.0, "load": 0.0, "inference": 0.0},
        )

    def status(self) -> dict[str, Any]:
        return {"models": {}}

    def control(self, order: str, model_id: str) -> None: ...
    def close(self) -> None: ...


app = create_app()
crane = app.extensions["crane"]
app.extensions["crane"] = replace(crane, engine=AnswersItself(crane.config))
