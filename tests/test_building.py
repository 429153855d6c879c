"""A model that is built changes PyTorch's default dtype, and none computes meanwhile."""

from __future__ import annotations

import threading

import pytest

from backend.adapters.base import Prediction
from backend.adapters.echo import Echo
from backend.engine import turns
from tests import checkpoints
from tests.conftest import run
from tests.serving import wait_for


@pytest.mark.parametrize("type_", ["fill-mask", "feature-extraction", "embeddings"])
def test_a_model_is_built_when_none_computes(make_app, add_task, tmp_path, monkeypatch, type_):
    import torch

    begun, gate, changed = threading.Event(), threading.Event(), []

    def change(dtype, library=torch.set_default_dtype):
        changed.append(gate.is_set())
        library(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", change)

    class Computes(Echo):
        takes_turns = True

        def predict(self, batch):
            begun.set()
            gate.wait(30)
            return [Prediction(value) for value in batch.inputs]

    folder = tmp_path / "bert"
    folder.mkdir()
    checkpoints.masked_lm(folder)
    half = {"id": "half", "type": type_, "hf_model": str(folder), "dtype": "bfloat16"}
    client = make_app([add_task("computes", Computes), half]).test_client()
    answers = {}
    calls = [
        threading.Thread(target=lambda: answers.update(computes=run(client, "computes"))),
        threading.Thread(target=lambda: answers.update(half=run(client, "half", "a [MASK]"))),
    ]

    def waits():
        found = [one for one in threading.enumerate() if one.name == "model half"]
        return any(map(turns.is_waiting, found))

    calls[0].start()
    assert begun.wait(30)
    calls[1].start()
    try:
        wait_for(waits, 30, every_s=0.001)
    finally:
        gate.set()
        for call in calls:
            call.join(60)
    assert changed
    assert all(changed)
    assert [answers[name].status_code for name in ("computes", "half")] == [200, 200]
