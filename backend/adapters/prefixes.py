"""What was read of earlier prompts, for prompts that begin alike: the same instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

LEAST = 32  # tokens that a copy must save; it costs about as much as a few of them


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first ``length`` tokens of a prompt.

    ``layers`` has each layer's keys and values of them, [1, heads, length, features].
    """

    length: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]


class Prefixes:
    """Keys and values of the prompts that were used last, in so many bytes at most."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: list[tuple[np.ndarray[Any, Any], Prefix, int]] = []  # the last used at the end

    def find(self, prompt: list[int]) -> Prefix | None:
        """The longest beginning that a prompt has in common with one before it."""
        wanted = np.array(prompt, np.int64)
        lengths = [_common(wanted, ids) for ids, _, _ in self._kept]
        longest = max(lengths, default=0)
        if longest < LEAST:
            return None
        found = self._kept.pop(lengths.index(longest))
        self._kept.append(found)
        whole = found[1]
        layers = [(keys[:, :, :longest], values[:, :, :longest]) for keys, values in whole.layers]
        return Prefix(longest, layers)

    def keep(self, prompt: list[int], layers: list[tuple[torch.Tensor, ...]]) -> None:
        """Keep a copy of a prompt's keys and values in each layer."""
        length = len(prompt)
        if length < LEAST:
            return
        ids = np.array(prompt, np.int64)
        # One that goes on from another has all of it.
        kept = [one for one in self._kept if _common(ids, one[0]) < len(one[0])]
        if any(_common(ids, one[0]) == length for one in kept):
            return
        size = sum(part.nbytes for pair in layers for part in pair)
        if size > self._most_bytes:
            return
        used = size + sum(one[2] for one in kept)
        while used > self._most_bytes:
            used -= kept.pop(0)[2]
        copies = [(keys.clone(), values.clone()) for keys, values in layers]
        self._kept = [*kept, (ids, Prefix(length, copies), size)]


def _common(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    """How many tokens two prompts begin with alike."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most
