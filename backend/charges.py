"""What one call is charged: a unit at first, then the most that it may come to, then what it did.

A call costs what it used. One that began to run and has no receipt (it failed, or its caller left)
costs what was reserved, or what it had used by then if that is more: some of what is reserved is a
guess. One that nothing ran of costs the unit.
"""

from __future__ import annotations

from collections.abc import Mapping

from backend.errors import CraneError, InvalidRequest
from backend.meter import Lease, Meter, quota_headers
from backend.quota.costs import Cost
from backend.quota.decisions import Decision
from backend.quota.tiers import UNIT


class Charge:
    """A call that was let in for a unit, before its body was read, until it is settled.

    ``lease`` is None where quotas are not known and calls go on without.
    """

    def __init__(self, meter: Meter, lease: Lease | None) -> None:
        self._meter = meter
        self._lease = lease
        self._tier = None if lease is None else lease.call.tier
        self._standing: Decision | None = None if lease is None else lease.standing
        self._cost = Cost()
        self._inputs = 0
        self._due = UNIT

    def reserve(self, cost: Cost, inputs: int, usage: Mapping[str, float]) -> None:
        """Hold what a call costs that may use as much as ``usage``; from now on it may run.

        Raises ``Forbidden``, ``RateLimitExceeded`` and ``QuotaUnavailable``.
        """
        self._cost, self._inputs = cost, inputs
        most = cost.of(usage, inputs)
        if self._lease is not None and most > UNIT:
            self._lease = self._meter.reserve(self._lease, most)
            self._standing = None if self._lease is None else self._lease.standing
        self._due = most

    def ran(self, usage: Mapping[str, float]) -> None:
        """The call is answered, and used so much."""
        self._due = self._cost.of(usage, self._inputs)

    def failed(self, error: CraneError) -> None:
        """The engine gave an error for an answer, or nobody waits for one any more."""
        if error.usage is None:  # nothing of it ran
            self._due = UNIT
            return
        least = UNIT if isinstance(error, InvalidRequest) else self._due
        self._due = max(least, self._cost.of(error.usage, self._inputs))

    def settle(self) -> None:
        """Have the call cost what it is to, once, whatever became of it."""
        lease, self._lease = self._lease, None
        if lease is not None:
            self._standing = self._meter.settle(lease, self._due)

    def headers(self) -> dict[str, str]:
        """How the caller stands now; nothing where that is not known."""
        if self._tier is None or self._standing is None:
            return {}
        return quota_headers(self._tier, self._standing)
