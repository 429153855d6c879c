"""Models that hang: they are given up from outside, and others are not."""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest

from backend.adapters.echo import Echo
from backend.config import Config
from backend.engine import libraries, supervisor, turns, watchdog
from backend.engine.calls import Answer, Call
from backend.engine.remote import RemoteEngine
from backend.errors import ModelUnavailable
from tests.conftest import ECHO, run, write_models
from tests.serving import wait_for
from tests.test_residency import state
from tests.test_wire import answers

TIMES = {"request_timeout_s": 0.2, "hang_timeout_s": 0.2, "load_timeout_s": 0.3}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("backend.engine.worker.FIRST_RETRY_S", 0.05)


@pytest.fixture
def hanging(make_app, add_task):
    """A client, and the gate at which the model waits in what ``hanging(name)`` names."""
    gates = []

    def make(name, **settings):
        gate = threading.Event()
        gates.append(gate)

        class Hangs(Echo):
            def stay(self, where):
                if where == name:
                    assert gate.wait(30)

            def load(self):
                self.stay("load")
                super().load()

            def unload(self):
                self.stay("unload")

            def predict(self, batch):
                self.stay("predict")
                return super().predict(batch)

        app = make_app([add_task("hangs", Hangs), ECHO], **{**TIMES, **settings})
        return app.test_client(), gate

    yield make
    for gate in gates:
        gate.set()


def submit(client, timeout_s):
    """A call whose caller has another deadline than the service's; what it is told, later."""
    told = SimpleQueue()
    engine = client.application.extensions["crane"].engine._engine
    about = {"options": {"delay_ms": 0}, "seeds": None, "timeout_s": timeout_s}
    engine.submit(Call(request_id="1", model_id="hangs", inputs=["hi"], **about), told.put)
    return told


