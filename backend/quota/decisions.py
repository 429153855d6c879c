"""What a store decides, and the rules by which it does: the Python twin of ``quota.lua``.

A caller's state is what it spent within each limit's window, and its leases: the calls it has
inside. What was spent is kept as entries of one sixtieth of the window, each with the time of its
first and its last spend; an entry is forgotten a whole window after its last. So no window of that
length, wherever it begins, ever holds more than the limit, and no caller's state grows past 61
entries a limit.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Protocol

from backend.quota.tiers import UNIT, Limit, Tier

PARTS = 60  # of a window
# No one can know when a call will end that was not ours to begin with; a second is soon.
CONCURRENCY_RETRY_MS = 1000


@dataclass(slots=True)
class State:
    """What a store keeps of a caller: when its leases end, and what it spent, by window length.

    An entry is three numbers of a window's array: the times of its first and its last spend, in
    ms, and the thousandths. The oldest comes first.
    """

    leases: dict[str, int]
    spent: dict[int, array[int]]


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a call may be made, and how the caller stands after it. Times are in ms."""

    at: int
    refused_by: str | None  # "rate", "budget", "concurrency"
    retry_after_ms: int
    left: tuple[int, ...]  # thousandths, of each limit of the tier
    reset_ms: tuple[int, ...]  # until some of it comes back; 0 where nothing is spent
    running: int


@dataclass(frozen=True, slots=True)
class Call:
    """A call that asks to be let in: what it costs in thousandths, and how long its lease is.

    A lease's end tells when its cost was spent, so a call keeps its ``lease_ms``. ``ended`` are
    leases of its caller's calls that have ended since, and cost what they held.
    """

    subject: str
    tier: Tier
    lease: str
    cost: int
    lease_ms: int
    ended: tuple[str, ...] = ()

    def raised(self, cost: int) -> Call:
        """The same call with another cost.

        Its lease has another name: whoever lost the answer to a ``reserve`` can settle both, and
        the one that is held is settled.
        """
        return replace(self, lease=f"{self.lease}+", cost=cost)


class Store(Protocol):
    """Where quotas are kept. Each method is one step, which nothing comes between.

    A step may be sent again by whoever lost its answer: it is not done twice.
    """

    name: str
    errors: tuple[type[Exception], ...]  # what a step raises where the store does not work

    def spend(self, call: Call) -> Decision:
        """End the leases that have ended; let a call in, or refuse it and take nothing."""

    def reserve(self, call: Call, raised: Call) -> Decision:
        """Have a call that was let in cost as much as ``raised``, or refuse and change nothing."""

    def settle(self, call: Call, cost: int) -> Decision:
        """End a call's lease, and have it cost what it did; does nothing for a lease that ended."""

    def look(self, subject: str, tier: Tier) -> Decision:
        """How a caller stands."""

    def ping(self) -> None:
        """Raise one of ``errors`` where steps would fail."""

    def close(self) -> None:
        """Let go of files and connections."""


def spend(state: State, call: Call, now: int) -> Decision:
    """Change ``state`` as a call asks, unless it must be refused."""
    now = _forget(state, call.tier, now)
    for lease in call.ended:
        state.leases.pop(lease, None)
    if call.lease in state.leases:
        return _standing(state, call.tier, now)
    refused_by, retry_after_ms = None, 0
    for limit in call.tier.limits:
        wait_ms = _wait_ms(state, limit, call.cost, now)
        if wait_ms > retry_after_ms:
            refused_by, retry_after_ms = limit.name, wait_ms
    if refused_by is None and len(state.leases) >= call.tier.concurrency:
        refused_by, retry_after_ms = "concurrency", CONCURRENCY_RETRY_MS
    if refused_by is None:
        _hold(state, call, now)
    return _standing(state, call.tier, now, refused_by, retry_after_ms)


def reserve(state: State, call: Call, raised: Call, now: int) -> Decision:
    """Spend ``raised`` now instead of ``call`` before, unless it must be refused."""
    now = _forget(state, call.tier, now)
    if raised.lease in state.leases:
        return _standing(state, call.tier, now)
    at = _spent_at(state, call)
    refused_by, retry_after_ms = None, 0
    for limit in call.tier.limits:
        window = limit.window_s * 1000
        held = call.cost if _find(state, window, at) is not None else 0
        if _used(state, window) - held + raised.cost <= limit.units * UNIT:
            continue
        # Until there is enough for another try, beside what this one has spent.
        wait_ms = _wait_ms(state, limit, raised.cost, now)
        if wait_ms > retry_after_ms:
            refused_by, retry_after_ms = limit.name, wait_ms
    if refused_by is None:
        state.leases.pop(call.lease, None)
        for limit in call.tier.limits:
            _refund(state, limit.window_s * 1000, at, call.cost)
        _hold(state, raised, now)
    return _standing(state, call.tier, now, refused_by, retry_after_ms)


