"""Which models are loaded, through the caller's door: fitting, leaving, staying, waiting."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from queue import SimpleQueue
from typing import ClassVar

import pytest

from backend.adapters.base import Prediction
from backend.adapters.echo import Echo
from backend.config import Config
from backend.engine import libraries, residency
from backend.engine.calls import Answer, Call
from backend.engine.jobs import Job
from backend.engine.stay import Stay
from backend.errors import ModelUnavailable
from backend.keys import Keys
from backend.models import run_model
from tests.conftest import order, run
from tests.serving import ROOT, wait_for

MB = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def torch_is_there():
    """The first load of all would import it, which takes longer than some callers wait here."""
    libraries.load(["torch"])


class Sized(Echo):
    """An echo with weights to load, ``weights`` bytes of them; it tells what happens to it."""

    def place(self):
        return "cpu", type(self).guess or type(self).weights

    def load(self):
        import torch

        super().load()
        self.told("load")
        self.block = torch.zeros(type(self).weights, dtype=torch.uint8)

    def unload(self):
        self.told("unload")
        del self.block

    def predict(self, batch):
        assert self.block.numel() == type(self).weights
        return super().predict(batch)

    def told(self, what):
        type(self).events.append((what, self.spec.id))


@pytest.fixture
def events():
    return []


@pytest.fixture
def sized(add_task, events):
    """The entry of a model of a size: ``sized("a", 2 * MB, pinned=True)``."""

    def entry(name, weights=MB, guess=None, **more):
        own = {"weights": weights, "guess": guess, "events": events}
        return add_task(name, type("SizedEcho", (Sized,), own)) | more

    return entry


def state(client, model_id):
    return client.get(f"/crane/models/{model_id}").json["state"]


def held_bytes(client):
    """The bytes that models hold in main memory."""
    return client.get("/readyz").json["engines"][0]["memory"]["cpu"]["held_bytes"]


def loads(events):
    return [name for what, name in events if what == "load"]


def unloads(events):
    return [name for what, name in events if what == "unload"]


# Fitting


def test_the_least_recently_used_makes_room(make_app, sized, events):
    client = make_app([sized(name) for name in "abcd"], memory_budget=3 * MB).test_client()
    for name in "abcabad":
        assert run(client, name, name).json["output"] == name
    assert loads(events) == ["a", "b", "c", "d"]
    assert unloads(events) == ["c"]
    assert {name: state(client, name) for name in "abcd"} == {
        "a": "ready",
        "b": "ready",
        "c": "unloaded",
        "d": "ready",
    }


def test_no_more_models_leave_than_needed(make_app, sized, events):
    entries = [sized("small"), sized("large", 3 * MB), sized("next", 2 * MB)]
    client = make_app(entries, memory_budget=4 * MB).test_client()
    for name in ("small", "large", "next"):
        assert run(client, name).status_code == 200
    assert unloads(events) == ["large"]


def test_what_was_measured_counts_and_not_what_was_guessed(make_app, sized, events):
    entries = [sized("a", 2 * MB, guess=MB), sized("b", MB), sized("c", MB, guess=3 * MB)]
    client = make_app(entries, memory_budget=3 * MB).test_client()
    assert run(client, "a").status_code == 200
    assert client.get("/crane/models/a").json["memory_bytes"] == 2 * MB
    assert run(client, "b").status_code == 200
    assert unloads(events) == []
    assert run(client, "c").status_code == 200
    assert sorted(unloads(events)) == ["a", "b"]
    events.clear()
    # Now it is known that the three are 4 MB.
    for name in "abc":
        assert run(client, name).status_code == 200
    assert (loads(events), unloads(events)) == (["a", "b", "c"], ["c", "a"])


def test_what_a_model_turned_out_to_take_makes_idle_ones_leave(make_app, sized, events):
    entries = [sized("a"), sized("b", 3 * MB, guess=MB)]
    client = make_app(entries, memory_budget=3 * MB).test_client()
    for name in "ab":
        assert run(client, name).status_code == 200
    wait_for(lambda: state(client, "a") == "unloaded")
    assert unloads(events) == ["a"]


def test_a_model_that_never_fits_is_refused_at_once(make_app, sized, events):
    entries = [sized("kept", pinned=True), sized("huge", 3 * MB), sized("more", 4 * MB)]
    client = make_app(entries, memory_budget=3 * MB).test_client()
    for name, needs in (("huge", "3 MB"), ("more", "4 MB")):
        started = time.monotonic()
        wait_for(lambda: state(client, "kept") == "ready")
        refused = run(client, name)
        assert time.monotonic() - started < 5
        assert (refused.status_code, refused.json["error"]["code"]) == (503, "OUT_OF_MEMORY")
        message = refused.json["error"]["message"]
        assert f"{name} needs {needs} on cpu, where models may hold 3 MB" in message
        assert "held: kept 1 MB (pinned)." in message
        assert refused.json["error"]["details"] == {
            "needed_bytes": int(needs[0]) * MB,
            "budget_bytes": 3 * MB,
            "held_bytes": {"kept": MB},
        }
        assert state(client, name) == "unloaded"
    assert loads(events) == ["kept"]


def test_what_is_not_free_is_not_there_whatever_the_budget_says(
    make_app, sized, events, monkeypatch
):
    free = [10 * MB]
    monkeypatch.setattr("backend.adapters.footprint.free", lambda device: free[0])
    client = make_app([sized("a"), sized("b", 2 * MB)], memory_budget=9 * MB).test_client()
    assert run(client, "a").status_code == 200
    free[0] = MB
    refused = run(client, "b", options={})
    assert refused.json["error"]["code"] == "OUT_OF_MEMORY"


# In use


class Held(Sized):
    """One whose calls end when the test says."""

    def predict(self, batch):
        type(self).inside.set()
        assert type(self).gate.wait(20)
        return super().predict(batch)


@pytest.fixture
def held(add_task, events):
    gates = []

    def entry(name, weights=MB, **more):
        own = {"weights": weights, "guess": None, "events": events}
        own |= {"gate": threading.Event(), "inside": threading.Event()}
        gates.append(own["gate"])
        kind = type("HeldEcho", (Held,), own)
        return add_task(name, kind) | more, kind

    yield entry
    for gate in gates:
        gate.set()


def test_a_model_in_use_never_leaves_and_who_waits_gets_its_place(
    make_app, sized, held, events, monkeypatch
):
    monkeypatch.setattr(residency, "AGE_BOUND_S", 60)
    monkeypatch.setattr(residency, "LOOK_AGAIN_S", 60)  # it is told, and need not look
    entry, kind = held("busy")
    client = make_app([entry, sized("late")], memory_budget=MB).test_client()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, client, "busy")
        assert kind.inside.wait(10)
        second = threads.submit(run, client, "late")
        wait_for(lambda: state(client, "late") == "waiting")
        time.sleep(0.3)
        assert (loads(events), unloads(events)) == (["busy"], [])
        why = client.get("/crane/models/late").json["error"]
        assert "held: busy 1 MB (1 in use)" in why
        kind.gate.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
    assert events == [("load", "busy"), ("unload", "busy"), ("load", "late")]


def test_who_waits_too_long_for_room_is_told_what_holds_it(make_app, sized, held, monkeypatch):
    monkeypatch.setattr(residency, "AGE_BOUND_S", 60)
    entry, kind = held("busy")
    client = make_app([entry, sized("late")], memory_budget=MB, load_wait_s=0.3).test_client()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(run, client, "busy")
        assert kind.inside.wait(10)
        refused = run(client, "late")
        assert (refused.status_code, refused.json["error"]["code"]) == (503, "OUT_OF_MEMORY")
        assert "There was no room for late in 0.3 s." in refused.json["error"]["message"]
        assert "busy 1 MB (1 in use)" in refused.json["error"]["message"]
        assert int(refused.headers["Retry-After"]) >= 1
        wait_for(lambda: state(client, "late") == "unloaded")  # nobody waits any more
        kind.gate.set()
        assert first.result().status_code == 200
    assert run(client, "late").status_code == 200


def test_a_small_model_may_pass_a_large_one_that_waits(make_app, sized, held, monkeypatch):
    monkeypatch.setattr(residency, "AGE_BOUND_S", 60)
    entry, kind = held("busy", 2 * MB)
    entries = [entry, sized("large", 3 * MB), sized("small")]
    client = make_app(entries, memory_budget=3 * MB).test_client()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, client, "busy")
        assert kind.inside.wait(10)
        second = threads.submit(run, client, "large")
        wait_for(lambda: state(client, "large") == "waiting")
        assert run(client, "small").status_code == 200
        kind.gate.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_work_that_comes_first_keeps_a_model_that_was_asked_to_leave(make_app, sized, events):
    app = make_app([sized("a")])
    assert run(app.test_client(), "a").status_code == 200
    [worker] = app.extensions["crane"].engine._engine._pool._workers.values()
    answered = threading.Event()
    call = Call(
        request_id="x",
        model_id="a",
        inputs=[1],
        options={"delay_ms": 0},
        seeds=None,
        timeout_s=9,
    )
    with worker._changed:  # so that both are there when its thread looks
        assert worker.leave()
        worker.submit(Job(call, lambda answer: answered.set()))
    assert answered.wait(5)
    time.sleep(0.1)
    assert (worker.is_leaving, events) == (False, [("load", "a")])


def test_a_model_in_use_refuses_to_leave(make_app, held):
    entry, kind = held("busy")
    app = make_app([entry])
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(run, app.test_client(), "busy")
        assert kind.inside.wait(10)
        [worker] = app.extensions["crane"].engine._engine._pool._workers.values()
        assert worker.leave() is False
        assert not worker.is_leaving
        kind.gate.set()
        assert first.result().status_code == 200


def test_an_order_to_unload_what_waits_for_room_is_not_kept_for_later(make_app, sized, held):
    entry, kind = held("busy")
    client = make_app([entry, sized("late")], memory_budget=MB, load_wait_s=1).test_client()
    order(client, "late", "unload")  # which makes the database of keys, in its time
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, client, "busy")
        assert kind.inside.wait(10)
        second = threads.submit(run, client, "late")
        wait_for(lambda: state(client, "late") == "waiting")
        order(client, "late", "unload")
        assert second.result().status_code == 503
        kind.gate.set()
        assert first.result().status_code == 200
    assert run(client, "late").status_code == 200
    time.sleep(0.2)
    assert state(client, "late") == "ready"


def submitted(client, model_id):
    """A call that is queued, and what it will be told."""
    told = SimpleQueue()
    about = {"options": {"delay_ms": 0}, "seeds": None, "timeout_s": 60.0}
    call = Call(request_id="1", model_id=model_id, inputs=["hi"], **about)
    engine = client.application.extensions["crane"].engine._engine
    return engine.submit(call, told.put), told


def test_an_order_to_unload_what_nobody_waits_for_any_more_is_not_kept_for_the_next_call(
    make_app, sized, held, monkeypatch
):
    monkeypatch.setattr(residency, "LOOK_AGAIN_S", 60)  # so that nothing of it is seen meanwhile
    entry, kind = held("busy")
    client = make_app([entry, sized("late")], memory_budget=MB).test_client()
    engine = client.application.extensions["crane"].engine
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(run, client, "busy")
        assert kind.inside.wait(10)
        caller, _ = submitted(client, "late")
        wait_for(lambda: client.get("/crane/models/late").json["error"])  # it waits, in line
        caller.cancel()
        engine.control("unload", "late")
        _, told = submitted(client, "late")
        kind.gate.set()
        assert first.result().status_code == 200
        assert isinstance(told.get(timeout=20), Answer)
    time.sleep(0.2)
    assert state(client, "late") == "ready"


def test_an_order_to_unload_what_did_not_load_is_not_kept_for_its_next_load(
    make_app, add_task, monkeypatch
):
    monkeypatch.setattr("backend.engine.worker.FIRST_RETRY_S", 0.2)
    may_load = threading.Event()

    class Fails(Echo):
        def load(self):
            if not may_load.is_set():
                raise RuntimeError("not yet")
            super().load()

    client = make_app([add_task("a", Fails) | {"pinned": True}]).test_client()
    wait_for(lambda: state(client, "a") == "failed")
    client.application.extensions["crane"].engine.control("unload", "a")
    may_load.set()
    wait_for(lambda: state(client, "a") == "ready")
    time.sleep(0.1)
    assert state(client, "a") == "ready"


def test_an_order_to_unload_keeps_no_model_that_has_to_make_room(make_app, held, events):
    entry, kind = held("busy")
    app = make_app([entry])
    client = app.test_client()
    _, told = submitted(client, "busy")
    assert kind.inside.wait(10)
    _, late = submitted(client, "busy")
    [worker] = app.extensions["crane"].engine._engine._pool._workers.values()
    assert worker.leave(though_used=True)
    worker.unload()
    kind.gate.set()
    for one in (told, late):
        assert isinstance(one.get(timeout=20), Answer)
    assert events[:2] == [("load", "busy"), ("unload", "busy")]  # before its queue
    assert loads(events) == ["busy", "busy"]


# Order


def test_queued_work_for_a_loaded_model_goes_first(make_app, held, sized, events, monkeypatch):
    monkeypatch.setattr(residency, "AGE_BOUND_S", 60)
    entry, kind = held("a")
    client = make_app([entry, sized("b"), sized("c")], memory_budget=MB).test_client()
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(run, client, "a", 0)]
        assert kind.inside.wait(10)
        for place, name in enumerate("baacabc", 1):
            answers.append(threads.submit(run, client, name, place))
            wait_for(lambda name=name: client.get(f"/crane/models/{name}").json["queue"])
            time.sleep(0.05)
        kind.gate.set()
        assert [answer.result().json["output"] for answer in answers] == list(range(8))
    assert loads(events) == ["a", "b", "c"]


def test_nobody_waits_longer_for_that_than_the_age_bound(make_app, sized, events, monkeypatch):
    monkeypatch.setattr(residency, "AGE_BOUND_S", 0.5)
    client = make_app([sized("a"), sized("b")], memory_budget=MB).test_client()
    stop, answers = threading.Event(), []

    def keep_busy():
        while not stop.is_set():
            answers.append(run(client, "a", options={"delay_ms": 20}).status_code)

    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(keep_busy)
        wait_for(lambda: len(answers) > 8)
        started = time.monotonic()
        assert run(client, "b").status_code == 200
        waited = time.monotonic() - started
        before = len(answers)
        wait_for(lambda: len(answers) > before + 8)
        stop.set()
    assert 0.4 < waited < 20  # for ever, without
    assert set(answers) == {200}
    assert loads(events)[:3] == ["a", "b", "a"]


def test_the_trace_is_loaded_no_more_often_than_the_best_order_and_one(make_app, sized, events):
    client = make_app([sized(name) for name in "abc"], memory_budget=2 * MB).test_client()
    for name in "abaacabc":
        assert run(client, name).status_code == 200
    assert len(loads(events)) <= 4 + 1  # the best knows the future: a, b, c for b, b for a


# Staying


def test_an_idle_model_leaves_after_its_time_and_comes_back(make_app, sized, events):
    client = make_app([sized("a", idle_timeout=0.3), sized("b")], idle_timeout_s=60).test_client()
    for name in "ab":
        assert run(client, name).status_code == 200
    assert client.get("/crane/models/b").json["idle_s"] >= 0
    wait_for(lambda: state(client, "a") == "unloaded")
    assert state(client, "b") == "ready"
    assert run(client, "a").status_code == 200
    assert loads(events) == ["a", "b", "a"]


def test_idle_time_counts_from_the_end_of_the_last_call(make_app, sized, events):
    client = make_app([sized("a", idle_timeout=0.4)]).test_client()
    for _ in range(3):
        assert run(client, "a", options={"delay_ms": 500}).status_code == 200
    assert events == [("load", "a")]


@pytest.mark.parametrize(
    ("keep_alive", "entry", "stays"),
    [
        (0, {}, False),
        ("100ms", {}, False),
        # To keep it longer than it stays anyway is the operator's to allow.
        (-1, {}, False),
        ("10m", {}, False),
        ("10m", {"limits": {"keep_alive": 600}}, True),
        (None, {"options": {"keep_alive": -1}}, True),
        (-1, {"options": {"keep_alive": "1h"}}, True),
    ],
)
def test_a_call_may_say_how_long_its_model_stays(make_app, sized, keep_alive, entry, stays):
    client = make_app([sized("a", **entry)], idle_timeout_s=0.3).test_client()
    sent = {} if keep_alive is None else {"keep_alive": keep_alive}
    answer = run(client, "a", options=sent)
    assert answer.status_code == 200
    assert "keep_alive" not in answer.json["metadata"]["options"]
    if stays:
        time.sleep(0.6)
        assert state(client, "a") == "ready"
    else:
        wait_for(lambda: state(client, "a") == "unloaded")


def run_as(app, caller, keep_alive=None, **more):
    options = {} if keep_alive is None else {"keep_alive": keep_alive}
    with app.test_request_context():
        run_model(app.extensions["crane"], "a", "x", options, request_id="r", caller=caller, **more)


@pytest.mark.parametrize("others", [None, 30, "1m"])
def test_nobody_unloads_a_model_that_others_use(make_app, sized, events, others):
    app = make_app([sized("a")], idle_timeout_s=60)
    client = app.test_client()
    run_as(app, "one", others)
    for keep_alive in (0, "10ms"):
        run_as(app, "two", keep_alive)
    run_as(app, "", 0)
    time.sleep(0.2)
    assert state(client, "a") == "ready"
    run_as(app, "one", 0)  # who was the only one to want it
    wait_for(lambda: state(client, "a") == "unloaded")
    assert events == [("load", "a"), ("unload", "a")]


def test_what_an_order_has_loaded_is_not_unloaded_by_a_call(make_app, sized):
    app = make_app([sized("a")], idle_timeout_s=60)
    app.extensions["crane"].engine.load("a")
    run_as(app, "one", 0)
    time.sleep(0.2)
    assert state(app.test_client(), "a") == "ready"


def test_an_admin_may_keep_a_model_for_ever(make_app, sized):
    app = make_app([sized("a")], idle_timeout_s=0.2)
    run_as(app, "one", -1, admin=True)
    run_as(app, "two", 0)
    time.sleep(0.4)
    assert state(app.test_client(), "a") == "ready"
    run_as(app, "one", -1)
    wait_for(lambda: state(app.test_client(), "a") == "unloaded")


def test_the_last_call_of_a_caller_decides(make_app, sized):
    client = make_app([sized("a")], idle_timeout_s=60).test_client()
    run(client, "a", options={"keep_alive": -1})
    assert state(client, "a") == "ready"
    run(client, "a", options={"keep_alive": 0})
    wait_for(lambda: state(client, "a") == "unloaded")
    run(client, "a")
    time.sleep(0.2)
    assert state(client, "a") == "ready"


def test_callers_who_want_a_model_no_more_are_forgotten():
    stay = Stay()
    for number in range(1000):
        stay.use(f"caller {number}", now=number, stay_s=0.5)
    assert stay._until == {"caller 999": 999.5}


def test_an_entry_bounds_how_long_its_model_may_be_kept(make_app, sized):
    client = make_app([sized("a", limits={"keep_alive": 60})]).test_client()
    assert run(client, "a", options={"keep_alive": 60}).status_code == 200
    for beyond in (61, "2m", -1):
        refused = run(client, "a", options={"keep_alive": beyond})
        assert refused.json["error"]["code"] == "VALIDATION_ERROR"


@pytest.mark.parametrize("wrong", [-2, "soon", "", True, [], "1d"])
def test_a_wrong_keep_alive_is_named(make_app, sized, wrong):
    answer = run(make_app([sized("a")]).test_client(), "a", options={"keep_alive": wrong})
    assert answer.json["error"]["code"] == "VALIDATION_ERROR"
    assert list(answer.json["error"]["details"]) == ["options.keep_alive"]


def test_a_pinned_model_loads_at_the_start_and_stays(make_app, sized, events):
    entries = [sized("kept", pinned=True, idle_timeout=0.1), sized("a"), sized("b")]
    client = make_app(entries, memory_budget=2 * MB).test_client()
    seen = []
    wait_for(lambda: seen.append(client.get("/readyz")) or seen[-1].status_code == 200)
    assert state(client, "kept") == "ready"
    for name in ("a", "b", "a"):
        assert run(client, name).status_code == 200
    assert unloads(events) == ["a", "b"]
    assert run(client, "kept", options={"keep_alive": 0}).status_code == 200
    time.sleep(0.3)
    assert state(client, "kept") == "ready"


def test_readiness_waits_for_what_is_pinned(make_app, add_task):
    gate = threading.Event()

    class LoadsAtTheGate(Echo):
        def load(self):
            assert gate.wait(20)
            super().load()

    client = make_app([add_task("kept", LoadsAtTheGate) | {"pinned": True}]).test_client()
    for _ in range(2):
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json["reasons"] == ["kept is pinned and not loaded yet."]
    gate.set()
    wait_for(lambda: client.get("/readyz").status_code == 200)


@pytest.mark.parametrize("fault", [RuntimeError("not yet"), MemoryError()])
def test_a_pinned_model_that_does_not_load_is_tried_again_by_itself(
    make_app, add_task, monkeypatch, fault
):
    monkeypatch.setattr("backend.engine.worker.FIRST_RETRY_S", 0.2)
    tries = []

    class LoadsTheThirdTime(Echo):
        def load(self):
            tries.append(1)
            if len(tries) < 3:
                raise fault
            super().load()

    client = make_app([add_task("kept", LoadsTheThirdTime) | {"pinned": True}]).test_client()
    wait_for(lambda: client.get("/readyz").status_code == 200)
    assert len(tries) == 3


def test_entries_that_share_weights_leave_and_come_back_together(make_app, add_task, events):
    class Shared(Sized):
        weights, guess = MB, None

        @classmethod
        def weights_key(cls, spec):
            return "shared"

        def load_beside(self, loaded):
            super(Sized, self).load()
            self.told("beside")
            self.block = loaded.block

    Shared.events = events
    client = make_app([add_task(name, Shared) for name in "ab"]).test_client()
    for _ in range(2):
        for name in "ab":
            assert run(client, name).status_code == 200
        assert held_bytes(client) == MB
        assert order(client, "b", "unload").json["state"] == "unloaded"
        assert state(client, "a") == "unloaded"
        assert [what for what, _ in events] == ["load", "beside", "unload", "unload"]
        events.clear()


# Control


def without_times(model):
    copies = [without_times(copy) for copy in model.get("copies", ())]
    return {**model, "idle_s": None, "copies": copies}


def test_a_model_is_loaded_and_unloaded_by_order(make_app, sized, events):
    client = make_app([sized("a"), sized("b")], memory_budget=MB).test_client()
    for name in "ab":
        answer = order(client, name, "load")
        assert (answer.status_code, answer.json["state"]) == (200, "ready")
        shown = client.get(f"/crane/models/{name}").json
        assert without_times(answer.json) == without_times(shown)
    assert order(client, "b", "load").status_code == 200  # and not once more
    assert state(client, "a") == "unloaded"
    for _ in range(2):
        answer = order(client, "b", "unload")
        assert (answer.status_code, answer.json["state"]) == (200, "unloaded")
    assert events == [("load", "a"), ("unload", "a"), ("load", "b"), ("unload", "b")]
    assert run(client, "b").status_code == 200


def test_a_model_in_use_is_unloaded_when_its_calls_are_done(make_app, held, events):
    entry, kind = held("busy")
    client = make_app([entry], load_wait_s=0.2).test_client()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, client, "busy")
        assert kind.inside.wait(10)
        second = threads.submit(run, client, "busy", options={"delay_ms": 1})
        wait_for(lambda: client.get("/crane/models/busy").json["queue"])
        assert order(client, "busy", "unload").status_code == 202
        kind.gate.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
    wait_for(lambda: state(client, "busy") == "unloaded")
    assert loads(events) == ["busy"]


def test_a_load_by_order_says_why_it_failed(make_app, sized, add_task, monkeypatch):
    tries = []

    class LoadsTheSecondTime(Echo):
        def load(self):
            tries.append(1)
            if len(tries) < 2:
                raise ModelUnavailable("Its weights are still being copied.")
            super().load()

    entries = [sized("huge", 2 * MB), add_task("late", LoadsTheSecondTime)]
    client = make_app(entries, memory_budget=MB).test_client()
    refused = order(client, "huge", "load")
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "OUT_OF_MEMORY")
    refused = order(client, "late", "load")
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    assert "still being copied" in refused.json["error"]["message"]
    # Whoever gives the order need not wait, as callers must.
    assert order(client, "late", "load").status_code == 200


def test_a_load_by_order_that_takes_long_goes_on(make_app, add_task):
    gate = threading.Event()

    class LoadsAtTheGate(Echo):
        def load(self):
            assert gate.wait(20)
            super().load()

    client = make_app([add_task("slow", LoadsAtTheGate)], load_wait_s=0.2).test_client()
    refused = order(client, "slow", "load")
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "MODEL_LOADING")
    assert order(client, "slow", "unload").status_code == 202
    gate.set()
    wait_for(lambda: state(client, "slow") == "unloaded")


def test_orders_are_an_admins(make_app, tmp_path):
    client = make_app(auth="required").test_client()
    with closing(Keys(Config(data_dir=tmp_path / "data"))) as keys:
        admin, plain, elsewhere = (
            {"Authorization": "Bearer " + keys.create(owner="a", tier="free", **more)[1]}
            for more in ({"admin": True}, {}, {"admin": True, "models": ["other"]})
        )
    for what in ("load", "unload"):
        assert order(client, "echo", what, **{"X-No": "key"}).status_code == 401
        for others in (plain, elsewhere):
            refused = order(client, "echo", what, **others)
            assert (refused.status_code, refused.json["error"]["code"]) == (403, "FORBIDDEN")
        assert order(client, "echo", what, **admin).status_code == 200
        unknown = order(client, "ecko", what, **admin)
        assert (unknown.status_code, unknown.json["error"]["code"]) == (404, "MODEL_NOT_FOUND")


@pytest.mark.parametrize("auth", ["auto", "off"])
@pytest.mark.parametrize("what", ["load", "unload"])
def test_who_needs_no_key_needs_one_for_orders(make_app, auth, what):
    client = make_app(auth=auth).test_client()
    refused = order(client, "echo", what, **{"X-No": "key"})
    assert (refused.status_code, refused.json["error"]["code"]) == (403, "FORBIDDEN")
    assert "--tier TIER --admin" in refused.json["error"]["message"]
    assert order(client, "echo", what).status_code == (403 if auth == "off" else 200)


def test_orders_reach_the_engine_whichever_worker_takes_them(gunicorn):
    server = gunicorn(CRANE_WORKERS=3)
    for _ in range(4):
        for what, wanted in (("load", "ready"), ("unload", "unloaded")):
            assert server.order("echo", what) == 200
            states = {server.get("/crane/models/echo")[1]["state"] for _ in range(6)}
            assert states == {wanted}


# All of it at once


class Walked(Sized):
    """A model that says whose answer it is, and tells of the room that all of them take."""

    taken: ClassVar[dict] = {}
    most: ClassVar[list] = []
    wrong: ClassVar[list] = []

    def load(self):
        if random.random() < 0.03:
            raise RuntimeError("a load that fails, now and then")
        super().load()
        self.taken[self.spec.id] = type(self).weights
        self.most.append(sum(self.taken.values()))

    def unload(self):
        del self.taken[self.spec.id]
        super().unload()

    def predict(self, batch):
        if self.spec.id not in self.taken:
            self.wrong.append("it works though it was unloaded")
        if "fail" in batch.inputs:
            raise RuntimeError("an input that fails")
        return [Prediction([self.spec.id, one.output]) for one in super().predict(batch)]


def test_a_random_walk_never_passes_the_budget_or_loses_an_answer(
    make_app, add_task, events, monkeypatch
):
    monkeypatch.setattr(residency, "AGE_BOUND_S", 0.2)
    monkeypatch.setattr("backend.engine.worker.FIRST_RETRY_S", 0.05)
    names = "abcdefgh"
    kinds = {
        name: type(f"Walked{name}", (Walked,), {"weights": MB, "guess": None, "events": events})
        for name in names
    }
    entries = [add_task(name, kind) | {"idle_timeout": 0.2} for name, kind in kinds.items()]
    app = make_app(entries, memory_budget=3 * MB, load_wait_s=20)
    engine, client = app.extensions["crane"].engine, app.test_client()
    steps = iter(range(2000))
    seen = Counter()

    def step(chance):
        name = chance.choices(names, weights=range(8, 0, -1))[0]
        what = chance.choice(["call"] * 12 + ["fail", "leave", "unload", "load", "idle"])
        if what == "unload":
            engine.control("unload", name)
        elif what == "load":
            with suppress(ModelUnavailable):
                engine.control("load", name)
        elif what == "idle":
            time.sleep(chance.random() * 0.3)
        elif what == "leave":
            with suppress(ModelUnavailable):
                engine._cancel(engine._submit(call_of(name)))
        else:
            value = "fail" if what == "fail" else chance.random()
            options = {"delay_ms": chance.choice([0, 0, 1, 5])}
            if chance.random() < 0.2:
                options["keep_alive"] = chance.choice([0, 0.05, -1])
            answer = run(client, name, value, options=options)
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                assert answer.json["output"] == [name, value]
            elif answer.status_code == 500:
                assert value == "fail"
            else:
                assert answer.json["error"]["code"] == "MODEL_UNAVAILABLE"
        with lock:
            return next(steps, None)

    def walk(seed):
        chance = random.Random(seed)
        while step(chance) is not None:
            pass

    def call_of(name):
        return Call(
            request_id="x",
            model_id=name,
            inputs=[1],
            options={"delay_ms": 0},
            seeds=None,
            timeout_s=9,
        )

    lock = threading.Lock()
    with ThreadPoolExecutor(16) as threads:
        for done in [threads.submit(walk, seed) for seed in range(16)]:
            done.result(timeout=120)
    assert seen[200] > 1000
    assert Walked.wrong == []
    assert max(Walked.most) == 3 * MB
    engine.close()
    assert Walked.taken == {}
    assert engine.status()["engines"][0]["memory"]["cpu"]["held_bytes"] == 0
    assert not [one for one in threading.enumerate() if one.name.startswith("model ")]


def test_memory_comes_back_when_a_model_leaves(make_app, tmp_path):
    """In a process of its own, where nothing else takes or gives back memory."""
    script = tmp_path / "cycles.py"
    script.write_text(CYCLES)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 20
    assert max(sizes[2:]) <= sizes[1] * 1.05


CYCLES = """
import json, sys
from pathlib import Path

