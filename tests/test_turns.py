"""Models that share a CPU compute in turns, and an idle one costs the others nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import psutil
import pytest

from backend.adapters import packing, slot_trial
from backend.adapters.base import Prediction
from backend.adapters.echo import Echo
from backend.engine import turns
from backend.engine.calls import Call, Event
from backend.engine.turns import Turns
from backend.errors import DeadlineExceeded
from tests.checkpoints import checkpoint
from tests.conftest import run
from tests.serving import wait_for

__all__ = ["checkpoint"]
LONG_S = 30


@pytest.fixture
def patient(monkeypatch):
    """No turn is taken from whoever has it, and each offer is one in earnest."""
    monkeypatch.setattr(turns, "OVERDUE_S", 1e9)
    monkeypatch.setattr(turns, "SLICE_S", 0.0)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def waiting(own, count):
    wait_for(lambda: len(own._line) == count)


def test_one_thread_has_the_turn_at_a_time(threads):
    own, inside, most, at_once = Turns(), [], [], threading.Barrier(8)

    def compute():
        at_once.wait()
        for _ in range(20):
            with own.hold():
                inside.append(1)
                most.append(len(inside))
                own.offer()
                inside.pop()

    for done in [threads.submit(compute) for _ in range(8)]:
        done.result(LONG_S)
    assert set(most) == {1}


def test_threads_have_their_turns_in_the_order_in_which_they_came(threads):
    own, order, done = Turns(), [], []

    def compute(name):
        with own.hold():
            order.append(name)

    with own.hold():
        for name in range(6):
            done.append(threads.submit(compute, name))
            waiting(own, name + 1)
    for one in done:
        one.result(LONG_S)
    assert order == list(range(6))


def in_line(own, threads, who, order, done):
    """Have a thread wait for its turn that works for callers."""

    def compute():
        with own.hold(callers=lambda: who):
            order.append("".join(who))

    count = len(own._line)
    done.append(threads.submit(compute))
    waiting(own, count + 1)


@pytest.mark.parametrize(
    ("first", "line", "order"),
    [
        pytest.param("a", ["a", "a", "b", "c"], ["b", "c", "a", "a"], id="others first"),
        pytest.param("a", ["ab", "b", "a"], ["ab", "b", "a"], id="who shares a run with others"),
        pytest.param("", ["a", "", "b"], ["a", "", "b"], id="nobody knows for whom"),
    ],
)
def test_callers_have_their_turns_one_after_another(threads, first, line, order):
    own, seen, done = Turns(), [], []
    with own.hold(callers=lambda: first):
        for who in line:
            in_line(own, threads, who, seen, done)
    for one in done:
        one.result(LONG_S)
    assert seen == order


def test_new_callers_keep_nobody_waiting(threads):
    own, seen, done = Turns(), [], []
    with own.hold(callers=lambda: "a"):
        in_line(own, threads, "a", seen, done)
        for new in "bcd":  # each of whom has another behind it before its turn ends

            def compute(new=new):
                with own.hold(callers=lambda: new):
                    seen.append(new)
                    in_line(own, threads, new.upper(), seen, done)

            done.append(threads.submit(compute))
            waiting(own, len(done))
    wait_for(lambda: len(done) == 7)
    for one in done:
        one.result(LONG_S)
    assert seen.index("a") == 3


@pytest.mark.usefixtures("patient")
def test_one_callers_many_models_leave_another_the_next_turn(make_app, add_task, threads):
    begun, go, order = threading.Event(), threading.Event(), []

    class Computes(Echo):
        takes_turns = True

        def predict(self, batch):
            order.append(self.spec.id)
            if self.spec.id == "m0":
                begun.set()
                assert go.wait(LONG_S)
            return super().predict(batch)

    app = make_app([add_task(f"m{number}", Computes) for number in range(4)], auth="off")

    def call(model_id, address):
        client = app.test_client()
        caller = {"REMOTE_ADDR": address}
        body = {"model_id": model_id, "input": 1}
        return client.post("/crane/run", json=body, environ_overrides=caller).status_code

    done = [threads.submit(call, "m0", "192.0.2.1")]
    assert begun.wait(LONG_S)
    for number, address in enumerate(["192.0.2.1", "192.0.2.1", "192.0.2.2"], 1):
        done.append(threads.submit(call, f"m{number}", address))
        waiting(turns._turns, number)
    go.set()
    assert [one.result(LONG_S) for one in done] == [200] * 4
    assert order == ["m0", "m3", "m1", "m2"]


@pytest.mark.usefixtures("patient")
def test_who_offers_its_turn_has_it_again_after_those_who_waited(threads):
    own, order = Turns(), []

    def compute(name):
        with own.hold():
            order.append(name)

    with own.hold():
        done = [threads.submit(compute, name) for name in "ab"]
        waiting(own, 2)
        own.offer()
        order.append("back")
        own.offer()
    assert sorted(order[:2]) == ["a", "b"]
    assert order[2:] == ["back"]
    for one in done:
        one.result(LONG_S)


def test_a_short_turn_is_not_handed_over(threads, monkeypatch):
    monkeypatch.setattr(turns, "SLICE_S", 1e9)
    own, order = Turns(), []

    def compute():
        with own.hold():
            order.append("other")

    with own.hold():
        done = threads.submit(compute)
        waiting(own, 1)
        own.offer()
        order.append("first")
    done.result(LONG_S)
    assert order == ["first", "other"]


@pytest.mark.usefixtures("patient")
def test_what_needs_no_turn_waits_for_none(threads):
    own = Turns()

    def compute():
        own.offer()
        with own.hold("cuda:0"):
            own.offer()

    with own.hold():
        threads.submit(compute).result(LONG_S)
        with own.hold():  # within a hold
            pass
        waits = threads.submit(lambda: own.hold().__enter__())
        waiting(own, 1)  # so the inner one has not handed it over
    waits.result(LONG_S)


def test_a_turn_ends_with_its_error(threads):
    own = Turns()

    def fail():
        with own.hold():
            raise ValueError("so it goes")

    assert isinstance(threads.submit(fail).exception(LONG_S), ValueError)
    with own.hold():
        pass


def test_whoever_waits_is_known(threads):
    own, seen = Turns(), []

    def compute():
        seen.append(threading.current_thread())
        with own.hold():
            pass

    with own.hold():
        done = threads.submit(compute)
        waiting(own, 1)
        assert own.is_waiting(seen[0])
        assert not own.is_waiting(threading.current_thread())
    done.result(LONG_S)
    assert not own.is_waiting(seen[0])


@pytest.mark.parametrize("comes_back", ["offers", "ends", "never"])
def test_a_step_that_takes_too_long_holds_nobody_up(threads, monkeypatch, comes_back):
    monkeypatch.setattr(turns, "OVERDUE_S", 0.05)
    monkeypatch.setattr(turns, "CHECK_S", 0.02)
    own, end, goes_on, order = Turns(), threading.Event(), threading.Event(), []

    def hang():
        with own.hold():
            order.append("hangs")
            assert end.wait(LONG_S)
            if comes_back == "offers":
                own.offer()
                order.append("is back")

    def compute():
        with own.hold():
            order.append("computes")
            monkeypatch.setattr(turns, "OVERDUE_S", 1e9)  # for this one
            if comes_back == "offers":
                end.set()
                waiting(own, 1)
            assert goes_on.wait(LONG_S)
            order.append("ends")

    hangs = threads.submit(hang)
    wait_for(lambda: order)
    computes = threads.submit(compute)
    wait_for(lambda: "computes" in order)
    if comes_back == "ends":  # and does not give away what it no longer has
        end.set()
        hangs.result(LONG_S)
        last = threads.submit(lambda: own.hold().__enter__())
        waiting(own, 1)
    goes_on.set()
    computes.result(LONG_S)
    end.set()
    hangs.result(LONG_S)
    if comes_back == "ends":
        last.result(LONG_S)
    assert order == ["hangs", "computes", "ends", *(["is back"] if comes_back == "offers" else [])]


# OpenMP


def native_threads():
    """Those of this process that Python has not started."""
    return psutil.Process().num_threads() - threading.active_count()


def multiply():
    """Something that OpenMP's threads have a part in."""
    import torch

    torch.set_num_threads(2)
    return torch.ones(256, 4096).relu().sum().item()


