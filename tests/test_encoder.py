"""Files are made of outputs inside the engine, beside its models, and only while somebody waits."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from backend.adapters import ADAPTERS
from backend.adapters.base import Adapter, Prediction
from backend.engine import encoder
from backend.engine.calls import Call
from backend.errors import DeadlineExceeded
from backend.media import Media
from backend.tasks import TASKS
from tests.conftest import run

FRAMES = np.zeros((3, 16, 16, 3), np.uint8)
RAW = {
    "text-to-image": ([FRAMES[0]], {"format": "png"}),
    "text-to-video": ({"frames": FRAMES, "fps": 8}, {"format": "mp4"}),
    "text-to-audio": ({"samples": np.zeros(8000, np.float32), "rate": 8000}, {"format": "wav"}),
    "depth-estimation": (FRAMES[0], {"format": "png"}),
    "image-segmentation": (
        {"segments": [{"id": 1, "label": "x", "score": 1}], "map": np.ones((8, 8), np.uint8)},
        {},
    ),
    "mask-generation": ({"masks": [FRAMES[0, :, :, 0]]}, {}),
}


class Stub(Adapter):
    loads_alone, libraries = False, ()
    output: object = None

    def load(self):
        self.device, self.dtype = "cpu", "none"

    def predict(self, batch):
        return [Prediction(self.output) for _ in batch.inputs]


def call(model_id, options, request_id="r"):
    return Call(
        request_id=request_id,
        model_id=model_id,
        inputs=[1],
        options=options,
        seeds=None,
        timeout_s=30,
    )


def kinds(value):
    """The types that a value has in it."""
    if isinstance(value, dict | list):
        return {
            kind
            for one in (value.values() if isinstance(value, dict) else value)
            for kind in kinds(one)
        }
    return {type(value)}


@pytest.mark.parametrize("name", RAW)
def test_what_leaves_the_engine_is_files_and_not_what_they_are_made_of(make_app, monkeypatch, name):
    output, options = RAW[name]
    task = replace(TASKS["echo"], name="raw", dump=TASKS[name].dump)
    monkeypatch.setitem(TASKS, "raw", task)
    monkeypatch.setitem(ADAPTERS, "raw", type("Raw", (Stub,), {"output": output}))
    engine = make_app([{"id": "raw", "type": "raw"}]).extensions["crane"].engine
    [made] = engine.run(call("raw", options)).outputs
    assert Media in kinds(made)
    assert np.ndarray not in kinds(made)


@pytest.fixture
def gated(make_app, monkeypatch):
    """A client of ``slow``, whose first output is encoded once ``gate`` is open."""

    class Gated:
        begun, gate, over = threading.Event(), threading.Event(), threading.Event()
        threads = []  # that encoded

    def dump(output, options, check):
        Gated.threads.append(threading.current_thread().name)
        if len(Gated.threads) == 1:
            Gated.begun.set()
            Gated.gate.wait(20)
        try:
            check()
        finally:
            Gated.over.set()
        return output

    monkeypatch.setitem(TASKS, "slow", replace(TASKS["echo"], name="slow", dump=dump))
    monkeypatch.setitem(ADAPTERS, "slow", type("Slow", (Stub,), {"output": "made"}))
    app = make_app([{"id": "slow", "type": "slow"}])
    Gated.client, Gated.engine = app.test_client(), app.extensions["crane"].engine
    yield Gated
    Gated.gate.set()


def test_a_model_goes_on_while_its_output_is_encoded(gated):
    answers = []
    first = threading.Thread(target=lambda: answers.append(run(gated.client, "slow")))
    first.start()
    assert gated.begun.wait(20)
    for _ in range(3):
        assert run(gated.client, "slow").json["output"] == "made"
    assert not answers
    gated.gate.set()
    first.join(20)
    assert answers[0].json["output"] == "made"


def test_encoding_ends_when_nobody_waits_for_it(gated):
    told = []
    job = gated.engine._engine.submit(call("slow", {}), told.append)
    assert gated.begun.wait(20)
    job.cancel()
    gated.gate.set()
    assert gated.over.wait(20)
    gated.engine.close()
    assert [type(one) for one in told] == [DeadlineExceeded]


def test_where_too_much_waits_to_be_encoded_the_model_waits_too(gated, monkeypatch):
    monkeypatch.setattr(encoder, "MAX_WAITING", 1)
    first = threading.Thread(target=lambda: run(gated.client, "slow"))
    first.start()
    assert gated.begun.wait(20)
    assert run(gated.client, "slow").json["output"] == "made"
    gated.gate.set()
    first.join(20)
    assert gated.threads == ["encoder_0", "model slow"]


def test_an_output_that_cannot_be_encoded_fails_its_call_alone(make_app, monkeypatch):
    def dump(output, options, check):
        if options["delay_ms"] == 1:
            raise ZeroDivisionError("a secret")
        return output

    monkeypatch.setitem(TASKS, "frail", replace(TASKS["echo"], name="frail", dump=dump))
    monkeypatch.setitem(ADAPTERS, "frail", type("Frail", (Stub,), {"output": "made"}))
    client = make_app([{"id": "frail", "type": "frail"}]).test_client()
    for _ in range(3):
        failed = run(client, "frail", options={"delay_ms": 1})
        assert (failed.status_code, failed.json["error"]["code"]) == (500, "INTERNAL_ERROR")
        assert "secret" not in failed.text
        assert run(client, "frail").json["output"] == "made"
