"""The meter: lets calls in against a caller's quota, and settles what they cost."""

from __future__ import annotations

import logging
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from backend import metrics
from backend.config import Config
from backend.errors import (
    ConcurrencyLimitExceeded,
    Forbidden,
    QuotaUnavailable,
    RateLimitExceeded,
)
from backend.quota.decisions import Call, Decision, Store
from backend.quota.failover import FailoverStore, QuotaAway
from backend.quota.redis import RedisStore
from backend.quota.sqlite import SqliteStore
from backend.quota.tiers import UNIT, Limit, Tier

logger = logging.getLogger("crane.quota")

# Past a call's deadline: what it takes to be queued, answered and settled. A worker that is killed
# holds its leases until then.
LEASE_MARGIN_S = 15.0
# Leases that need not end before their answers wait so long to end together with others, or with
# what their caller spends next.
END_WITHIN_S = 0.01
# Only those, that is, whose callers have places enough left for what they may begin meanwhile.
FAR = 32
# So a lease may end a little after its answer, and whoever got that may call again at once.
LOOK_AGAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Lease:
    """A call that was let in, and how its caller stands."""

    call: Call
    standing: Decision

    @property
    def has_room(self) -> bool:
        """Whether its caller was far from as many calls at once as it may have."""
        return self.standing.running + FAR <= self.call.tier.concurrency