@pytest.fixture
def alone(threads):
    """How many native threads there are without a team; PyTorch has some of its own."""

    def compute():
        multiply()
        turns.end_team()

    threads.submit(compute).result(LONG_S)
    counts = []

    def settled():
        counts.append(native_threads())
        return len(counts) > 20 and len(set(counts[-20:])) == 1

    wait_for(settled)
    return counts[-1]


@pytest.mark.parametrize("ends", ["its turn", "the offer of its turn"])
@pytest.mark.usefixtures("patient")
def test_whoever_hands_over_has_ended_its_team(threads, alone, ends):
    own, seen = Turns(), []

    def compute():
        with own.hold():
            wait_for(lambda: native_threads() == alone)

    def compute_first():
        with own.hold():
            multiply()
            seen.append(native_threads())
            other = threads.submit(compute)
            waiting(own, 1)
            if ends == "the offer of its turn":
                own.offer()
        other.result(LONG_S)

    threads.submit(compute_first).result(LONG_S)
    assert seen[0] > alone


class Multiplies(Echo):
    takes_turns = True

    def predict(self, batch):
        return [Prediction(multiply()) for _ in batch.inputs]


class MultipliesAsItLoads(Multiplies):
    def load(self):
        super().load()
        multiply()

    def predict(self, batch):
        return [Prediction(1) for _ in batch.inputs]