def settle(state: State, call: Call, cost: int, now: int) -> Decision:
    now = _forget(state, call.tier, now)
    at = _spent_at(state, call)
    if state.leases.pop(call.lease, None) is not None:
        for limit in call.tier.limits:
            window = limit.window_s * 1000
            if cost < call.cost:
                _refund(state, window, at, call.cost - cost)
            elif cost > call.cost:
                # Now, for what was spent at first may be forgotten by now.
                _add(state, window, now, cost - call.cost)
    return _standing(state, call.tier, now)


def look(state: State, tier: Tier, now: int) -> Decision:
    now = _forget(state, tier, now)
    return _standing(state, tier, now)


def counts_until(state: State) -> int:
    """When nothing of a caller counts any more, in ms."""
    ends = [entries[-2] + window for window, entries in state.spent.items()]
    return max([0, *state.leases.values(), *ends])


def _forget(state: State, tier: Tier, now: int) -> int:
    """Drop what is over; return the time, which never runs backwards for a caller."""
    windows = {limit.window_s * 1000 for limit in tier.limits}
    for window in state.spent.keys() - windows:
        del state.spent[window]  # the tier has been given another rate
    for entries in state.spent.values():
        now = max(now, entries[-2])
    for window, entries in list(state.spent.items()):
        over = 0
        while over < len(entries) and entries[over + 1] + window <= now:
            over += 3
        del entries[:over]
        if not entries:
            del state.spent[window]
    if any(end <= now for end in state.leases.values()):
        state.leases = {lease: end for lease, end in state.leases.items() if end > now}
    return now


def _hold(state: State, call: Call, now: int) -> None:
    state.leases[call.lease] = now + call.lease_ms
    if call.cost:
        for limit in call.tier.limits:
            _add(state, limit.window_s * 1000, now, call.cost)


def _spent_at(state: State, call: Call) -> int:
    """When a call's cost was spent; before all time where its lease has ended."""
    return state.leases.get(call.lease, 0) - call.lease_ms


def _used(state: State, window: int) -> int:
    return sum(state.spent.get(window, ())[2::3])


def _wait_ms(state: State, limit: Limit, cost: int, now: int) -> int:
    """How long until enough is forgotten to spend ``cost``; a window where it never will be."""
    window = limit.window_s * 1000
    over = _used(state, window) + cost - limit.units * UNIT
    if over <= 0:
        return 0
    entries = state.spent.get(window, ())
    for place in range(0, len(entries), 3):
        over -= entries[place + 2]
        if over <= 0:
            return entries[place + 1] + window - now
    return window


def _add(state: State, window: int, now: int, cost: int) -> None:
    entries = state.spent.setdefault(window, array("q"))
    if entries and now - entries[-3] < window // PARTS:
        entries[-2] = now
        entries[-1] += cost
    else:
        entries.extend((now, now, cost))


def _find(state: State, window: int, at: int) -> int | None:
    """The index of the entry that a spend went into; None where it is forgotten."""
    entries = state.spent.get(window, ())
    for index in range(0, len(entries), 3):
        if entries[index] <= at <= entries[index + 1]:
            return index
    return None


def _refund(state: State, window: int, at: int, cost: int) -> None:
    """Take so much out of the entry that a spend went into, unless it is forgotten by now."""
    index = _find(state, window, at)
    if index is None:
        return
    entries = state.spent[window]
    entries[index + 2] -= cost
    if entries[index + 2] <= 0:
        del entries[index : index + 3]
    if not entries:
        del state.spent[window]


def _standing(
    state: State, tier: Tier, now: int, refused_by: str | None = None, retry_after_ms: int = 0
) -> Decision:
    left, reset = [], []
    for limit in tier.limits:
        window = limit.window_s * 1000
        left.append(max(0, limit.units * UNIT - _used(state, window)))
        entries = state.spent.get(window)
        reset.append(entries[1] + window - now if entries else 0)
    running = len(state.leases)
    return Decision(now, refused_by, retry_after_ms, tuple(left), tuple(reset), running)
