"""The meter: lets calls in against a caller's quota, and settles what they cost."""

from __future__ import annotations

import math
import secrets
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
from backend.quota.failover import Failover, QuotaAway, WatchedStore
from backend.quota.memory import MemoryStore
from backend.quota.redis import RedisStore
from backend.quota.sqlite import SqliteStore
from backend.quota.tiers import UNIT, Limit, Tier

# Past a call's deadline: what it takes to be answered and settled.
LEASE_MARGIN_S = 15.0
# A lease may end a little after its answer where its caller may begin so many more calls: in 10 ms
# no caller begins that many in other workers.
FAR = 32


@dataclass(frozen=True, slots=True)
class Lease:
    """A call that was let in, how its caller stands, and the store that holds it."""

    call: Call
    standing: Decision
    holder: WatchedStore

    @property
    def has_room(self) -> bool:
        """Whether its caller was far from as many calls at once as it may have."""
        return self.standing.running + FAR <= self.call.tier.concurrency


class Meter:
    """Decides on Redis where there is one, else on a file of this host; see ``Failover``.

    Where that does not work, ``CRANE_QUOTA_ON_OUTAGE`` says what happens: with ``local`` the file
    decides in place of Redis, and in place of the file this process's memory.
    """

    def __init__(self, config: Config) -> None:
        self._on_outage = config.quota_on_outage
        # A body may take as long to come as a call may then take, and no lease ends before its
        # call. A worker that is killed holds its leases until then.
        self._lease_ms = int((2 * config.request_timeout_s + LEASE_MARGIN_S) * 1000)
        sqlite = SqliteStore(config.data_dir / "quota.db")
        stores: list[Store] = [sqlite]
        if config.redis_url is not None:
            stores = [RedisStore(config.redis_url), sqlite]
        self._first = stores[0].name
        stores = [*stores, MemoryStore(config.workers)] if self._is_local else stores[:1]
        self._stores = Failover(stores, metrics.QUOTA_STORE_AWAY.set)

    @property
    def _is_local(self) -> bool:
        return self._on_outage == "local"

    def let_in(self, subject: str, tier: Tier, cost: int) -> Lease | None:
        """Spend ``cost`` thousandths and take a place among the caller's calls.

        None where quotas are not known and calls go on without. Raises ``RateLimitExceeded``,
        ``ConcurrencyLimitExceeded`` and ``QuotaUnavailable``, and has taken nothing then.
        """
        call = Call(subject, tier, secrets.token_hex(8), cost, self._lease_ms)
        try:
            standing, holder = self._stores.spend(call)
        except QuotaAway:
            self._check_may_go_without()
            return None
        self._count(standing, tier)
        if standing.refused_by is not None:
            raise refusal(tier, standing)
        return Lease(call, standing, holder)

    def reserve(self, lease: Lease, cost: int) -> Lease | None:
        """Have a call that was let in hold ``cost``, the most that it may come to.

        None where quotas are not known any more. Raises ``Forbidden`` for what the tier can never
        afford, ``RateLimitExceeded`` and ``QuotaUnavailable``; the call then holds what it held.
        """
        tier = lease.call.tier
        for limit in tier.limits:
            if cost > limit.units * UNIT:
                raise Forbidden(
                    f"This call costs up to {units(cost)} units, and the tier {tier.name!r} has "
                    f"{limit.units} per {limit.per}: ask for less at once."
                )
        raised = lease.call.raised(cost)
        try:
            standing, holder = self._stores.reserve(lease.call, raised, lease.holder)
        except QuotaAway:
            self._check_may_go_without()
            return None
        self._count(standing, tier)
        if standing.refused_by is not None:
            raise too_much(lease.call, standing, cost)
        return Lease(raised, standing, holder)

    def settle(self, lease: Lease, cost: int) -> Decision | None:
        """End a lease; the call costs ``cost``, whatever was spent for it before.

        None where its store is away, which will know of it when it is back. Where nothing changes
        but the lease, that may end with what its caller spends next: a step less for each call.
        """
        if cost == lease.call.cost and lease.has_room:
            lease.holder.end(lease.call)
            return lease.standing
        try:
            return lease.holder.settle(lease.call, cost)
        except QuotaAway:
            return None

    def look(self, subject: str, tier: Tier) -> Decision | None:
        """How a caller stands; None where that is not known."""
        try:
            return self._stores.look(subject, tier)
        except QuotaAway:
            return None

    def status(self) -> dict[str, object]:
        """For /readyz: the store that should decide, whether it is away, and who does decide."""
        decided_by = self._stores.deciding or self._on_outage
        return {"store": self._first, "away": self._stores.away, "decided_by": decided_by}

    @property
    def refuses_all(self) -> bool:
        return self._on_outage == "deny" and self._stores.away

    def close(self) -> None:
        self._stores.close()

    def _check_may_go_without(self) -> None:
        """Raise ``QuotaUnavailable`` where nobody may be let in while quotas are not known."""
        metrics.QUOTA_LOCAL.labels(self._on_outage).inc()
        if self._on_outage == "deny":
            raise QuotaUnavailable(
                "Quotas are not known now, so no call is let in; try again in 1 s.", retry_after_s=1
            )

    def _count(self, standing: Decision, tier: Tier) -> None:
        if self._stores.away:
            metrics.QUOTA_LOCAL.labels(self._on_outage).inc()
        if standing.refused_by is not None:
            metrics.QUOTA_REFUSALS.labels(tier.name, standing.refused_by).inc()


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


def too_much(call: Call, standing: Decision, cost: int) -> RateLimitExceeded:
    """A refusal of a call that was let in, and would cost more than is left."""
    wait_s = math.ceil(standing.retry_after_ms / 1000)
    limit, left = next(
        (limit, left)
        for limit, left in zip(call.tier.limits, standing.left, strict=True)
        if limit.name == standing.refused_by
    )
    return RateLimitExceeded(
        f"This call costs up to {units(cost)} units, and {units(left + call.cost)} are left of the "
        f"{limit.name} of the tier {call.tier.name!r}, {limit.units} per {limit.per}: ask for less "
        f"at once, or try again in {wait_s} s.",
        details={"limit": limit.name, "tier": call.tier.name, "cost": units(cost)},
        retry_after_s=wait_s,
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
