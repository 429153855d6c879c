"""Runs of a decoder over texts of different lengths, each of which has a slot in one cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from backend.adapters.prefixes import Prefix

if TYPE_CHECKING:
    import torch

# Columns by which the cache grows at least: kernels are made anew for each number of them.
STEP = 32
PADDED = 2  # tokens of a group that attends at once, with its padding, for each of its own
ATTENTION = "crane_slots"  # by which transformers knows ``attend``


@dataclass(frozen=True, slots=True)
class Layout:
    """What ``Decoder`` has to know of a model."""

    windows: tuple[int | None, ...]  # of each layer: how many tokens back it looks, its own too
    chooses_logits: bool  # whether it can be told of which tokens scores are wanted


class Decoder:
    """A model, and the keys and values of the texts that are written with it.

    Text i has slot i of the cache, its tokens in columns from 0 on, so that none has padding
    however long the others are. ``add`` gives a text the next slot; ``run`` runs tokens of all
    texts at once; ``drop`` gives the slot of one that has ended to the last.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        self._slots = _slots_class()(layout.windows, model)
        self.lengths: list[int] = []  # tokens of each text that were run

    def add(self, known: Prefix | None = None) -> None:
        """Give a text the next slot; what is known of its beginning counts as run."""
        if known is not None:
            self._slots.fill(len(self.lengths), known)
        self.lengths.append(known.length if known is not None else 0)

    def run(self, tokens: list[list[int]]) -> torch.Tensor:
        """Run the next tokens of each text, one at least; the scores of what may follow the last.

        They are [texts, vocabulary]. The tokens are one row, text after text, so that a prompt is
        read in the same run in which other texts get one token more.
        """
        import torch

        device = self._model.device
        counts = [len(some) for some in tokens]
        row = torch.tensor([token for some in tokens for token in some], device=device)
        columns = self._slots.prepare(self.lengths, counts, device)
        last = torch.tensor([end - 1 for end in accumulate(counts)], device=device)
        wanted = {"logits_to_keep": last} if self._layout.chooses_logits else {}
        with _attention(self._model.config):
            output = self._model(
                input_ids=row[None],
                position_ids=columns[None],
                past_key_values=self._slots,
                use_cache=True,
                slots=self._slots,
                **wanted,
            )
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        scores: torch.Tensor = output.logits[0]
        return scores if wanted else scores[last]

    def layers(self, slot: int) -> list[tuple[torch.Tensor, ...]]:
        """Each layer's keys and values of a text, [1, heads, length, features]."""
        layers: list[tuple[torch.Tensor, ...]] = self._slots.of(slot, self.lengths[slot])
        return layers

    def clear(self) -> None:
        """Have nothing left of texts that were dropped.

        Nobody looks at it, but a masked value that is no number makes no number of a sum as well.
        """
        self._slots.clear(self.lengths)

    def drop(self, slot: int) -> None:
        """Forget a text; the last one has its slot now."""
        last = len(self.lengths) - 1
        if slot < last:
            self._slots.move(last, slot, self.lengths[last])
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    """Have a model of transformers attend by slots; ``generate`` has its own way again after."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


class _Group:
    """Slots next to each other that attend at once, each with as many tokens."""

    def __init__(
        self,
        first: int,
        lengths: list[int],
        starts: list[int],
        counts: list[int],
        device: torch.device,
        products: int | None,
    ) -> None:
        """``starts`` are where the tokens of each are in the row, and ``counts`` how many.

        ``products`` are the columns of the cache if those with one token each attend to all of
        them, as ``_found`` has it.
        """
        import torch

        most = max(counts)
        self.shape = len(lengths), most
        whole = products if most == 1 else None
        self.by_products = whole is not None
        self._width = whole or max(map(sum, zip(lengths, counts, strict=True)))
        # Of keys and values, what any of them sees.
        self.seen = slice(first, first + len(lengths)), slice(None), slice(self._width)
        # Who has fewer than others asks for its last again, which gives the same again.
        each = [[min(i, count - 1) for i in range(most)] for count in counts]
        offsets = torch.tensor(each, device=device)
        self._columns = torch.tensor(lengths, device=device)[:, None] + offsets
        self.places: slice | torch.Tensor  # in the row, [slots * tokens]
        end = starts[0] + len(starts) * most
        if min(counts) == most and starts == list(range(starts[0], end, most)):
            self.places = slice(starts[0], end)
        else:
            self.places = (torch.tensor(starts, device=device)[:, None] + offsets).flatten()
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of attention, [slots, 1, tokens, width]."""
        import torch

        if window not in self._masks:
            own = self._columns[:, :, None]
            seen = torch.arange(self._width, device=own.device)
            unseen = seen > own
            if window is not None:
                unseen |= seen <= own - window
            mask = torch.zeros(unseen.shape, dtype=dtype, device=own.device)
            self._masks[window] = mask.masked_fill_(unseen, torch.finfo(dtype).min)[:, None]
        return self._masks[window]


