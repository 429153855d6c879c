"""A lock that callers have in turn."""

from __future__ import annotations

import threading
from contextlib import suppress

from backend.fair_lock import FairLock
from tests.serving import wait_for


class Waiters:
    """Threads that hold a lock one after the other, and note when each had it."""

    def __init__(self):
        self.lock = FairLock()
        self.had = []
        self.threads = []

    def wait(self, caller):
        thread = threading.Thread(target=self._hold, args=(caller,))
        self.threads.append(thread)
        waiting = self.waiting()
        thread.start()
        wait_for(lambda: self.waiting() == waiting + 1)

    def waiting(self):
        return sum(map(len, self.lock._waiting.values()))

    def _hold(self, caller):
        with self.lock.hold(caller):
            self.had.append(caller)

    def join(self):
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def test_callers_have_it_in_turn_whoever_has_more_threads():
    waiters = Waiters()
    with waiters.lock.hold("a"):
        for caller in "aaabacb":
            waiters.wait(caller)
    waiters.join()
    assert waiters.had == list("abcabaa")


def test_it_is_released_by_an_error():
    waiters = Waiters()
    with suppress(ValueError), waiters.lock.hold("a"):
        waiters.wait("b")
        raise ValueError
    waiters.join()
    with waiters.lock.hold("a"):
        waiters.wait("c")
    waiters.join()
    assert waiters.had == ["b", "c"]


def test_one_thread_has_it_at_a_time():
    lock, inside, most = FairLock(), 0, 0

    def hold(caller):
        nonlocal inside, most
        for _ in range(200):
            with lock.hold(caller):
                inside += 1
                most = max(most, inside)
                threading.Event().wait(1e-5)
                inside -= 1

    threads = [threading.Thread(target=hold, args=(str(number % 3),)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert (inside, most) == (0, 1)
    assert not lock._waiting