@pytest.mark.parametrize("where", ["load", "predict", "unload"])
def test_a_model_that_hangs_is_given_up_and_comes_back_with_its_thread(hanging, where):
    client, gate = hanging(where)
    if where == "unload":
        assert run(client, "hangs").status_code == 200
        client.application.extensions["crane"].engine.control("unload", "hangs")
    else:
        assert run(client, "hangs").status_code in (503, 504)
    if where == "predict":
        queued = submit(client, timeout_s=60)
        assert isinstance(queued.get(timeout=20), ModelUnavailable)
    wait_for(lambda: state(client, "hangs") == "defunct")
    ready = client.get("/readyz")
    assert ready.status_code == 503
    [reason] = ready.json["reasons"]
    assert reason.startswith("hangs stopped working. hangs ")
    for _ in range(2):
        answer = run(client, "hangs")
        assert (answer.status_code, answer.json["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    wait_for(lambda: run(client).status_code == 200)  # it may have to load
    gate.set()
    wait_for(lambda: run(client, "hangs").status_code == 200)
    assert client.get("/readyz").status_code == 200


def test_who_waits_for_a_load_that_hangs_is_told_so(make_app, add_task, monkeypatch):
    monkeypatch.setattr(libraries, "GIVEN_UP_S", 0.2)
    gate = threading.Event()

    class Alone(Echo):
        loads_alone = True

        def load(self):
            assert self.spec.id == "late" or gate.wait(30)
            super().load()

    entry = add_task("hangs", Alone)
    app = make_app([entry, entry | {"id": "late"}], hang_timeout_s=0.2, load_timeout_s=0.3)
    client = app.test_client()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, client, "hangs")
        wait_for(lambda: libraries.alone.holder == "hangs")
        late = threads.submit(run, client, "late")
        for call, why in ((first, "hangs did not load"), (late, "the load of hangs hangs")):
            error = call.result(20).json["error"]
            assert error["code"] == "MODEL_UNAVAILABLE"
            assert why in error["message"]
    gate.set()
    for name in ("late", "hangs"):
        wait_for(lambda name=name: run(client, name).status_code == 200)


def test_a_model_whose_callers_wait_is_not_given_up(hanging):
    client, gate = hanging("predict")
    told = submit(client, timeout_s=60)
    wait_for(lambda: client.get("/crane/models/hangs").json["running"])
    looked = looks(client, 8)
    assert state(client, "hangs") == "ready", looked
    gate.set()
    assert isinstance(told.get(timeout=20), Answer)


def test_a_model_that_waits_for_its_turn_is_not_given_up(make_app, add_task):
    class Computes(Echo):
        def predict(self, batch):
            with turns.hold():
                return super().predict(batch)

    client = make_app([add_task("hangs", Computes)], **TIMES).test_client()
    assert run(client, "hangs").status_code == 200
    with ThreadPoolExecutor(1) as threads, turns.hold():
        late = threads.submit(run, client, "hangs")
        assert late.result().status_code == 504
        looks(client, 8)
        assert state(client, "hangs") == "ready"
    wait_for(lambda: run(client, "hangs").status_code == 200)


def test_a_model_that_asks_whether_its_callers_wait_is_not_given_up(make_app, add_task):
    runs, gate = SimpleQueue(), threading.Event()

    class Asks(Echo):
        def predict(self, batch):
            runs.put(batch)
            assert gate.wait(30)
            return super().predict(batch)

    times = {**TIMES, "hang_timeout_s": 0.6}
    client = make_app([add_task("hangs", Asks)], **times).test_client()
    assert run(client, "hangs").status_code == 504
    batch = runs.get(timeout=10)
    looks(client, 8, before=lambda: batch.cancelled(0))
    assert state(client, "hangs") == "ready"
    wait_for(lambda: state(client, "hangs") == "defunct")  # as it asks no more
    gate.set()


def looks(client, count, before=lambda: None):
    """Wait until the watchdog has looked so often; it gives up what is overdue after five."""
    seen = []
    pool = client.application.extensions["crane"].engine._engine._pool
    [worker] = [one for one in pool._workers.values() if one.model_id == "hangs"]
    check = worker.check
    worker.check = lambda: (before(), check(), seen.append(1))
    wait_for(lambda: len(seen) >= count)
    worker.check = check
    return seen


def test_a_fault_of_a_look_keeps_no_other_model_from_being_looked_at():
    seen = threading.Event()

    class Model:
        def __init__(self, check):
            self.check = check

    def fault():
        raise RuntimeError("a fault")

    dog = watchdog.Watchdog(lambda: [Model(fault), Model(seen.set)], grace_s=0.01)
    dog.start()
    dog.start()
    assert seen.wait(10)
    seen.clear()
    assert seen.wait(10)
    dog.end()


def test_an_engine_that_answered_and_no_longer_does_is_killed_and_replaced(monkeypatch):
    monkeypatch.setattr(supervisor, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(supervisor, "MIN_SILENCE_S", 0.1)
    engines, answered = [], []

    def look():
        """Each engine answers three times at first, and only the first one ever falls silent."""
        engine = keeper._engine
        if engine not in engines:
            engines.append(engine)
        if len(engines) == 1 and len(answered) >= 3:
            raise ModelUnavailable("The engine is too busy to say how it is.")
        answered.append(engine)

    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    keeper = supervisor.Supervisor(command, "cpu", look, hang_timeout_s=0.1)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        wait_for(lambda: len(engines) == 2 and len(answered) >= 20)
    finally:
        keeper.end()
        thread.join(10)
    assert not thread.is_alive()
    assert [one.returncode for one in engines] == [-signal.SIGKILL, 0]


def test_an_engine_that_is_still_starting_is_left_alone(monkeypatch):
    monkeypatch.setattr(supervisor, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(supervisor, "MIN_SILENCE_S", 0.01)
    looks = []

    def look():
        looks.append(keeper._engine)
        raise ModelUnavailable("The engine is not running.")

    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    keeper = supervisor.Supervisor(command, "cpu", look, hang_timeout_s=0.01)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        wait_for(lambda: len(looks) >= 20)
    finally:
        keeper.end()
        thread.join(10)
    assert len(set(looks)) == 1


def test_an_engine_that_cannot_be_started_is_tried_again(monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    keeper = supervisor.Supervisor(["/nowhere/python"], "cpu", lambda: None, hang_timeout_s=60)
    tries = []

    def start(start=keeper._start):
        tries.append(1)
        if len(tries) == 3:  # there is memory again, say
            keeper._command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        return start()

    monkeypatch.setattr(keeper, "_start", start)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        wait_for(lambda: keeper._engine is not None or not thread.is_alive())
    finally:
        keeper.end()
        thread.join(10)
    assert (len(tries), keeper._engine.returncode) == (3, 0)


def test_an_engine_that_ends_may_take_its_time(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(supervisor, "MIN_SILENCE_S", 0.01)
    looks, done = [], tmp_path / "done"

    def look():
        """As long as the engine is not to end, it answers."""
        looks.append(keeper._ending.is_set())
        if looks.count(True) == 20:
            done.touch()
        if looks[-1]:
            raise ModelUnavailable("The engine is not running.")

    code = (
        "import sys, time; from pathlib import Path; sys.stdin.read()\n"
        "while not Path(sys.argv[1]).exists(): time.sleep(0.01)"
    )
    command = [sys.executable, "-c", code, str(done)]
    keeper = supervisor.Supervisor(command, "cpu", look, hang_timeout_s=0.01)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        wait_for(lambda: looks)
    finally:
        keeper.end()
        thread.join(10)
    assert keeper._engine.returncode == 0


# Stops for good at its first start, before it has imported anything of ours.
STOPS_AT_ONCE = """
import os, pathlib, runpy, signal, sys
try:
    pathlib.Path(sys.argv.pop(1)).touch(exist_ok=False)
except FileExistsError:
    runpy.run_module("backend.engine.server", run_name="__main__")
else:
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_an_engine_that_hangs_as_it_starts_is_killed_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(supervisor, "MIN_SILENCE_S", 30)
    monkeypatch.setattr(supervisor, "START_S", -31)
    begun = tmp_path / "begun"
    settings = {
        "CRANE_MODELS": str(write_models(tmp_path, [ECHO])),
        "CRANE_ENGINE": "process",
        "CRANE_ENGINE_SOCKET": str(tmp_path / "engine.sock"),
        "CRANE_DEVICES": "cpu",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    remote = RemoteEngine(Config.from_env(), start_s=0)
    command = [sys.executable, "-c", STOPS_AT_ONCE, str(begun), "0"]
    keeper = supervisor.Supervisor(command, "cpu", remote.look, hang_timeout_s=0.1)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        wait_for(begun.exists, 60)
        assert keeper._engine.wait(20) == -signal.SIGKILL
        monkeypatch.setattr(supervisor, "START_S", 60)  # for the next ones, which are sound
        wait_for(lambda: answers(remote), 60)
    finally:
        for name in settings:
            monkeypatch.delenv(name)
        keeper.end()
        thread.join(30)
    assert not thread.is_alive()