@cache
def _slots_class() -> Any:
    import torch
    from transformers import AttentionInterface
    from transformers.cache_utils import Cache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    class Slots(Cache):  # type: ignore[misc]  # transformers is not typed
        """Each layer's keys and values, [slots, heads, columns, features]."""

        def __init__(self, windows: tuple[int | None, ...], model: Any) -> None:
            super().__init__(layers=[])
            self._windows = windows
            self._dtype = model.dtype
            self._by_products = (
                model.device.type == "cpu"
                and model.dtype == torch.bfloat16
                and torch.backends.cpu.get_cpu_capability() == "AVX512"
            )
            self._parts: dict[int, list[torch.Tensor]] = {}
            self._layer = 0
            self._rows = self._columns = torch.empty(0, dtype=torch.long)
            self._size = 0, 0  # slots and columns that there is room for
            self._groups: list[_Group] = []

        def prepare(
            self, lengths: list[int], counts: list[int], device: torch.device
        ) -> torch.Tensor:
            """The next run has so many tokens of each slot, after ``lengths``; their columns."""
            rows = [slot for slot, count in enumerate(counts) for _ in range(count)]
            columns = [
                length + i
                for length, count in zip(lengths, counts, strict=True)
                for i in range(count)
            ]
            self._rows = torch.tensor(rows, device=device)
            self._columns = torch.tensor(columns, device=device)
            self._fit(len(counts), max(columns) + 1)
            # Products would copy a part of the columns first.
            products = self._size[1] if self._by_products else None
            self._groups = _groups(lengths, counts, device, products)
            return self._columns

        def _fit(self, slots: int, columns: int) -> None:
            """Have room for so many slots and columns, and not for many more columns."""
            room, width = self._size
            fits = width // 2 < columns <= width
            if fits and slots <= room:
                return
            if fits:
                slots = max(slots, room * 5 // 4)  # each growth copies it all
            else:
                step = STEP * max(1, columns // (16 * STEP))
                width = -(-columns // step) * step
            self._size = slots, width
            for parts in self._parts.values():
                for place, part in enumerate(parts):
                    parts[place] = self._room(part)
                    kept = tuple(map(slice, map(min, part.shape, parts[place].shape)))
                    parts[place][kept] = part[kept]

        def _room(self, like: torch.Tensor) -> torch.Tensor:
            """Empty room for a layer's keys or values, which are like these."""
            _, heads, _, features = like.shape
            slots, columns = self._size
            return like.new_zeros((slots, heads, columns, features))

        def fill(self, slot: int, known: Prefix) -> None:
            """Copy what is known of a text's beginning into its slot."""
            self._fit(slot + 1, max(known.length + 1, self._size[1]))
            for layer, pair in enumerate(known.layers):
                for part, new in zip(self._kept(layer, pair), pair, strict=True):
                    part[slot, :, : known.length] = new[0]

        def of(self, slot: int, length: int) -> list[tuple[torch.Tensor, ...]]:
            """Each layer's keys and values of a slot, [1, heads, length, features]."""
            return [
                tuple(part[slot : slot + 1, :, :length] for part in parts)
                for parts in self._parts.values()
            ]

        def move(self, slot: int, to: int, length: int) -> None:
            for parts in self._parts.values():
                for part in parts:
                    part[to, :, :length] = part[slot, :, :length]

        def clear(self, lengths: list[int]) -> None:
            for parts in self._parts.values():
                for part in parts:
                    part[len(lengths) :] = 0
                    for slot, length in enumerate(lengths):
                        part[slot, :, length:] = 0

        def update(
            self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Keep what a run has made; ``attend``, which comes next, finds it."""
            new = (keys, values)
            for part, one in zip(self._kept(layer, new), new, strict=True):
                part[self._rows, :, self._columns] = one[0].transpose(0, 1)
            self._layer = layer
            return new

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0  # each text has its own, which the positions tell

        def attend(self, module: Any, query: torch.Tensor, **how: Any) -> torch.Tensor:
            """What each token of a row finds in its text, [1, tokens, heads, features]."""
            row = query[0].transpose(0, 1)
            found = []
            for group in self._groups:
                asked = row[group.places].reshape(*group.shape, *row.shape[1:]).transpose(1, 2)
                keys, values = (part[group.seen] for part in self._parts[self._layer])
                window = self._windows[self._layer]
                if group.by_products:
                    mask = group.mask(window, torch.float32)
                    found.append(_found(asked, keys, values, mask, how.get("scaling")))
                    continue
                mask = group.mask(window, self._dtype)
                output, _ = sdpa_attention_forward(module, asked, keys, values, mask, **how)
                found.append(output.flatten(0, 1))
            if len(found) == 1 and type(group.places) is slice:
                return found[0][None]
            whole = query.new_empty(len(row), *found[0].shape[1:])
            for group, own in zip(self._groups, found, strict=True):
                whole[group.places] = own
            return whole[None]

        def _kept(self, layer: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            """A layer's keys and values."""
            if layer not in self._parts:
                self._parts[layer] = [self._room(one) for one in like]
            return self._parts[layer]

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        slots: Slots,
        **how: Any,
    ) -> tuple[torch.Tensor, None]:
        return slots.attend(module, query, **how), None

    AttentionInterface.register(ATTENTION, attend)
    return Slots


def _found(asked: Any, keys: Any, values: Any, mask: Any, scaling: float | None) -> Any:
    """What one token of each slot finds, [slots, heads, features].

    ``asked`` is [slots, heads, 1, features], and ``mask`` in float32, as the weights are computed.
    PyTorch's own attention makes a product for each head of each slot, which for one vector in
    bfloat16 takes twice as long, or more, as one product of them all; with AVX2 alone it takes
    less. The keys come first, as they lie in the cache: the other way round takes twice as long.
    """
    import torch

    slots, heads, _, features = asked.shape
    asked = asked.view(slots, keys.shape[1], -1, features)  # who shares keys is side by side
    scores = (keys @ asked.transpose(2, 3)).transpose(2, 3)
    scaling = features**-0.5 if scaling is None else scaling
    weights = torch.add(mask, scores, alpha=scaling).softmax(-1).to(values.dtype)
    return (weights @ values).view(slots, heads, -1)


def _groups(
    lengths: list[int], counts: list[int], device: torch.device, products: int | None
) -> list[_Group]:
    """All slots, in groups of as like counts of tokens as ``PADDED`` wants."""
    groups: list[_Group] = []
    starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    first, most, tokens = 0, 0, 0
    for slot, count in enumerate([*counts, 0]):
        most, tokens = max(most, count), tokens + count
        if slot == len(counts) or (slot - first + 1) * most > PADDED * tokens:
            here = slice(first, slot)
            own = lengths[here], starts[here], counts[here]
            groups.append(_Group(first, *own, device, products))
            first, most, tokens = slot, count, count
    return groups
