"""Whose load is next: callers have their loads in turn, however many models each of them calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Generic, Protocol, TypeVar


class Load(Protocol):
    """A load that waits."""

    @property
    def callers(self) -> Collection[str]:
        """Who waits for it just now; nobody for one that was ordered."""


T = TypeVar("T", bound=Load)


class LoadTurns(Generic[T]):
    """Each caller's next load comes after one of each other caller that waits too.

    So one caller that has many models loaded, and unloaded again by its ``keep_alive``, holds up
    another's load for the one that is going on and one more. It needs its owner's lock.
    """

    def __init__(self) -> None:
        self._order: dict[str, None] = {}  # the callers that wait, whose turn is next first

    def first(self, waiting: Sequence[T]) -> T:
        """The next of those that wait, in the order in which they came; there must be one."""
        callers = [_callers(load) for load in waiting]
        present = dict.fromkeys(caller for some in callers for caller in some)
        self._order = {one: None for one in self._order if one in present} | present
        rank = {caller: turn for turn, caller in enumerate(self._order)}
        ranks = [min(map(rank.__getitem__, some)) for some in callers]
        return waiting[ranks.index(min(ranks))]

    def begins(self, load: T) -> None:
        """A load begins: its callers' next turn comes after all others'."""
        for caller in _callers(load):
            self._order.pop(caller, None)
            self._order[caller] = None


def _callers(load: Load) -> list[str]:
    return list(load.callers) or [""]
