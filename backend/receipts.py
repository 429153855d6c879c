"""What a receipt says of an engine's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.engine.calls import Answer, total


def common(applied: list[dict[str, Any]]) -> dict[str, Any]:
    """What the model chose for options that were left to it, where all inputs agree."""
    first = applied[0]
    return {name: first[name] for name in first if all(one[name] == first[name] for one in applied)}


def facts(answer: Answer, *, batched: bool) -> dict[str, Any]:
    """What an answer tells of its outputs, in lists for a batch, and its ``usage``."""
    told: dict[str, Any] = {}
    for name in sorted({name for facts in answer.facts for name in facts}):
        values = [facts.get(name) for facts in answer.facts]
        told[name] = values if batched else values[0]
    told["usage"] = total(answer.usage)
    return told


def rounded(values: Mapping[str, float], digits: int = 2) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