import psutil
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from backend import create_app
from backend.config import Config
from tests.checkpoints import llama

folder = Path(sys.argv[1])
llama(folder / "model")
vocabulary = len(AutoTokenizer.from_pretrained(folder / "model"))
config = LlamaConfig.from_pretrained(folder / "model")
config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 7
config.num_attention_heads = config.num_key_value_heads = 8
config.head_dim = 64
model = LlamaForCausalLM(config)
assert 110e6 < sum(p.nbytes for p in model.parameters()) < 130e6
model.save_pretrained(folder / "model")
del model

(folder / "models.yaml").write_text(yaml.safe_dump({"models": [
    {"id": "m", "type": "text-generation", "hf_model": str(folder / "model")}]}))
app = create_app(Config(models=folder / "models.yaml", data_dir=folder / "data", quota="off",
                        dtype="float32", log_format="json"))
client, engine = app.test_client(), app.extensions["crane"].engine
sizes = []
for _ in range(20):
    answer = client.post("/crane/run", json={
        "model_id": "m", "input": "the river", "options": {"max_tokens": 3, "keep_alive": 0}})
    assert answer.status_code == 200, answer.text
    assert engine.unload("m")
    while engine.status()["engines"][0]["memory"]["cpu"]["held_bytes"]:
        pass
    sizes.append(psutil.Process().memory_info().rss)
engine.close()
print(json.dumps(sizes))
"""
