"""The prefix cache: keys and values of earlier prompts, for prompts that begin alike.

Whether a prefix is in the cache can be seen in ``cached_tokens`` and in the time to the first
token, so each caller has a cache of its own; only an entry with ``share_prefixes`` has one for all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

LEAST = 32  # tokens that a copy must save; it costs about as much as a few of them
STALE_S = 600.0  # unused for so long, a prefix goes first, whoever has least


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first ``length`` tokens of a prompt.

    ``layers`` has each layer's keys and values of them, [1, heads, length, features].
    """

    length: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(slots=True)
class _Kept:
    """A prompt in the cache: its token ids, [length], and the bytes of its keys and values."""

    caller: str
    ids: np.ndarray[Any, Any]
    prefix: Prefix
    size: int
    used_at: float


class Prefixes:
    """Keys and values of the prompts that were used last, ``max_bytes`` of all callers together.

    A caller finds its own prompts alone, unless they are ``shared``. When the cache is full, the
    caller that has most of it loses its own least recently used ones first.
    """

    def __init__(
        self, max_bytes: int, *, shared: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shared = shared
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: list[_Kept] = []  # the most recently used at the end

    def find(self, caller: str, prompt: list[int] | np.ndarray[Any, Any]) -> Prefix | None:
        """The longest beginning that a prompt has in common with one of its caller's."""
        wanted = np.array(prompt, np.int64)
        found, longest = None, LEAST - 1
        for one in self._own(caller):
            if (length := common(wanted, one.ids)) > longest:
                found, longest = one, length
        if found is None:
            return None
        found.used_at = self._clock()
        self._kept = [*(one for one in self._kept if one is not found), found]
        whole = found.prefix
        layers = [(keys[:, :, :longest], values[:, :, :longest]) for keys, values in whole.layers]
        return Prefix(longest, layers)

    def keep(self, caller: str, prompt: list[int], layers: list[tuple[torch.Tensor, ...]]) -> None:
        """Keep a copy of a prompt's keys and values in each layer, if it may have the memory."""
        length = len(prompt)
        if length < LEAST:
            return
        ids = np.array(prompt, np.int64)
        own = self._own(caller)
        if any(common(ids, one.ids) == length for one in own):
            return
        # A prompt that continues an earlier one includes it.
        included = {id(one) for one in own if common(ids, one.ids) == len(one.ids)}
        rest = [one for one in self._kept if id(one) not in included]
        size = sum(part.nbytes for pair in layers for part in pair)
        kept = self._beside(rest, self._whose(caller), size)
        if kept is None:
            return
        copies = [(keys.clone(), values.clone()) for keys, values in layers]
        new = _Kept(self._whose(caller), ids, Prefix(length, copies), size, self._clock())
        self._kept = [*kept, new]

    def _whose(self, caller: str) -> str:
        return "" if self.shared else caller

    def _own(self, caller: str) -> list[_Kept]:
        whose = self._whose(caller)
        return [one for one in self._kept if one.caller == whose]

    def _beside(self, kept: list[_Kept], caller: str, size: int) -> list[_Kept] | None:
        """What stays beside a new prompt of ``size`` bytes; None where it may not come in.

        Stale ones go first, then those of whoever has most, the new one counted. A caller that
        has most with the new one alone would take from those who have less: it may not.
        """
        if size > self._max_bytes:
            return None
        left = list(kept)
        held = Counter({caller: size})
        for one in left:
            held[one.caller] += one.size
        fresh_since = self._clock() - STALE_S
        while held.total() > self._max_bytes:
            out = left[0] if left and left[0].used_at < fresh_since else None
            if out is None:
                largest = max(held, key=lambda name: (held[name], name == caller))
                out = next((one for one in left if one.caller == largest), None)
            if out is None:
                return None
            left.remove(out)
            held[out.caller] -= out.size
        return left


def common(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    """How many tokens two prompts begin with alike."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most
