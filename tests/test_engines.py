"""Several engines under real gunicorn: where models are, and how calls find them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from backend.adapters.echo import Echo
from backend.config import Config, cores
from backend.engine import file_lock, placement
from backend.engine.calls import ModelStatus, State
from backend.engine.client import EngineClient
from backend.engine.engine import Engine
from backend.engine.placement import Placement
from backend.engine.status import nowhere, together
from backend.errors import ModelLoading, ModelUnavailable, OutOfMemory
from backend.registry import Registry
from tests.conftest import ECHO, MINILM, write_models
from tests.serving import ROOT, wait_for

MB = 10**6


@pytest.fixture
def engines(gunicorn):
    """A service with an engine for each device, and all of them up."""

    def start(entries=(ECHO,), devices="cpu,cpu", **settings):
        server = gunicorn(entries, CRANE_DEVICES=devices, **settings)
        wait_for(lambda: all("pid" in one for one in engines_of(server)), 30, every_s=0.05)
        return server

    return start


def engines_of(server):
    return server.get("/readyz")[1]["engines"]


def copies(server, model_id):
    """Where a model is, by engine."""
    model = server.get(f"/crane/models/{model_id}")[1]
    return {copy["engine"]: copy["state"] for copy in model["copies"] if copy["state"] == "ready"}


def loads(server):
    """How often each model was loaded, by the log."""
    return Counter(
        line["message"].split()[0]
        for line in server.log_lines(logger="crane.engine")
        if line["message"].endswith(" loaded")
    )


def at_once(server, count, **body):
    with ThreadPoolExecutor(count) as threads:
        calls = [threads.submit(server.run, **body) for _ in range(count)]
        return [call.result() for call in calls]


class Door:
    """The way to an engine that is in this very process."""

    def __init__(self, engine, index):
        self.engine, self.index, self.orders = engine, index, []

    def look(self):
        return self.engine.status()

    def control(self, order, model_id):
        self.orders.append((order, model_id))
        self.engine.control(order, model_id)


def wait_for_state(door, model_id, state):
    wait_for(lambda: door.look()["models"][model_id]["state"] == state)


@pytest.fixture
def two_workers(tmp_path, monkeypatch):
    """What two HTTP workers know of the same engines, which they do not look at unasked."""
    monkeypatch.setattr(placement, "LOOK_EVERY_S", math.inf)
    entries = [ECHO | {"id": name} for name in "abcd"] + [ECHO | {"id": "two", "replicas": 2}]
    models = write_models(tmp_path, entries)
    config = Config(
        models=models, engine="process", engine_socket=tmp_path / "x", devices=("cpu", "cpu")
    )
    registry = Registry.load(models)
    doors = [Door(Engine(config, registry, index=index), index) for index in range(2)]
    lock = tmp_path / "lock"
    yield registry, doors, [Placement(doors, config.devices, registry, lock) for _ in range(2)]
    for door in doors:
        door.engine.close()


def test_a_worker_that_has_not_looked_lately_does_before_it_places_a_model(two_workers):
    registry, doors, (first, second) = two_workers
    first.look()
    second.look()
    for name in "ab":
        with first.place(registry.get(name), 1) as door:
            assert door is doors["ab".index(name)]
    for name in "ab":  # of which it knows nothing yet
        with second.place(registry.get(name), 1) as door:
            assert door is doors["ab".index(name)]
    assert [door.orders for door in doors] == [[("prepare", "a")], [("prepare", "b")]]


def test_a_process_that_stops_while_it_places_a_model_keeps_nobody_waiting_for_ever(
    two_workers, tmp_path, monkeypatch
):
    monkeypatch.setattr(placement, "LOCK_S", 0.2)
    registry, doors, (first, second) = two_workers
    with file_lock.held(tmp_path / "lock", 1):
        for order in (first.load, first.unload):
            with pytest.raises(ModelUnavailable, match="Another process"):
                order(registry.get("a"))
        with second.place(registry.get("a"), 1) as door:  # a call goes where there is an engine
            assert door in doors
    first.load(registry.get("a"))
    assert sum(len(door.orders) for door in doors) == 1


def test_no_model_has_more_copies_than_it_may_and_a_loading_one_waits_its_turn(
    two_workers, monkeypatch
):
    registry, doors, (worker, _) = two_workers
    single, two = registry.get("a"), registry.get("two")
    with worker.place(single, 100) as first, worker.place(single, 100) as second:
        assert first is second
    with worker.place(two, 1) as there:
        wait_for_state(there, "two", "ready")
    gate = threading.Event()
    monkeypatch.setattr(Echo, "load", lambda adapter: gate.wait(30))
    try:
        with worker.place(two, two.max_batch_size + 1) as still:
            assert still is there
            with worker.place(two, 1) as still:  # the other is told to load, and is not waited for
                assert still is there
        assert [door.orders for door in doors].count([("prepare", "two")]) == 1
        assert sorted(door.look()["models"]["two"]["state"] for door in doors) == [
            "loading",
            "ready",
        ]
        with worker.place(two, two.max_batch_size + 1), worker.place(two, 1) as still:
            assert still is there
    finally:
        gate.set()


def test_a_copy_that_did_not_load_is_not_tried_at_each_call(two_workers, monkeypatch):
    registry, doors, (worker, _) = two_workers
    spec = registry.get("two")
    with worker.place(spec, 1) as there:
        wait_for_state(there, "two", "ready")
    tried = []

    def fail(adapter):
        tried.append(adapter)
        raise RuntimeError("not here")

    monkeypatch.setattr(Echo, "load", fail)
    with worker.place(spec, spec.max_batch_size + 1):
        with worker.place(spec, 1) as still:
            assert still is there
        other = doors[1 - there.index]
        wait_for_state(other, "two", "failed")
        worker.look()
        for _ in range(5):
            with worker.place(spec, 1) as still:
                assert still is there
            assert other.look()["models"]["two"]["state"] == "failed"
    assert len(tried) == 1


def test_what_engines_say_together():
    running = {"inputs": 2, "step": 3, "steps": 9}
    ready = ModelStatus(state=State.READY, queue=2, running=running, device="cuda:1").to_wire()
    failed = ModelStatus(state=State.FAILED, queue=1, error="no").to_wire()
    busy = ModelStatus(state=State.READY, queue=3, running={"inputs": 4}, device="cpu").to_wire()
    looks = {
        0: {"device": "cuda:0", "pid": 1, "models": {"m": failed, "other": failed}},
        1: {"device": "cuda:1", "pid": 2, "models": {"m": ready}},
        3: {"device": "cpu", "pid": 4, "models": {"m": busy}},
    }
    told = together(("cuda:0", "cuda:1", "mps", "cpu"), looks)
    assert told["engines"] == [
        {"device": "cuda:0", "pid": 1},
        {"device": "cuda:1", "pid": 2},
        {"device": "mps", "error": "It does not answer."},
        {"device": "cpu", "pid": 4},
    ]
    model = told["models"]["m"]
    assert (model["state"], model["device"], model["error"]) == ("ready", "cuda:1", None)
    assert (model["queue"], model["running"]) == (6, {"inputs": 6, "step": 3, "steps": 9})
    assert [copy["engine"] for copy in model["copies"]] == [0, 1, 3]
    assert model["copies"][2] == {"engine": 3, **busy}
    assert told["models"]["other"] == {**failed, "copies": [{"engine": 0, **failed}]}
    assert nowhere() == {**ModelStatus().to_wire(), "copies": []}


@pytest.mark.parametrize(
    ("second", "error"),
    [
        ({"state": State.WAITING, "error": "m needs 5 GB."}, OutOfMemory),
        ({"state": State.LOADING}, ModelLoading),
    ],
)
def test_an_order_to_load_does_not_wait_for_ever_for_the_last_copy(second, error):
    models = [ModelStatus(state=State.READY).to_wire(), ModelStatus(**second).to_wire()]
    looks = {index: {"models": {"m": model}} for index, model in enumerate(models)}

    class Engines(EngineClient):
        stream = close = None

        def status(self):
            return together(("cpu", "cpu"), looks)

        def control(self, order, model_id):
            assert (order, model_id) == ("load", "m")

    with pytest.raises(error, match=r"0\.1 s"):
        Engines(Config(load_wait_s=0.1)).load("m")


def test_what_a_worker_has_itself_counts_before_it_looks_again(two_workers):
    registry, doors, (worker, _) = two_workers
    spec = registry.get("two")
    worker.load(spec)
    assert [door.orders for door in doors] == [[("load", "two")]] * 2
    for door in doors:
        wait_for_state(door, "two", "ready")
    worker.look()
    with ExitStack() as stack:
        chosen = [stack.enter_context(worker.place(spec, 3)) for _ in range(6)]
        assert Counter(door.index for door in chosen) == {0: 3, 1: 3}
        several = stack.enter_context(worker.place(spec, 9))
        for _ in range(3):
            assert stack.enter_context(worker.place(spec, 3)) is not several
    with ExitStack() as stack:  # and all of that is over
        chosen = [stack.enter_context(worker.place(spec, 1)) for _ in range(2)]
        assert chosen[0] is not chosen[1]


def test_each_engine_is_a_process_with_its_share(engines):
    server = engines(CRANE_WORKERS=2, CRANE_MEMORY_BUDGET="200MB")
    first, second = engines_of(server)
    assert first["pid"] != second["pid"]
    assert {first["device"], second["device"]} == {"cpu"}
    assert first["threads"] == second["threads"] == max(1, cores() // 2)
    assert server.run()[0] == 200
    [memory] = [engine["memory"] for engine in engines_of(server) if engine["memory"]] or [None]
    assert memory is None or memory["cpu"]["budget_bytes"] == 100 * MB


def test_a_model_is_loaded_once_whichever_of_many_calls_come_first(engines):
    entries = [ECHO | {"id": f"m{number}"} for number in range(6)]
    server = engines(entries, CRANE_WORKERS=3)
    with ThreadPoolExecutor(60) as threads:
        calls = [
            threads.submit(server.run, f"m{number % 6}", str(number), options={"delay_ms": 20})
            for number in range(240)
        ]
        answers = [call.result() for call in calls]
    assert [status for status, _ in answers] == [200] * 240
    assert [answer["output"] for _, answer in answers] == [str(number) for number in range(240)]
    assert loads(server) == {f"m{number}": 1 for number in range(6)}
    places = Counter(engine for number in range(6) for engine in copies(server, f"m{number}"))
    assert places == {0: 3, 1: 3}


def test_a_busy_model_gets_its_second_copy_and_both_are_used(engines):
    entry = ECHO | {"id": "m", "replicas": 2, "max_batch_size": 1}
    server = engines([entry, ECHO | {"id": "single", "max_batch_size": 1}], CRANE_WORKERS=2)
    assert server.run("m")[0] == 200
    assert list(copies(server, "m")) == [0]

    def both_run():
        running = server.get("/crane/models/m")[1]["running"]
        return running and running["inputs"] == 2

    with ThreadPoolExecutor(1) as threads:
        calls = threads.submit(at_once, server, 12, model_id="m", options={"delay_ms": 400})
        wait_for(both_run)
        answers = calls.result() + at_once(server, 4, model_id="single", options={"delay_ms": 50})
        assert [status for status, _ in answers] == [200] * 16
        assert sorted(copies(server, "m")) == [0, 1]
        assert loads(server) == {"m": 2, "single": 1}
        # With both there, calls that come one after another go to the one that has less to do.
        calls = threads.submit(at_once, server, 8, model_id="m", options={"delay_ms": 400})
        wait_for(both_run)
        assert [status for status, _ in calls.result()] == [200] * 8


def test_orders_and_the_list_are_of_all_engines(engines):
    entries = [ECHO | {"id": "m", "replicas": 2}, ECHO | {"id": "other"}]
    server = engines(entries, devices="cpu,cpu,cpu", CRANE_WORKERS=2)
    for _ in range(2):
        assert server.order("m", "load") == 200
        assert len(copies(server, "m")) == 2
    assert loads(server)["m"] == 2
    for _ in range(6):  # whichever worker answers
        model = server.get("/crane/models/m")[1]
        assert (model["state"], model["device"], len(model["copies"])) == ("ready", "cpu", 2)
    assert server.order("m", "unload") == 200
    model = server.get("/crane/models/m")[1]
    assert (model["state"], copies(server, "m")) == ("unloaded", {})
    environ = os.environ | {
        "CRANE_DATA_DIR": str(server.data_dir),
        "CRANE_MODELS": str(server.models),
    }
    flask = [sys.executable, "-m", "flask", "--app", "wsgi", "crane", "models"]
    for order in (["load", "m"], ["list"]):
        done = subprocess.run(
            [*flask, *order], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    assert "ready" in done.stdout
    assert len(copies(server, "m")) == 2


def test_pinned_models_stay_on_their_engines_and_return_with_them(engines):
    entries = [ECHO | {"id": name, "pinned": True} for name in "abc"]
    entries.append(ECHO | {"id": "everywhere", "pinned": True, "replicas": 2})
    server = engines(entries)
    assert [list(copies(server, name)) for name in ("a", "b", "c")] == [[0], [1], [0]]
    assert sorted(copies(server, "everywhere")) == [0, 1]
    before = [engine["pid"] for engine in engines_of(server)]
    os.kill(before[1], signal.SIGKILL)
    wait_for(lambda: engines_of(server)[1].get("pid") != before[1], 30, every_s=0.05)
    assert server.run("a")[0] == server.run("everywhere")[0] == 200  # the other goes on
    wait_for(
        lambda: server.get("/readyz")[0] == 200 and list(copies(server, "b")) == [1],
        30,
        every_s=0.05,
    )
    after = [engine["pid"] for engine in engines_of(server)]
    assert (after[0], after[1] != before[1]) == (before[0], True)
    assert server.run("b")[0] == 200


def test_an_engine_that_dies_takes_only_its_own_calls_with_it(engines):
    server = engines([ECHO | {"id": "a"}, ECHO | {"id": "b"}], CRANE_WORKERS=2)
    assert server.run("a")[0] == server.run("b")[0] == 200
    [of_a], [of_b] = copies(server, "a"), copies(server, "b")
    assert of_a != of_b
    with ThreadPoolExecutor(2) as threads:
        lost = threads.submit(server.run, "a", options={"delay_ms": 20_000})
        kept = threads.submit(server.run, "b", options={"delay_ms": 1500})
        wait_for(lambda: server.under_way("a") == server.under_way("b") == 1)
        os.kill(engines_of(server)[of_a]["pid"], signal.SIGKILL)
        status, answer = lost.result(15)
        assert (status, answer["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
        assert server.run("a")[0] == 200  # on the engine that is left
        assert kept.result()[0] == 200


def test_real_weights_go_where_room_is_and_answer_alike_on_every_engine(engines):
    # Revisions are another's weights for all that can be known; of each 91 MB are held.
    one, two = (MINILM | {"id": name, "revision": name} for name in ("one", "two"))
    server = engines([one | {"replicas": 2}, two], CRANE_MEMORY_BUDGET="240MB")
    assert server.run("two")[0] == server.run("one")[0] == 200
    assert [*copies(server, "two"), *copies(server, "one")] == [0, 1]
    assert server.order("one", "load") == 200
    assert (sorted(copies(server, "one")), copies(server, "two")) == ([0, 1], {})
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: server.run("one", "Cranes dance."), range(16)))
    assert [status for status, _ in answers] == [200] * 16
    first = answers[0][1]["output"]
    assert all(answer["output"] == pytest.approx(first, abs=1e-6) for _, answer in answers)
    held = [engine["memory"]["cpu"]["held_bytes"] for engine in engines_of(server)]
    assert held[0] == held[1] > 80 * MB


def test_a_model_that_does_not_load_is_not_tried_at_each_call(engines):
    server = engines([ECHO, MINILM | {"id": "broken", "device": "cuda:7"}])
    assert server.run("broken")[0] == 503
    assert server.run()[0] == 200  # so that there is more room on the other engine now
    answers = [server.run("broken") for _ in range(6)]
    assert [status for status, _ in answers] == [503] * 6
    assert len(server.log_lines(message="broken did not load")) == 1
