"""Redis first, this host's SQLite while Redis is away: a call never waits for it twice."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from backend.quota.decisions import Call, Decision, Store
from backend.quota.redis import RedisStore
from backend.quota.sqlite import SqliteStore
from backend.quota.tiers import Tier

logger = logging.getLogger("crane.quota")

PROBE_S = 0.5  # between looks for a Redis that was away


class QuotaAway(Exception):
    """Redis does not answer, and nobody else is to decide."""


class FailoverStore:
    """Decides on Redis. The first call that gets no answer marks it away: from then on the host's
    own store decides, if ``local``, and a thread of ours looks until Redis answers again.
    """

    def __init__(
        self,
        redis: RedisStore,
        sqlite: SqliteStore,
        *,
        local: bool,
        on_change: Callable[[bool], None] = lambda away: None,
    ) -> None:
        import redis as library

        self._errors = library.RedisError
        self._redis, self._sqlite = redis, sqlite
        self._local = local
        self._on_change = on_change
        self._lock = threading.Lock()  # so that one thread looks, and one line says so
        self._closed = threading.Event()
        self.away = False

    def spend(self, call: Call) -> Decision:
        return self._decide(lambda store: store.spend(call))

    def settle(self, call: Call, at: int, cost: int) -> Decision:
        # A lease of the other store's is none here, and ends there by itself.
        return self._decide(lambda store: store.settle(call, at, cost))

    def look(self, subject: str, tier: Tier) -> Decision:
        return self._decide(lambda store: store.look(subject, tier))

    def close(self) -> None:
        self._closed.set()
        self._redis.close()
        self._sqlite.close()

    def _decide(self, step: Callable[[Store], Decision]) -> Decision:
        if not self.away:
            try:
                return step(self._redis)
            except self._errors as error:
                self._lost(error)
        if not self._local:
            raise QuotaAway
        return step(self._sqlite)

    def _lost(self, error: Exception) -> None:
        with self._lock:
            if self.away or self._closed.is_set():
                return
            self.away = True
            logger.error(
                "Redis does not answer; until it does, quotas are %s",
                "decided on this host" if self._local else "not known",
                extra={"fields": {"reason": type(error).__name__}},
            )
            self._on_change(True)
            threading.Thread(target=self._watch, name="redis watch", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(PROBE_S):
            try:
                self._redis.ping()
            except self._errors:
                continue
            with self._lock:
                self.away = False
                logger.warning("Redis answers again; quotas are decided there")
                self._on_change(False)
            return
