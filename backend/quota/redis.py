"""Quotas in Redis or Valkey, by one script and the server's own clock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from backend.quota.decisions import Call, Decision
from backend.quota.tiers import UNIT, Tier

# On the same machine or network a step takes a fraction of a millisecond; who waits longer has no
# Redis. Half a second is the most that a call may take because of it, connecting included.
TIMEOUT_S = 0.2
_SCRIPT = Path(__file__).with_name("quota.lua").read_text()
_SHA = hashlib.sha1(_SCRIPT.encode()).hexdigest()  # which is how Redis names a script


class RedisStore:
    """One key a caller, ``crane:quota:{subject}``, which expires when nothing of it counts."""

    def __init__(self, url: str, *, now: Callable[[], float] | None = None) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._now = now
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # Once more where a connection was closed since it was last used, which is told at once.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        self._no_script = redis.exceptions.NoScriptError

    def spend(self, call: Call) -> Decision:
        return self._run(call.tier, self._step("spend", call.subject, call.tier, call))

    def settle(self, call: Call, at: int, cost: int) -> Decision:
        step = self._step("settle", call.subject, call.tier, call, at, cost)
        return self._run(call.tier, step)

    def look(self, subject: str, tier: Tier) -> Decision:
        return self._run(tier, self._step("look", subject, tier))

    def ping(self) -> None:
        """Raise where the server does not answer, or cannot run the script."""
        self.look("ping", _PING)

    def close(self) -> None:
        self._redis.close()

    def _step(
        self,
        op: str,
        subject: str,
        tier: Tier,
        call: Call | None = None,
        at: int = 0,
        cost: int = 0,
    ) -> list[str | int]:
        """The script's key and its arguments."""
        now = "" if self._now is None else int(self._now() * 1000)
        step: list[str | int] = [f"crane:quota:{{{subject}}}", op, now, tier.concurrency]
        step += [call.lease, call.lease_ms, call.cost] if call else ["", 0, 0]
        step += [at, cost, ",".join(call.ended) if call else ""]
        for limit in tier.limits:
            step += [limit.units * UNIT, limit.window_s * 1000]
        return step

    def _run(self, tier: Tier, step: list[str | int]) -> Decision:
        # Not by a Script of the library, which takes 25 µs more.
        try:
            answer = self._redis.evalsha(_SHA, 1, *step)
        except self._no_script:  # a server that is new, or was flushed
            answer = self._redis.eval(_SCRIPT, 1, *step)
        at, refused, retry_after_ms, running, *limits = answer
        refused_by = None
        if refused:
            refused_by = "concurrency" if refused < 0 else tier.limits[refused - 1].name
        left, reset_ms = tuple(limits[0::2]), tuple(limits[1::2])
        return Decision(at, refused_by, retry_after_ms, left, reset_ms, running)


_PING = Tier("ping", (), 1)