class Meter:
    """Decides on Redis where there is one, else on a file of this host; see ``FailoverStore``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lease_ms = int((config.request_timeout_s + LEASE_MARGIN_S) * 1000)
        self._broken = False  # the host's own file
        self._ended: dict[str, tuple[Tier, list[str]]] = {}  # leases, by their caller
        self._lock = threading.Lock()  # of the line above
        self._some_ended = threading.Event()
        self._ender: threading.Thread | None = None
        self._closed = False
        self._store: SqliteStore | FailoverStore = SqliteStore(config.data_dir / "quota.db")
        if config.redis_url is not None:
            self._store = FailoverStore(
                RedisStore(config.redis_url),
                self._store,
                local=config.quota_on_outage == "local",
                on_change=metrics.QUOTA_STORE_AWAY.set,
            )

    def let_in(self, subject: str, tier: Tier, cost: int) -> Lease | None:
        """Spend ``cost`` thousandths and take a place among the caller's calls.

        None where quotas are not known and calls go on without. Raises ``RateLimitExceeded``,
        ``ConcurrencyLimitExceeded``, ``Forbidden`` for what the tier can never afford, and
        ``QuotaUnavailable``; whatever it raises, nothing was taken.
        """
        for limit in tier.limits:
            if cost > limit.units * UNIT:
                raise Forbidden(
                    f"This call costs up to {units(cost)} units, and the tier {tier.name!r} has "
                    f"{limit.units} per {limit.per}: ask for less at once."
                )
        ended = self._take_ended(subject)
        call = Call(subject, tier, secrets.token_hex(8), cost, self._lease_ms, ended)
        standing = self._decide(lambda store: store.spend(call))
        if standing is not None and standing.refused_by == "concurrency":
            time.sleep(LOOK_AGAIN_S)
            standing = self._decide(lambda store: store.spend(call))
        if standing is None and self._config.quota_on_outage == "deny":
            raise QuotaUnavailable(
                "Quotas are not known now, so no call is let in; try again in 1 s.", retry_after_s=1
            )
        if standing is None:
            return None
        if standing.refused_by is not None:
            metrics.QUOTA_REFUSALS.labels(tier.name, standing.refused_by).inc()
            raise refusal(tier, standing)
        return Lease(call, standing)

    def settle(self, lease: Lease, cost: int) -> Decision | None:
        """End a lease; the call costs ``cost``, whatever was spent for it before."""
        return self._decide(lambda store: store.settle(lease.call, lease.standing.at, cost))

    def end(self, lease: Lease) -> None:
        """End the lease of a call that cost what was spent for it, within ``END_WITHIN_S``."""
        call = lease.call
        with self._lock:
            first = not self._ended
            self._ended.setdefault(call.subject, (call.tier, []))[1].append(call.lease)
            if self._ender is None:
                self._ender = threading.Thread(target=self._end_leases, name="leases", daemon=True)
                self._ender.start()
        if first:
            self._some_ended.set()

    def look(self, subject: str, tier: Tier) -> Decision | None:
        if ended := self._take_ended(subject):
            self._settle_ended(subject, tier, ended)
        return self._decide(lambda store: store.look(subject, tier))

    def status(self) -> dict[str, object]:
        """For /readyz: who decides, and whether it is who should."""
        if isinstance(self._store, SqliteStore):
            return {"store": "sqlite"}
        return {"store": "redis", "away": self._store.away}

    def close(self) -> None:
        self._closed = True
        self._some_ended.set()
        if self._ender is not None:
            self._ender.join()
        self._store.close()

    def _end_leases(self) -> None:
        closed = False
        while not closed:
            self._some_ended.wait()
            time.sleep(END_WITHIN_S)
            self._some_ended.clear()
            closed = self._closed
            with self._lock:
                ended, self._ended = self._ended, {}
            for subject, (tier, leases) in ended.items():
                self._settle_ended(subject, tier, tuple(leases))

    def _take_ended(self, subject: str) -> tuple[str, ...]:
        with self._lock:
            _, leases = self._ended.pop(subject, (None, ()))
        return tuple(leases)

    def _settle_ended(self, subject: str, tier: Tier, leases: tuple[str, ...]) -> None:
        nothing = Call(subject, tier, "", 0, 0, leases)
        self._decide(lambda store: store.settle(nothing, 0, 0))

    def _decide(self, step: Callable[[Store], Decision]) -> Decision | None:
        """None where quotas are not known: nothing but letting calls in waits for them."""
        if isinstance(self._store, FailoverStore) and self._store.away:
            metrics.QUOTA_LOCAL.labels(self._config.quota_on_outage).inc()
        try:
            decided = step(self._store)
        except QuotaAway:  # which was logged
            return None
        except sqlite3.Error:
            if not self._broken:  # said once, not at every call
                logger.exception("quotas cannot be kept in %s", self._config.data_dir)
            self._broken = True
            return None
        self._broken = False
        return decided


def refusal(tier: Tier, standing: Decision) -> RateLimitExceeded | ConcurrencyLimitExceeded:
    """Which limit it is, and when to come back."""
    wait_s = math.ceil(standing.retry_after_ms / 1000)
    headers = quota_headers(tier, standing)
    if standing.refused_by == "concurrency":
        return ConcurrencyLimitExceeded(
            f"{standing.running} calls are running, and the tier {tier.name!r} has at most "
            f"{tier.concurrency} at once; try again when one has ended.",
            details={"limit": "concurrency", "tier": tier.name},
            retry_after_s=wait_s,
            headers=headers,
        )
    limit = next(limit for limit in tier.limits if limit.name == standing.refused_by)
    return RateLimitExceeded(
        f"The {limit.name} of the tier {tier.name!r}, {limit.units} per {limit.per}, is spent; "
        f"try again in {wait_s} s.",
        details={"limit": limit.name, "tier": tier.name},
        retry_after_s=wait_s,
        headers=headers,
    )


def quota_headers(tier: Tier, standing: Decision) -> dict[str, str]:
    """``RateLimit-Policy``, ``RateLimit`` (of the IETF's draft) and the older ``X-RateLimit-*``.

    The older ones can tell of one limit: that of which the smallest part is left. Seconds are until
    some of it comes back.
    """
    policies, states = [], []
    shares: list[tuple[float, Limit, int, int]] = []
    for limit, left, reset_ms in zip(tier.limits, standing.left, standing.reset_ms, strict=True):
        name = tier.name if limit.name == "rate" else f"{tier.name}-{limit.name}"
        left_units, reset_s = left // UNIT, math.ceil(reset_ms / 1000)
        policies.append(f'"{name}";q={limit.units};w={limit.window_s}')
        states.append(f'"{name}";r={left_units};t={reset_s}')
        shares.append((left / limit.units, limit, left_units, reset_s))
    _, limit, left_units, reset_s = min(shares, key=lambda share: share[0])
    return {
        "RateLimit-Policy": ", ".join(policies),
        "RateLimit": ", ".join(states),
        "X-RateLimit-Limit": str(limit.units),
        "X-RateLimit-Remaining": str(left_units),
        "X-RateLimit-Reset": str(reset_s),
    }


def units(thousandths: int) -> float | int:
    """Units as JSON has them: 5, not 5.0."""
    return thousandths // UNIT if thousandths % UNIT == 0 else thousandths / UNIT
