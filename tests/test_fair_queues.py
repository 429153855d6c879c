"""One caller's flood does not stand before another's call: through the engine, callers by name."""

from __future__ import annotations

from queue import SimpleQueue

import pytest

from backend.adapters.echo import Echo
from backend.engine.calls import Answer, Call
from backend.errors import Overloaded
from tests.serving import wait_for
from tests.test_engine import gate

__all__ = ["gate"]

WAIT_S = 30


class Caller:
    def __init__(self, app, name):
        self._engine = app.extensions["crane"].engine._engine
        self._name = name

    def send(self, *inputs, model_id="gated"):
        """Queue a call; what it is told of its end."""
        told = SimpleQueue()
        call = Call(
            request_id="r",
            model_id=model_id,
            inputs=list(inputs),
            options={"delay_ms": 0},
            seeds=None,
            timeout_s=WAIT_S,
            caller=self._name,
        )
        self._engine.submit(call, told.put)
        return told


@pytest.fixture
def runs():
    """The inputs of each run, after the first one's, which waits at the gate."""
    return []


@pytest.fixture
def gated(add_task, gate, runs):
    class Gated(Echo):
        max_batch_tokens, max_cpu_tokens = 10_000, 800

        def size(self, value, options):
            return len(value)

        def predict(self, batch):
            if batch.inputs == ["first"]:
                gate.pass_through(batch)
            else:
                runs.append(batch.inputs)
            return super().predict(batch)

    return add_task("gated", Gated)


def test_a_callers_long_inputs_do_not_stand_before_anothers_short_one(make_app, gated, gate, runs):
    app = make_app([gated])
    flood, other = Caller(app, "flood"), Caller(app, "other")
    first = flood.send("first")
    gate.wait_until_busy()
    long = flood.send(*["x" * 400] * 12)
    short = other.send("short")
    gate.open()
    for told in (first, long, short):
        assert isinstance(told.get(timeout=WAIT_S), Answer)
    assert runs[0] == ["x" * 400] * 2  # whose turn it was, by the limit of tokens
    assert runs[1] == ["short"]
    assert runs[2:] == [["x" * 400] * 2] * 5


def test_who_comes_between_two_runs_of_a_call_has_the_next_but_one(make_app, gated, gate, runs):
    app = make_app([gated])
    flood, other = Caller(app, "flood"), Caller(app, "other")
    # Of two lengths, so that they run apart; the first one waits at the gate.
    long = flood.send("first", *["x" * 800] * 4)
    gate.wait_until_busy()
    short = other.send("short")
    gate.open()
    for told in (long, short):
        assert isinstance(told.get(timeout=WAIT_S), Answer)
    assert runs == [["x" * 800], ["short"], *[["x" * 800]] * 3]


def test_a_full_queue_makes_room_for_whoever_has_less_in_it(make_app, gated, gate):
    app = make_app([gated], queue_size=4, max_batch=4)
    flood, other = Caller(app, "flood"), Caller(app, "other")
    first = flood.send("first")
    gate.wait_until_busy()
    stays, pushed_out = flood.send("a", "b"), flood.send("c", "d")
    with pytest.raises(Overloaded):  # its own calls do not push each other out
        flood.send("e")
    comes = other.send("f")
    refusal = pushed_out.get(timeout=WAIT_S)
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_after_s
    wait_for(lambda: app.extensions["crane"].engine.status()["models"]["gated"]["queue"] == 3)
    gate.open()
    for told in (first, stays, comes):
        assert isinstance(told.get(timeout=WAIT_S), Answer)
