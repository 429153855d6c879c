"""Quotas in Redis or Valkey, by one script and the server's own clock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from backend.quota.decisions import Call, Decision
from backend.quota.tiers import UNIT, Tier

# A server that nobody can connect to is away. One that answers late is only slow: to decide without
# it would let callers in twice, so each call waits for it, and an answer this late is none.
CONNECT_TIMEOUT_S = 0.5
ANSWER_TIMEOUT_S = 1.0
_SCRIPT = Path(__file__).with_name("quota.lua").read_text()
_SHA = hashlib.sha1(_SCRIPT.encode()).hexdigest()  # which is how Redis names a script


class RedisStore:
    """One key a caller, ``crane:quota:{subject}``, which expires when nothing of it counts."""

    name = "redis"

    def __init__(self, url: str, *, now: Callable[[], float] | None = None) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self.errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._now = now
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=ANSWER_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            # Once more where a connection was closed since it was last used, which is told at once.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        self._no_script = redis.exceptions.NoScriptError

    def spend(self, call: Call) -> Decision:
        return self._run("spend", call.tier, call)

    def reserve(self, call: Call, raised: Call) -> Decision:
        return self._run("reserve", call.tier, call, raised.lease, raised.cost)

    def settle(self, call: Call, cost: int) -> Decision:
        return self._run("settle", call.tier, call, "", cost)

    def look(self, subject: str, tier: Tier) -> Decision:
        return self._run("look", tier, Call(subject, tier, "", 0, 0))

    def ping(self) -> None:
        """Raise where the server does not answer, or cannot run the script."""
        self.look("ping", _PING)

    def close(self) -> None:
        self._redis.close()

    def _run(self, op: str, tier: Tier, call: Call, lease: str = "", cost: int = 0) -> Decision:
        """Run the script; ``lease`` and ``cost`` are what the call is to have from now on."""
        now = "" if self._now is None else int(self._now() * 1000)
        step: list[str | int] = [f"crane:quota:{{{call.subject}}}", op, now, tier.concurrency]
        step += [call.lease, call.lease_ms, call.cost, lease, cost]
        step.append(",".join(call.ended) if op == "spend" else "")
        for limit in tier.limits:
            step += [limit.units * UNIT, limit.window_s * 1000]
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
