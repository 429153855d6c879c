"""Quotas, by one suite on a real Valkey, on SQLite and in memory."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from backend.quota.decisions import PARTS, Call
from backend.quota.memory import MemoryStore
from backend.quota.redis import RedisStore
from backend.quota.sqlite import BUSY_TIMEOUT_S, SqliteStore
from backend.quota.tiers import UNIT, tiers
from tests.valkey import Valkey

FREE = tiers("free 5/minute concurrency=3")["free"]
WIDE = tiers("free 5/minute concurrency=1000")["free"]
BUDGETED = tiers("free 5/minute concurrency=100 budget=7/day")["free"]


class Clock:
    def __init__(self):
        self.seconds = 1_000_000.0

    def __call__(self):
        return self.seconds


@pytest.fixture(scope="module")
def valkey():
    server = Valkey().start()
    yield server
    server.remove()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["redis", "sqlite", "memory"])
def make_store(request, tmp_path):
    """Open the store once more, as another process would: with the test's clock, or its own."""
    if request.param == "redis":
        valkey = request.getfixturevalue("valkey")
        valkey.client().flushall()
    opened = []

    def make(now=None):
        if request.param == "redis":
            store = RedisStore(valkey.url, now=now)
        elif request.param == "memory":
            store = MemoryStore(now=now or time.time)
        else:
            store = SqliteStore(tmp_path / "quota.db", now=now or time.time)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def often():
    """Threads that have the interpreter for a moment at a time: each may come between all."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.fixture
def store(make_store, clock):
    return make_store(clock)


def call(lease="a", *, tier=WIDE, cost=UNIT, subject="someone", lease_ms=45_000, ended=()):
    return Call(subject, tier, lease, cost, lease_ms, ended)


def admitted(store, count, **how):
    """How many of ``count`` calls, one after another, are let in."""
    leases = [f"lease-{os.getpid()}-{number}" for number in range(count)]
    decisions = [store.spend(call(lease, **how)) for lease in leases]
    return sum(decision.refused_by is None for decision in decisions)


def test_as_many_are_let_in_as_the_rate_says(store):
    assert admitted(store, 8) == 5


def test_callers_do_not_share_what_is_theirs(store):
    assert admitted(store, 8, subject="one") == 5
    assert admitted(store, 8, subject="another") == 5


def test_a_refusal_says_when_and_takes_nothing(store, clock):
    for number in range(5):
        store.spend(call(f"lease-{number}"))
        clock.seconds += 2
    refused = store.spend(call("late"))
    # The first of the five, 10 s ago, is forgotten 50 s from now.
    assert (refused.refused_by, refused.retry_after_ms) == ("rate", 50_000)
    assert refused.left == (0,)
    for _ in range(20):
        store.spend(call("late"))
    clock.seconds += 49.999
    assert store.spend(call("late")).refused_by == "rate"
    clock.seconds += 0.001
    assert store.spend(call("late")).refused_by is None


def test_no_window_wherever_it_begins_holds_more_than_the_limit(store, clock):
    let_in = []
    chance = random.Random(7)
    for number in range(600):
        clock.seconds += chance.choice([0, 0.2, 0.9, 1.1, 5])
        if store.spend(call(f"lease-{number}")).refused_by is None:
            let_in.append(clock.seconds)
    for first, sixth in zip(let_in, let_in[5:], strict=False):
        assert sixth - first > 59.998  # but for how a float is cut to milliseconds
    # And at most a sixtieth of a window is lost to it.
    assert len(let_in) >= 5 * (let_in[-1] - let_in[0]) / (60 + 60 / PARTS + 5) - 5


def test_a_call_may_cost_more_or_less_than_a_unit(store):
    assert store.spend(call("a", cost=2500)).left == (2500,)
    assert store.spend(call("b", cost=2501)).refused_by == "rate"
    assert store.spend(call("c", cost=2500)).left == (0,)
    assert store.spend(call("d", cost=1)).refused_by == "rate"
    assert store.spend(call("e", cost=0)).refused_by is None


def test_what_costs_more_than_the_limit_is_refused_for_a_window(store):
    decision = store.spend(call(cost=5001))
    assert (decision.refused_by, decision.retry_after_ms) == ("rate", 60_000)


def test_as_many_run_at_once_as_the_tier_says(store):
    assert admitted(store, 5, tier=FREE) == 3
    refused = store.spend(call("one more", tier=FREE))
    assert (refused.refused_by, refused.running, refused.left) == ("concurrency", 3, (2000,))
    store.settle(call(f"lease-{os.getpid()}-1", tier=FREE), UNIT)
    assert store.spend(call("one more", tier=FREE)).refused_by is None


def test_a_lease_ends_by_itself(store, clock):
    assert admitted(store, 3, tier=FREE, lease_ms=10_000) == 3
    clock.seconds += 9.999
    assert store.spend(call("more", tier=FREE)).refused_by == "concurrency"
    clock.seconds += 0.001
    assert store.spend(call("more", tier=FREE)).refused_by is None


@pytest.mark.parametrize(("settled", "left"), [(0, 5000), (1000, 4000), (3000, 2000), (4500, 500)])
def test_a_call_costs_what_it_came_to(store, settled, left):
    store.spend(call(cost=3000))
    standing = store.settle(call(cost=3000), settled)
    assert (standing.left, standing.running) == ((left,), 0)
    if settled == 0:
        assert standing.reset_ms == (0,)


def test_a_lease_is_settled_once(store):
    store.spend(call(cost=3000))
    store.spend(call("other", cost=2000))
    for _ in range(3):
        standing = store.settle(call(cost=3000), 0)
    assert standing.left == (3000,)


def test_a_call_that_came_to_more_is_paid_for_before_the_next(store, clock):
    store.spend(call(cost=1000))
    assert store.settle(call(cost=1000), 9000).left == (0,)
    assert store.spend(call("next", cost=0)).refused_by == "rate"
    clock.seconds += 60
    assert store.spend(call("next")).left == (4000,)


@pytest.mark.parametrize("late", [0, 2_000, 61_000], ids=["at-once", "later", "much-later"])
def test_a_call_that_is_let_in_can_hold_more(store, clock, late):
    admitted_call = call("a", lease_ms=100_000)
    store.spend(admitted_call)
    clock.seconds += late / 1000
    raised = admitted_call.raised(4000)
    held = store.reserve(admitted_call, raised)
    assert (held.refused_by, held.left, held.running) == (None, (1000,), 1)
    # All of it counts from now on, whatever was forgotten of the first.
    clock.seconds += 59
    assert store.look("someone", WIDE).left == (1000,)
    assert store.settle(raised, 500).left == (4500,)
    assert store.look("someone", WIDE).running == 0


def test_what_cannot_be_held_is_refused_and_changes_nothing(store, clock):
    store.spend(call("earlier", cost=2000))
    clock.seconds += 20
    store.spend(call("a"))
    refused = store.reserve(call("a"), call("a").raised(3001))
    # When the first is forgotten, there are 3001 beside the unit that this one has spent.
    assert (refused.refused_by, refused.retry_after_ms) == ("rate", 40_000)
    assert (refused.left, refused.running) == ((2000,), 2)
    assert store.reserve(call("a"), call("a").raised(3000)).left == (0,)


def test_a_step_that_is_sent_twice_is_done_once(store):
    first = call("a", cost=2000)
    raised = first.raised(2500)  # for which there is enough twice
    for _ in range(2):
        assert store.spend(first).left == (3000,)
    for _ in range(2):
        assert store.reserve(first, raised).left == (2500,)
    for _ in range(2):
        assert store.settle(raised, 1000).left == (4000,)


@pytest.mark.parametrize("arrived", [False, True])
def test_whoever_lost_the_answer_to_a_reserve_can_settle_both(store, arrived):
    first = call("a", cost=2000)
    raised = first.raised(3000)
    store.spend(first)
    if arrived:
        store.reserve(first, raised)
    for one in (first, raised):
        store.settle(one, 0)
    standing = store.look("someone", WIDE)
    assert (standing.left, standing.running) == ((5000,), 0)


def test_what_a_call_came_to_beside_is_spent_when_it_is_settled(store, clock):
    store.spend(call("a", lease_ms=100_000))
    clock.seconds += 61  # the unit is forgotten, and the rest must not be
    assert store.settle(call("a", lease_ms=100_000), 4000).left == (2000,)
    clock.seconds += 59
    assert store.look("someone", WIDE).left == (2000,)


def test_a_refund_is_of_the_calls_own_time(store, clock):
    store.spend(call("first", cost=2000))
    clock.seconds += 30
    store.spend(call("second", cost=3000))
    assert store.settle(call("first", cost=2000), 0).left == (2000,)
    clock.seconds += 31  # the first would have been forgotten now, and the second not
    assert store.look("someone", WIDE).left == (2000,)


def test_a_refund_past_the_window_changes_nothing(store, clock):
    store.spend(call("first", lease_ms=100_000))
    clock.seconds += 70
    store.spend(call("second", cost=3000))
    assert store.settle(call("first"), 0).left == (2000,)


def test_the_budget_counts_beside_the_rate(store, clock):
    assert admitted(store, 6, tier=BUDGETED) == 5
    clock.seconds += 60
    decisions = [store.spend(call(f"more-{number}", tier=BUDGETED)) for number in range(3)]
    assert [decision.refused_by for decision in decisions] == [None, None, "budget"]
    assert decisions[-1].left == (3000, 0)
    # A budget comes back in sixtieths of a day: all seven were spent within one.
    assert decisions[-1].retry_after_ms == 86_400_000
    clock.seconds += 86_400
    assert store.spend(call("next day", tier=BUDGETED)).refused_by is None


def test_where_both_are_spent_the_longer_wait_is_told(store):
    tier = tiers("free 5/minute budget=5/day")["free"]
    assert admitted(store, 5, tier=tier) == 5
    assert store.spend(call("late", tier=tier)).refused_by == "budget"


def test_looking_changes_nothing(store, clock):
    store.spend(call())
    clock.seconds += 10
    for _ in range(3):
        standing = store.look("someone", WIDE)
        assert (standing.left, standing.reset_ms, standing.running) == ((4000,), (50_000,), 1)
    nobody = store.look("nobody", BUDGETED)
    assert (nobody.left, nobody.reset_ms, nobody.running) == ((5000, 7000), (0, 0), 0)


def test_another_rate_begins_anew_and_keeps_the_calls_inside(store):
    store.spend(call("a"))
    hourly = tiers("free 5/hour")["free"]
    standing = store.spend(call("b", tier=hourly))
    assert (standing.left, standing.running) == ((4000,), 2)


def test_a_clock_that_is_set_back_gives_nothing_away(store, clock):
    assert admitted(store, 5) == 5
    clock.seconds -= 3600
    refused = store.spend(call("late"))
    assert (refused.refused_by, refused.retry_after_ms) == ("rate", 60_000)


def test_leases_end_with_what_their_caller_does_next(store):
    tier = tiers("free 5/minute concurrency=3")["free"]
    for number in range(3):
        store.spend(call(str(number), tier=tier))
    store.spend(call("0", tier=tier, subject="another"))
    spent = store.spend(call("3", tier=tier, ended=("0", "1", "unknown")))
    assert (spent.refused_by, spent.running, spent.left) == (None, 2, (1000,))
    # Also where it is refused itself, for these are over.
    refused = store.spend(call("4", tier=tier, cost=9 * UNIT, ended=("2",)))
    assert (refused.refused_by, refused.running) == ("rate", 1)
    assert store.look("another", tier).running == 1


def test_the_stores_agree_on_thousands_of_random_steps(valkey, tmp_path, clock):
    valkey.client().flushall()
    stores = [
        RedisStore(valkey.url, now=clock),
        SqliteStore(tmp_path / "quota.db", now=clock),
        MemoryStore(now=clock),
    ]
    kinds = "free 7/second concurrency=3 budget=40/day, some 5/minute concurrency=4, more 9/second"
    kinds = list(tiers(kinds).values())
    chance = random.Random(5)
    inside, refused = [], Counter()
    for step in range(6000):
        clock.seconds += chance.choice([0, 0.001, 0.01, 0.1, 1, 7, -0.5, 90_000 * (step % 97 == 0)])
        tier, subject = chance.choice(kinds), chance.choice("ab")
        kind = chance.random()
        if kind < 0.5 or not inside:
            cost, lease_ms = chance.choice([0, 500, 1000, 3000, 9000]), chance.choice([500, 50_000])
            ended = tuple(one.lease for one in inside[: chance.choice([0, 0, 0, 2])])
            one = Call(subject, tier, f"lease-{step}", cost, lease_ms, ended)
            decisions = [store.spend(one) for store in stores]
            if decisions[0].refused_by is None:
                inside.append(one)
        elif kind < 0.7:
            place = chance.randrange(len(inside))
            raised = inside[place].raised(chance.choice([0, 700, 2000, 5000, 20_000]))
            decisions = [store.reserve(inside[place], raised) for store in stores]
            if decisions[0].refused_by is None:
                inside[place] = raised
        elif kind < 0.9:
            one = inside.pop(chance.randrange(len(inside)))
            if chance.random() < 0.1:
                inside.append(one)  # to be settled twice
            cost = chance.choice([0, one.cost, one.cost + 700, one.cost // 2])
            decisions = [store.settle(one, cost) for store in stores]
        else:
            decisions = [store.look(subject, tier) for store in stores]
        refused[kind < 0.5] += decisions[0].refused_by is not None
        assert decisions == [decisions[0]] * 3, f"step {step}"
    assert refused[True] > 500
    assert refused[False] > 100
    for store in stores:
        store.close()


def race(make, at_once, subjects, results):
    at_once.wait(30)  # before the file is made, too
    store = make()
    for subject in subjects:
        at_once.wait(30)
        results.put((subject, admitted(store, 4, subject=subject)))
    store.close()


@pytest.mark.parametrize("kind", ["redis", "sqlite"])
def test_eight_processes_that_race_are_let_in_exactly_as_often_as_the_rate_says(
    kind, valkey, tmp_path
):
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "quota.db"
    make = (lambda: RedisStore(valkey.url)) if kind == "redis" else (lambda: SqliteStore(path))
    subjects = [f"race-{number}" for number in range(20)]
    at_once, results = fork.Barrier(8), fork.Queue()
    racers = [
        fork.Process(target=race, args=(make, at_once, subjects, results), daemon=True)
        for _ in range(8)
    ]
    for racer in racers:
        racer.start()
    let_in = dict.fromkeys(subjects, 0)
    for _ in range(8 * len(subjects)):
        subject, count = results.get(timeout=60)
        let_in[subject] += count
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    assert let_in == dict.fromkeys(subjects, 5)


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 100])
def test_processes_that_have_but_their_memory_pass_no_limit_by_a_unit_each(clock, processes):
    stores = [MemoryStore(processes, now=clock) for _ in range(processes)]
    let_in = sum(admitted(store, 8, tier=WIDE) for store in stores)
    assert 5 <= let_in < 5 + processes


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_nor_do_they_have_more_calls_at_once(clock, processes):
    stores = [MemoryStore(processes, now=clock) for _ in range(processes)]
    let_in = sum(
        admitted(store, 8, tier=tiers("free 100/minute concurrency=3")["free"]) for store in stores
    )
    assert 3 <= let_in < 3 + processes


def test_callers_of_whom_nothing_is_left_leave_the_memory(clock):
    store = MemoryStore(now=clock)
    for number in range(50):
        store.spend(call(subject=f"passer-by {number}"))
        store.look(f"stranger {number}", WIDE)
    assert len(store) == 50
    clock.seconds += 3600
    store.spend(call(subject="someone else"))
    assert len(store) == 1


@pytest.mark.usefixtures("often")
def test_threads_that_race_take_exactly_the_places_there_are(make_store):
    store = make_store()
    at_once = Barrier(16)

    def spend(lease):
        at_once.wait()
        return store.spend(call(lease, tier=FREE, subject=lease.partition(":")[0])).refused_by

    with ThreadPoolExecutor(16) as pool:
        for number in range(20):
            leases = [f"caller-{number}:{place}" for place in range(16)]
            assert list(pool.map(spend, leases)).count(None) == 3


def test_every_key_in_redis_expires_and_has_its_callers_hash_tag(valkey):
    server = valkey.client()
    server.flushall()
    store = RedisStore(valkey.url)
    store.spend(call(subject="key:abc", tier=BUDGETED))
    store.spend(call(subject="key:def", tier=FREE, lease_ms=90_000))
    assert set(server.keys()) == {b"crane:quota:{key:abc}", b"crane:quota:{key:def}"}
    assert 86_000_000 < server.pttl("crane:quota:{key:abc}") <= 86_400_000
    assert 80_000 < server.pttl("crane:quota:{key:def}") <= 90_000
    store.settle(call(subject="key:def", tier=FREE, lease_ms=90_000), 0)
    assert server.keys() == [b"crane:quota:{key:abc}"]
    store.close()


def test_redis_goes_by_its_own_clock(valkey, monkeypatch):
    store = RedisStore(valkey.url)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    seconds, _ = valkey.client().time()
    assert abs(store.look("someone", WIDE).at / 1000 - seconds) < 5
    store.close()


def test_callers_of_whom_nothing_is_left_leave_the_file(tmp_path, clock):
    store = SqliteStore(tmp_path / "quota.db", now=clock)
    for number in range(50):
        store.spend(call(subject=f"passer-by {number}"))
    clock.seconds += 3600
    store.spend(call(subject="someone else"))
    store.close()
    with sqlite3.connect(tmp_path / "quota.db") as file:
        assert file.execute("SELECT subject FROM callers").fetchall() == [("someone else",)]
    file.close()


def test_a_callers_state_does_not_grow_with_its_calls(tmp_path, clock):
    tier = tiers("free 1000000/minute concurrency=5")["free"]
    store = SqliteStore(tmp_path / "quota.db", now=clock)
    for number in range(3000):
        clock.seconds += 0.05
        store.spend(call(str(number), tier=tier))
        store.settle(call(str(number), tier=tier), UNIT)
    with sqlite3.connect(tmp_path / "quota.db") as file:
        sizes = file.execute("SELECT length(state) FROM callers").fetchall()
    file.close()
    store.close()
    assert sizes[0][0] < 61 * 25


def test_a_step_that_fails_leaves_the_next_one_able(tmp_path, clock):
    store = SqliteStore(tmp_path / "quota.db", now=clock)
    store.spend(call("a"))
    clock.seconds, before = float("nan"), clock.seconds
    with pytest.raises(ValueError, match="NaN"):
        store.spend(call("b"))
    clock.seconds = before
    assert store.spend(call("c")).left == (3000,)
    store.close()


def test_a_file_that_was_damaged_while_it_was_open_is_made_anew_where_it_is_gone(tmp_path, clock):
    path = tmp_path / "quotas" / "quota.db"
    path.parent.mkdir()
    store = SqliteStore(path, now=clock)
    store.spend(call("a"))
    for file in path.parent.iterdir():
        file.write_bytes(b"not a database" * 400)
    for lease in "bc":
        with pytest.raises(store.errors):
            store.spend(call(lease))
    for file in path.parent.iterdir():
        file.unlink()
    assert store.spend(call("d")).left == (4000,)
    store.close()


def test_who_waits_behind_a_step_that_fails_fails_with_it(tmp_path):
    store = SqliteStore(tmp_path / "quota.db")
    store.spend(call("a"))
    other = sqlite3.connect(tmp_path / "quota.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    at_once = Barrier(32)

    def spend(lease):
        at_once.wait(30)
        with pytest.raises(store.errors):
            store.spend(call(lease))

    started = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(spend, map(str, range(32))))
    # One after another, each would wait as long.
    assert time.monotonic() - started < 16 * BUSY_TIMEOUT_S
    other.close()
    assert store.spend(call("b")).left == (3000,)
    store.close()


def test_a_folder_that_is_none_is_a_store_that_does_not_work(tmp_path):
    (tmp_path / "file").touch()
    store = SqliteStore(tmp_path / "file" / "quota.db")
    with pytest.raises(store.errors):
        store.ping()
    store.close()
