"""The order in which models get a device's memory, told by one that only plays a model."""

from __future__ import annotations

import threading
import time

import pytest

from backend.engine import residency
from backend.engine.residency import Residency
from tests.serving import wait_for


class Guest:
    """Holds memory until it is told to go, and then as long as it likes."""

    def __init__(self, rooms, name, size, *, users=0, used_at=0.0, pinned=False):
        self.rooms, self.model_id, self.size = rooms, name, size
        self.users, self.used_at, self.pinned = users, used_at, pinned
        self.is_leaving = False
        self.callers = [name]
        self.asked = []
        self.inside = threading.Event()

    def leave(self, *, though_used=False):
        self.asked.append(though_used)
        self.is_leaving = not self.users or though_used
        return self.is_leaving

    def enter(self, wanted=lambda: True):
        """Wait for room, in a thread."""

        def take():
            if self.rooms.take(self, "cpu", self.size, wanted):
                self.inside.set()

        threading.Thread(target=take, daemon=True).start()
        # So that the next one comes after it.
        wait_for(lambda: self in self.rooms._held or self in [w.tenant for w in self.rooms._line])
        return self

    def go(self):
        self.is_leaving = False
        self.rooms.give_back(self)


@pytest.fixture
def rooms():
    return Residency(lambda device: 3, lambda device: 1000)


@pytest.fixture
def guest(rooms):
    return lambda *args, **more: Guest(rooms, *args, **more).enter()


@pytest.fixture
def told(monkeypatch):
    """Nobody looks by himself."""
    monkeypatch.setattr(residency, "LOOK_AGAIN_S", 60)


@pytest.fixture
def looking(monkeypatch):
    monkeypatch.setattr(residency, "LOOK_AGAIN_S", 0.01)


def test_nobody_else_is_sent_away_while_one_is_leaving(guest, looking):
    a, b, c = (guest(name, 1, used_at=place) for place, name in enumerate("abc"))
    late = guest("late", 1)
    wait_for(lambda: a.asked)
    time.sleep(0.05)  # others look too meanwhile
    assert (a.asked, b.asked, c.asked) == ([False], [], [])
    a.go()
    assert late.inside.wait(5)
    assert (a.asked, b.asked, c.asked) == ([False], [], [])


def test_only_the_first_in_line_makes_room(guest, looking):
    guest("busy", 2, users=1)
    idle = guest("idle", 1)
    guest("first", 3)
    second = guest("second", 1)
    time.sleep(0.1)
    assert idle.asked == []
    assert not second.inside.is_set()


def test_whoever_is_used_leaves_last_even_when_it_is_late(guest, looking, monkeypatch):
    monkeypatch.setattr(residency, "AGE_BOUND_S", 0)
    busy = guest("busy", 1, users=1, used_at=1.0)
    idle = guest("idle", 2, used_at=2.0)
    guest("late", 1)
    wait_for(lambda: idle.asked)
    assert (busy.asked, idle.asked) == ([], [True])


def test_all_who_have_room_enter_as_soon_as_there_is_any(guest, told):
    a = guest("a", 3, users=1)
    late = [guest(name, 1) for name in "xyz"]
    a.go()
    assert all(one.inside.wait(5) for one in late)


def test_who_becomes_idle_is_asked_at_once(guest, rooms, told):
    a = guest("a", 3, users=1)
    late = guest("late", 1)
    assert a.asked == []
    a.users = 0
    rooms.look_again()
    deadline = time.monotonic() + 5
    while not a.asked:
        assert time.monotonic() < deadline
    a.go()
    assert late.inside.wait(5)


def test_who_does_not_want_in_any_more_is_not_in_the_way(guest, rooms, looking):
    guest("busy", 2, users=1)
    wanted = [True]
    Guest(rooms, "first", 3).enter(lambda: wanted[0])
    wanted[0] = False
    assert guest("second", 1).inside.wait(5)


def test_emptying_leaves_those_in_peace_that_were_used_just_now(guest, rooms):
    me = guest("me", 1, users=1)
    fresh, old = guest("fresh", 1, used_at=time.monotonic()), guest("old", 1)
    threading.Thread(target=rooms.empty, args=(me, 60), daemon=True).start()
    wait_for(lambda: old.asked)
    old.go()
    assert (fresh.asked, old.asked) == ([], [False])


def test_emptying_waits_for_those_that_leave_and_for_no_others(guest, rooms, told):
    me = guest("me", 1, users=1)
    busy, idle = guest("busy", 1, users=1), guest("idle", 1)
    done = threading.Event()
    threading.Thread(target=lambda: rooms.empty(me) or done.set(), daemon=True).start()
    assert not done.wait(0.2)
    assert (me.asked, busy.asked, idle.asked) == ([], [False], [False])
    idle.go()
    assert done.wait(20)