def test_an_idle_model_has_no_team(make_app, add_task, alone):
    app = make_app([add_task("multiplies", Multiplies)])
    assert run(app.test_client(), "multiplies").status_code == 200
    wait_for(lambda: native_threads() == alone)


def test_a_model_that_has_loaded_and_waits_for_its_turn_has_no_team(
    make_app, add_task, threads, alone
):
    app = make_app([add_task("multiplies", MultipliesAsItLoads)])
    with turns.hold():
        done = threads.submit(run, app.test_client(), "multiplies")
        waiting(turns._turns, 1)
        wait_for(lambda: native_threads() == alone)
    assert done.result(LONG_S).status_code == 200


# Models


class Steps(Echo):
    """Computes until its input is let go."""

    takes_turns = True
    begun, go = threading.Event(), threading.Event()

    def predict(self, batch):
        if batch.inputs == ["long"]:
            self.begun.set()
            until = time.monotonic() + LONG_S
            while not self.go.is_set() and time.monotonic() < until:
                batch.abandoned()
        return super().predict(batch)


@pytest.mark.usefixtures("patient")
def test_a_model_is_not_kept_waiting_by_anothers_long_run(make_app, add_task, threads):
    app = make_app([add_task("long", Steps), add_task("short", Steps)])
    Steps.begun.clear()
    Steps.go.clear()
    long = threads.submit(run, app.test_client(), "long", "long")
    assert Steps.begun.wait(LONG_S)
    assert run(app.test_client(), "short").status_code == 200
    assert not long.done()
    Steps.go.set()
    assert long.result(LONG_S).status_code == 200


@pytest.mark.usefixtures("patient")
def test_texts_that_are_written_keep_no_other_model_waiting(make_app, add_task, checkpoint):
    entry = {"id": "writer", "type": "text-generation", "hf_model": checkpoint("llama_without_end")}
    app = make_app([entry | {"max_batch_size": 1}, add_task("short", Steps)], dtype="float32")
    options = run(app.test_client(), "writer", "x").json["metadata"]["options"] | {"max_tokens": 50}
    told = SimpleQueue()
    call = Call(
        request_id="r",
        model_id="writer",
        inputs=["the river"] * 100,  # one after another, in one run
        options=options,
        seeds=None,
        timeout_s=LONG_S,
        stream=True,
    )
    job = app.extensions["crane"].engine._engine.submit(call, told.put)
    assert told.get(timeout=LONG_S).kind == "start"
    assert run(app.test_client(), "short").status_code == 200
    job.cancel()
    while isinstance(ended := told.get(timeout=LONG_S), Event):
        pass
    assert isinstance(ended, DeadlineExceeded)  # which it would not be, had it been done


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(lambda model: packing.Packing(model.bfloat16()), id="packing"),
        pytest.param(slot_trial.layout_of, id="trial"),
        pytest.param(lambda model: packing._pays.__wrapped__(1), id="probe"),
    ],
)
def test_what_a_load_computes_waits_for_its_turn(checkpoint, threads, compute):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    slot_trial._TRIED.clear()
    with turns.hold():
        done = threads.submit(compute, model)
        waiting(turns._turns, 1)
    done.result(LONG_S)


class WaitsInItsLoad(Steps):
    def load(self):
        self.begun.set()
        assert self.go.wait(LONG_S)
        super().load()


@pytest.mark.usefixtures("patient")
def test_a_long_load_keeps_no_other_model_waiting(make_app, add_task, threads):
    app = make_app([add_task("loads", WaitsInItsLoad), add_task("short", Steps)])
    Steps.begun.clear()
    Steps.go.clear()
    loads = threads.submit(run, app.test_client(), "loads")
    assert Steps.begun.wait(LONG_S)
    assert run(app.test_client(), "short").status_code == 200
    Steps.go.set()
    assert loads.result(LONG_S).status_code == 200
