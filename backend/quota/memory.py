"""Quotas in a process's own memory, for when the host's file cannot be written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

from backend.quota import decisions
from backend.quota.decisions import Call, Decision, State
from backend.quota.tiers import Tier

SWEEP_S = 60.0  # between looks for callers of whom nothing is left


@lru_cache(64)
def share_of(tier: Tier, processes: int) -> Tier:
    """What one of several processes may let in, so that all together pass no limit by much."""
    limits = tuple(replace(limit, units=-(-limit.units // processes)) for limit in tier.limits)
    return replace(tier, limits=limits, concurrency=-(-tier.concurrency // processes))


class MemoryStore:
    """A dict of callers, by the rules of the other stores; each process has its share of a tier."""

    name = "memory"
    errors: tuple[type[Exception], ...] = ()

    def __init__(self, processes: int = 1, *, now: Callable[[], float] = time.time) -> None:
        self._processes = processes
        self._now = now
        self._states: dict[str, State] = {}
        self._swept_at = 0.0
        self._lock = threading.Lock()  # one step at a time

    def spend(self, call: Call) -> Decision:
        call = self._own(call)
        return self._step(call.subject, lambda state, now: decisions.spend(state, call, now))

    def reserve(self, call: Call, raised: Call) -> Decision:
        call, raised = self._own(call), self._own(raised)
        return self._step(
            call.subject, lambda state, now: decisions.reserve(state, call, raised, now)
        )

    def settle(self, call: Call, cost: int) -> Decision:
        call = self._own(call)
        return self._step(call.subject, lambda state, now: decisions.settle(state, call, cost, now))

    def look(self, subject: str, tier: Tier) -> Decision:
        own = share_of(tier, self._processes)
        # A copy, for whoever only looks forgets nothing.
        return self._step(subject, lambda state, now: decisions.look(deepcopy(state), own, now))

    def _own(self, call: Call) -> Call:
        return replace(call, tier=share_of(call.tier, self._processes))

    def __len__(self) -> int:
        """The callers of whom something is kept."""
        return len(self._states)

    def ping(self) -> None:
        """Nothing can fail here."""

    def close(self) -> None:
        """Nothing to let go of."""

    def _step(self, subject: str, decide: Callable[[State, int], Decision]) -> Decision:
        with self._lock:
            seconds = self._now()
            now = int(seconds * 1000)
            if seconds - self._swept_at > SWEEP_S:
                self._swept_at = seconds
                self._states = {
                    name: state
                    for name, state in self._states.items()
                    if decisions.counts_until(state) > now
                }
            state = self._states.get(subject) or State({}, {})
            decision = decide(state, now)
            if state.leases or state.spent:
                self._states[subject] = state
            return decision
