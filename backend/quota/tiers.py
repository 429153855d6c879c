"""Tiers: what the callers of each may spend, and how many calls they may have at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Costs are counted in thousandths of a unit, as whole numbers, so that sums of them are exact and
# the same in Lua as in Python.
UNIT = 1000

_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
DEFAULT_CONCURRENCY = 100
MAX_UNITS = 1_000_000_000

_TERM = re.compile(
    r"((?P<what>concurrency|budget)=)?(?P<count>[0-9]{1,10})(/(?P<per>second|minute|hour|day))?"
)
_PER: dict[str | None, set[str | None]] = {
    None: set(_SECONDS),
    "budget": {"day"},
    "concurrency": {None},
}
_NAME = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,31})(?:\s*[:=]\s*|\s+)(.+)")


@dataclass(frozen=True, slots=True)
class Limit:
    """At most so many units within any ``window_s`` seconds."""

    name: str  # "rate" or "budget"
    units: int
    window_s: int

    @property
    def per_second(self) -> float:
        return self.units / self.window_s

    @property
    def per(self) -> str:
        names = {seconds: name for name, seconds in _SECONDS.items()}
        return names[self.window_s]


@dataclass(frozen=True, slots=True)
class Tier:
    """What its callers may: a rate, perhaps a daily budget, and so many calls at once."""

    name: str
    limits: tuple[Limit, ...]
    concurrency: int


def tiers(text: str) -> dict[str, Tier]:
    """Read ``free 60/minute, pro 600/minute concurrency=50 budget=10000/day``."""
    found: dict[str, Tier] = {}
    for part in (part.strip() for part in re.split(r"[,;]", text)):
        if not part:
            continue
        tier = _tier(part)
        if tier.name in found:
            raise ValueError(f"has the tier {tier.name!r} twice")
        found[tier.name] = tier
    if "free" not in found:
        raise ValueError("must have a tier 'free', which is that of callers without a key")
    return found


def _tier(text: str) -> Tier:
    match = _NAME.fullmatch(text)
    if not match:
        raise ValueError(f"must be tiers such as 'free 60/minute, pro 600/minute', not {text!r}")
    name, terms = match.groups()
    told: dict[str, tuple[int, int]] = {}
    for term in terms.split():
        found = _TERM.fullmatch(term)
        if found is None or found["per"] not in _PER[found["what"]]:
            raise ValueError(
                f"has {term!r} for {name!r}; a tier has a rate (60/minute, or per second, hour or "
                "day), and if you like concurrency=8 and budget=1000/day"
            )
        what, count = found["what"] or "rate", int(found["count"])
        if what in told:
            raise ValueError(f"has two terms for the {what} of {name!r}")
        if not 1 <= count <= MAX_UNITS:
            raise ValueError(f"has {term!r} for {name!r}, which must be from 1 to {MAX_UNITS}")
        told[what] = count, _SECONDS.get(found["per"], 0)
    if "rate" not in told:
        raise ValueError(f"has no rate for {name!r}, such as 60/minute")
    limits = tuple(Limit(what, *told[what]) for what in ("rate", "budget") if what in told)
    return Tier(name, limits, told.get("concurrency", (DEFAULT_CONCURRENCY, 0))[0])


DEFAULT_TIERS = "free 60/minute concurrency=60, pro 600/minute concurrency=100"
