"""A bug in one model's thread costs that model's callers a pause, and no other model anything."""

from __future__ import annotations

import threading

import pytest

from backend.adapters.echo import Echo
from backend.engine.pool import WorkerPool
from tests.conftest import ECHO, run, together
from tests.serving import wait_for
from tests.test_residency import MB, Sized, events, held_bytes, order, state

__all__ = ["events"]


class Unreadable:
    """An output that nothing can be done with."""

    def __getattr__(self, name):
        raise RuntimeError(name)


class Bug(Sized):
    """Fails once, in the place that ``where`` names; its next load is free of faults."""

    weights, guess = MB, None
    where = ""

    def __init__(self, spec, **about):
        # It is built anew, in the model's thread, when it has unloaded.
        if threading.current_thread().name.startswith("model "):
            self.fail("renew")
        super().__init__(spec, **about)

    def fail(self, where, error=RuntimeError):
        if type(self).where == where:
            type(self).where = ""
            raise error(f"a bug in {where}")

    def predict(self, batch):
        self.fail("exit", SystemExit)
        self.fail("interrupt", KeyboardInterrupt)
        return super().predict(batch)

    def footprint(self):
        self.fail("footprint")
        return MB

    def joins(self, options):
        self.fail("joins")
        return False

    def unload(self):
        self.fail("unload")
        super().unload()


@pytest.fixture
def broken_engines(monkeypatch):
    """What would have ended the engine's process."""
    broken = []
    own = WorkerPool.__init__

    def init(self, adapters, config, devices, on_defunct):
        own(self, adapters, config, devices, lambda: broken.append(1))

    monkeypatch.setattr(WorkerPool, "__init__", init)
    return broken


@pytest.mark.parametrize("where", ["exit", "interrupt", "footprint", "joins", "unload", "renew"])
def test_a_bug_costs_its_model_a_pause_and_no_other_model_anything(
    make_app, add_task, events, monkeypatch, broken_engines, where
):
    monkeypatch.setattr("backend.engine.worker.FIRST_RETRY_S", 0.05)
    kind = type("OwnBug", (Bug,), {"where": where, "events": events})
    client = make_app([add_task("buggy", kind), ECHO]).test_client()
    statuses = {
        answer.status_code for answer in together(client, [{"model_id": "buggy", "input": 1}] * 3)
    }
    assert statuses <= {200, 503}
    order(client, "buggy", "unload")
    wait_for(lambda: run(client, "buggy").status_code == 200)
    assert kind.where == ""
    assert run(client).status_code == 200
    assert not broken_engines
    assert state(client, "buggy") == "ready"
    assert held_bytes(client) == MB


def test_an_output_that_cannot_be_used_fails_its_call_alone(make_app, add_task):
    class Odd(Echo):
        def predict(self, batch):
            results = super().predict(batch)
            for prediction, value in zip(results, batch.inputs, strict=True):
                if value == "odd":
                    prediction.usage = Unreadable()
                    prediction.output = Unreadable()
            return results

    client = make_app([add_task("odd", Odd)]).test_client()
    requests = [{"model_id": "odd", "input": value} for value in ("odd", "fine", "fine")]
    assert [one.status_code for one in together(client, requests)] == [500, 200, 200]
    assert state(client, "odd") == "ready"


def test_an_entry_that_joins_as_its_weights_unload_is_served(make_app, add_task, events):
    unloading, joined = threading.Event(), threading.Event()

    class Shared(Sized):
        weights, guess = MB, None

        def __init__(self, spec, **about):
            super().__init__(spec, **about)
            if spec.id == "b":
                joined.set()
            elif threading.current_thread().name.startswith("model "):
                unloading.set()
                joined.wait(0.3)  # it may have to wait for the end of the unload

        @classmethod
        def weights_key(cls, spec):
            return "shared"

        def load_beside(self, loaded):
            super(Sized, self).load()
            self.block = loaded.block

    Shared.events = events
    client = make_app([add_task(name, Shared) for name in "ab"]).test_client()
    assert run(client, "a").status_code == 200
    client.application.extensions["crane"].engine.control("unload", "a")
    assert unloading.wait(10)
    assert run(client, "b").status_code == 200
    assert run(client, "a").status_code == 200
