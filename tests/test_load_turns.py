"""Loads of several callers: each caller has its turn, however many models another calls."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend.adapters.echo import Echo
from backend.engine import libraries
from backend.engine.calls import Call
from backend.engine.load_turns import LoadTurns
from tests.serving import wait_for

MB = 1_000_000


class Waiting:
    def __init__(self, name, *callers):
        self.name, self.callers = name, callers


def order(*waiting, turns=None):
    """In which order loads begin that all wait at first."""
    turns, left, names = turns or LoadTurns(), list(waiting), []
    while left:
        first = turns.first(left)
        left.remove(first)
        turns.begins(first)
        names.append(first.name)
    return "".join(names)


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        (["a1", "a1", "a1"], "aaa"),
        (["a1", "b1", "c1", "d2"], "adbc"),
        (["a1", "b1", "c2", "d1", "e2"], "acbed"),
        (["a1", "b1", "c12"], "acb"),  # for it a second caller waits, who has no other
        (["a1", "b", "c1"], "abc"),  # which was ordered, and nobody waits for
    ],
)
def test_callers_have_their_loads_in_turn(waiting, expected):
    assert order(*(Waiting(one[0], *one[1:]) for one in waiting)) == expected


def test_who_comes_later_comes_after_those_who_wait_already():
    turns = LoadTurns()
    one, two, three = (Waiting(name, "a") for name in ("one", "two", "three"))
    turns.begins(turns.first([one, two, three]))
    late = Waiting("late", "b")
    assert turns.first([two, three, late]) is two
    turns.begins(two)
    assert turns.first([three, late, Waiting("latest", "c")]) is late


def test_callers_who_wait_no_more_are_forgotten():
    turns = LoadTurns()
    for number in range(100):
        load = Waiting("one", f"caller {number}")
        turns.first([load])
        turns.begins(load)
    assert len(turns._order) <= 2


@pytest.mark.parametrize("line", ["loads", "memory"])
def test_nobodys_load_waits_for_all_of_another_callers(make_app, add_task, line):
    loads, gate, began = [], threading.Event(), threading.Event()

    class Slow(Echo):
        loads_alone = line == "loads"

        def place(self):
            return "cpu", 0 if line == "loads" else MB

        def footprint(self):
            return self.place()[1]

        def load(self):
            loads.append(self.spec.id)
            began.set()
            assert gate.wait(30)
            super().load()

    names = [f"m{number}" for number in range(6)]
    entries = [add_task("slow", Slow) | {"id": name} for name in [*names, "other"]]
    app = make_app(entries, memory_budget=MB)
    engine = app.extensions["crane"].engine

    def run(name, caller):
        about = {"options": {"delay_ms": 0}, "seeds": None, "timeout_s": 60, "keep_alive_s": 0}
        engine.run(Call(request_id="1", model_id=name, inputs=["hi"], caller=caller, **about))

    def waiting():
        if line == "loads":
            return len(libraries.alone._line)
        return len(engine._engine._pool._residency._line)

    with ThreadPoolExecutor(7) as threads:
        calls = [threads.submit(run, "m0", "greedy")]
        assert began.wait(10)
        calls += [threads.submit(run, name, "greedy") for name in names[1:]]
        wait_for(lambda: waiting() == 5)
        calls.append(threads.submit(run, "other", "other"))
        wait_for(lambda: waiting() == 6)
        gate.set()
        for call in calls:
            call.result(30)
    assert sorted(loads) == sorted([*names, "other"])
    assert loads.index("other") <= 2  # after the load that was going on, and one more
