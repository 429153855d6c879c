"""Look-ups of keys under a flood: one query at a time, and what is right waits for two at most."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest

from backend.config import Config
from backend.errors import KeysUnavailable
from backend.keys import Keys
from backend.lookups import Lookups
from tests.serving import wait_for


class Table:
    """Rows that are read while ``gate`` is open; ``batches`` are the ids of each query."""

    def __init__(self, *ids):
        self.rows = {id_: {"id": id_} for id_ in ids}
        self.batches, self.gate, self.running = [], threading.Event(), 0

    def read(self, ids):
        self.running += 1
        assert self.running == 1
        self.batches.append(set(ids))
        assert self.gate.wait(20)
        self.running -= 1
        return {id_: self.rows[id_] for id_ in ids if id_ in self.rows}


def test_what_comes_during_a_query_is_looked_up_together_by_the_next():
    table = Table("right")
    lookups = Lookups(table.read, limit_s=10)
    with ThreadPoolExecutor(64) as threads:
        first = threads.submit(lookups.get, "first")
        wait_for(lambda: table.batches)
        flood = [threads.submit(lookups.get, f"wrong-{number}") for number in range(60)]
        right = threads.submit(lookups.get, "right")
        wait_for(lambda: lookups._next is not None and len(lookups._next.ids) == 61)
        table.gate.set()
        assert right.result(10) == {"id": "right"}
        assert {one.result(10) for one in (first, *flood)} == {None}
    assert [len(batch) for batch in table.batches] == [1, 61]


def test_an_id_is_in_its_query_or_in_the_next_one():
    table = Table("late")
    lookups = Lookups(table.read, limit_s=10)

    class Slow(set):
        def add(self, id_):
            table.gate.set()  # so that the query's turn comes now
            wait_until_read(0.2)
            super().add(id_)

    def wait_until_read(timeout_s):
        with suppress(AssertionError):
            wait_for(lambda: len(table.batches) == 2, timeout_s)

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(lookups.get, "first")
        wait_for(lambda: table.batches)
        leader = threads.submit(lookups.get, "leader")
        wait_for(lambda: lookups._next)
        lookups._next.ids = Slow(lookups._next.ids)
        assert threads.submit(lookups.get, "late").result(10) == {"id": "late"}
        assert first.result(10) is leader.result(10) is None


def test_a_query_that_fails_is_told_to_all_who_wait_for_it_and_the_next_is_made():
    gate, faults = threading.Event(), [None, OSError("away")]

    def read(ids):
        assert gate.wait(20)
        if fault := faults.pop(0) if faults else None:
            raise fault
        return {id_: {} for id_ in ids}

    lookups = Lookups(read, limit_s=10)
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(lookups.get, "first")
        wait_for(lambda: lookups._turn.locked() and lookups._next is None)
        others = [threads.submit(lookups.get, f"other-{number}") for number in range(3)]
        wait_for(lambda: lookups._next is not None and len(lookups._next.ids) == 3)
        gate.set()
        assert first.result(10) == {}
        assert {type(one.exception(10)) for one in others} == {OSError}
    assert lookups.get("a") == {}


def test_a_query_that_does_not_end_keeps_nobody():
    table = Table()
    lookups = Lookups(table.read, limit_s=0.05)
    with ThreadPoolExecutor(4) as threads:
        stuck = threads.submit(lookups.get, "stuck")
        wait_for(lambda: table.batches)
        others = [threads.submit(lookups.get, "other") for _ in range(3)]
        assert {type(other.exception(10)) for other in others} == {TimeoutError}
        table.gate.set()
        assert stuck.result(10) is None
    assert lookups.get("again") is None


@pytest.fixture
def keys(tmp_path):
    with closing(Keys(Config(data_dir=tmp_path))) as opened:
        yield opened


def reads(keys, monkeypatch):
    """The ids of each query from now on."""
    made, store = [], keys._opened[0]
    monkeypatch.setattr(store, "keys", lambda ids, keys=store.keys: made.append(ids) or keys(ids))
    return made


def test_a_wrong_key_that_comes_again_and_again_is_looked_up_once(keys, monkeypatch):
    _, text = keys.create(owner="a", tier="free")
    made = reads(keys, monkeypatch)
    for wrong in (text[:-4] + "0000", f"crane_{'a' * 12}_{'b' * 32}"):
        made.clear()
        assert [keys.find(wrong) for _ in range(50)] == [None] * 50
        assert len(made) == 1
    assert keys.find(text)


def test_what_does_not_look_like_a_key_is_not_looked_up_at_all(keys, monkeypatch):
    keys.create(owner="a", tier="free")
    made = reads(keys, monkeypatch)
    for wrong in ("", "sk-1", "crane_", f"crane_{'A' * 12}_{'b' * 32}", "k" * 100_000):
        assert keys.find(wrong) is None
    assert made == []


def test_an_error_is_not_taken_for_a_wrong_key(keys, monkeypatch):
    _, text = keys.create(owner="a", tier="free")
    store = keys._opened[0]

    def fail(ids):
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "keys", fail)
        with pytest.raises(KeysUnavailable):
            keys.find(text)
    assert keys.find(text)


def test_right_keys_are_found_amid_a_flood_of_wrong_ones(keys):
    texts = [keys.create(owner="a", tier="free")[1] for _ in range(8)]
    stop = threading.Event()

    def flood(number):
        count = 0
        while not stop.is_set():
            count += 1
            assert keys.find(f"crane_{'a' * 12}_{number:08}{count:024}") is None
        return count

    with ThreadPoolExecutor(8) as threads:
        floods = [threads.submit(flood, number) for number in range(8)]
        try:
            for _ in range(5):
                keys._seen.clear()  # as of a worker that has never seen them
                assert all(keys.find(text) for text in texts)
        finally:
            stop.set()
        assert all(flood.result(20) for flood in floods)
