"""Stores in the order of who should decide: the first that works does."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from backend.quota.decisions import Call, Decision, Store
from backend.quota.tiers import Tier

logger = logging.getLogger("crane.quota")

PROBE_S = 0.5  # between looks for a store that was away
CLOSE_WAIT_S = 5.0  # for such a look, at the end
MAX_LATE = 10_000  # calls to be settled once a store is back; leases end by themselves
# A lease that need not end before its answer waits so long for what its caller spends next, which
# ends it in the same step.
END_WITHIN_S = 0.01


class QuotaAway(Exception):
    """The store that is to decide does not work."""


class WatchedStore:
    """A store that may fail. It is away from its first failure on: a thread looks until it works.

    What could not be settled meanwhile is settled then. So is a call whose spend had no answer,
    for it may have been let in after all.
    """

    def __init__(self, store: Store, on_change: Callable[[bool], None] = lambda away: None) -> None:
        self.store = store
        self.away = False
        self._on_change = on_change
        self._late: deque[tuple[Call, int]] = deque(maxlen=MAX_LATE)
        self._lock = threading.Lock()  # so that one thread looks, and leaves nothing unsettled
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._ended: dict[str, list[Call]] = {}  # by subject
        self._ended_lock = threading.Lock()  # so that each of them ends once
        self._some_ended = threading.Event()
        self._ender: threading.Thread | None = None

    def spend(self, call: Call) -> Decision:
        late = [(call, 0)]
        if ended := self._take_ended(call.subject):
            call = replace(call, ended=tuple(one.lease for one in ended))
            late += [(one, one.cost) for one in ended]
        return self._run(lambda: self.store.spend(call), late=late, again=late[1:])

    def reserve(self, call: Call, raised: Call) -> Decision:
        return self._run(lambda: self.store.reserve(call, raised), late=[])

    def settle(self, call: Call, cost: int) -> Decision:
        late = [(call, cost)]
        return self._run(lambda: self.store.settle(call, cost), late=late, again=late)

    def settle_either(self, calls: Sequence[Call], cost: int) -> None:
        """Settle a call whose ``reserve`` had no answer, under whichever name it is held."""
        for call in calls:
            with suppress(QuotaAway):
                self.settle(call, cost)

    def end(self, call: Call) -> None:
        """Settle a call that cost what it held, within ``END_WITHIN_S``."""
        with self._ended_lock:
            first = not self._ended
            self._ended.setdefault(call.subject, []).append(call)
            if self._ender is None:
                ender = threading.Thread(
                    target=self._end, name=f"{self.store.name} leases", daemon=True
                )
                ender.start()  # or raise, and the next call tries again
                self._ender = ender
        if first:
            self._some_ended.set()

    def look(self, subject: str, tier: Tier) -> Decision:
        self._settle_ended(self._take_ended(subject))
        return self._run(lambda: self.store.look(subject, tier), late=[])

    def close(self) -> None:
        self._closed.set()
        self._some_ended.set()
        if self._ender is not None:
            self._ender.join(CLOSE_WAIT_S)
        if self._watcher is not None:
            self._watcher.join(CLOSE_WAIT_S)
        self.store.close()

    def _run(
        self,
        step: Callable[[], Decision],
        *,
        late: list[tuple[Call, int]],
        again: Sequence[tuple[Call, int]] = (),
    ) -> Decision:
        """Take a step; raises ``QuotaAway``.

        ``late`` is to be settled if it fails, and ``again`` where the store was away before.
        """
        if self.away:
            with self._lock:
                if self.away:
                    self._late += again
                    raise QuotaAway
        try:
            return step()
        except self.store.errors as error:
            self._lost(error, late)
            raise QuotaAway from None

    def _take_ended(self, subject: str) -> list[Call]:
        if not self._ended:
            return []
        with self._ended_lock:
            return self._ended.pop(subject, [])

    def _end(self) -> None:
        closed = False
        while not closed:
            self._some_ended.wait()
            self._closed.wait(END_WITHIN_S)
            self._some_ended.clear()
            closed = self._closed.is_set()
            with self._ended_lock:
                ended, self._ended = self._ended, {}
            for calls in ended.values():
                self._settle_ended(calls)

    def _settle_ended(self, ended: list[Call]) -> None:
        for call in ended:
            try:
                with suppress(QuotaAway):
                    self.settle(call, call.cost)
            except Exception:  # nobody else ends the others, and this one ends by itself
                logger.exception("a lease could not be ended in %s", self.store.name)

    def _lost(self, error: Exception, late: list[tuple[Call, int]]) -> None:
        with self._lock:
            self._late += late
            if self.away or self._closed.is_set():
                return
            watcher = threading.Thread(
                target=self._watch, name=f"{self.store.name} watch", daemon=True
            )
            watcher.start()  # or raise, and the next call tries again
            self._watcher, self.away = watcher, True
            logger.error(
                "quotas cannot be kept in %s now; until they can, CRANE_QUOTA_ON_OUTAGE decides",
                self.store.name,
                extra={"fields": {"reason": type(error).__name__}},
            )
            self._on_change(True)

    def _watch(self) -> None:
        logged = False
        while not self._closed.wait(PROBE_S):
            try:
                if self._is_back():
                    return
            except Exception:
                # Whatever it is, the store is not back; and nobody else would look again.
                if not logged:
                    logger.exception("the %s store cannot be looked at", self.store.name)
                logged = True

    def _is_back(self) -> bool:
        try:
            self.store.ping()
            while self._late and not self._closed.is_set():
                self._settle(*self._late.popleft())
        except self.store.errors:
            return False
        with self._lock:
            if self._late:  # since then
                return False
            self.away = False
            logger.warning("quotas are kept in %s again", self.store.name)
            self._on_change(False)
        return True

    def _settle(self, call: Call, cost: int) -> None:
        try:
            self.store.settle(call, cost)
        except self.store.errors:
            self._late.appendleft((call, cost))
            raise


class Failover:
    """The stores that may decide, the best first. Each step raises ``QuotaAway`` if none works."""

    def __init__(
        self, stores: Sequence[Store], on_change: Callable[[bool], None] = lambda away: None
    ) -> None:
        """``on_change`` is told when the first of them is away, and when it is back."""
        self._watched = [WatchedStore(stores[0], on_change), *map(WatchedStore, stores[1:])]

    @property
    def deciding(self) -> str | None:
        """The name of the store that decides, as far as is known."""
        return next((watched.store.name for watched in self._watched if not watched.away), None)

    @property
    def away(self) -> bool:
        """Whether the first store, which is to decide, does not work."""
        return self._watched[0].away

    def spend(self, call: Call) -> tuple[Decision, WatchedStore]:
        """The decision, and who made it: that is who holds the call."""
        for watched in self._watched:
            with suppress(QuotaAway):
                return watched.spend(call), watched
        raise QuotaAway

    def reserve(
        self, call: Call, raised: Call, holder: WatchedStore
    ) -> tuple[Decision, WatchedStore]:
        """Likewise; who comes after a holder that is away has the call spend all of it there.

        So the call costs nothing at the holder then. Where nobody else lets it in, it costs there
        what it held: it is refused, or runs though quotas are not known.
        """
        with suppress(QuotaAway):
            return holder.reserve(call, raised), holder
        maybe_held, cost = [call, raised], call.cost
        try:
            decision, other = self.spend(raised)
            if decision.refused_by is None:
                cost = 0
                if other is holder:  # which is back already
                    maybe_held.remove(raised)
            return decision, other
        finally:
            holder.settle_either(maybe_held, cost)

    def look(self, subject: str, tier: Tier) -> Decision:
        for watched in self._watched:
            with suppress(QuotaAway):
                return watched.look(subject, tier)
        raise QuotaAway

    def close(self) -> None:
        for watched in self._watched:
            watched.close()
