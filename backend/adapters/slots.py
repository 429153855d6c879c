"""Runs of a decoder over texts of different lengths, each of which has a slot in one cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from backend.adapters.prefixes import Prefix, Prefixes

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("crane.adapters")

STEP = 64  # columns by which the cache grows at least
# Of prompts that are run before those who are written get their next token: a fifth of a
# second for a model of 1 billion weights on a CPU, nothing on a GPU.
READ_TOKENS = 512


class Decoder:
    """A model, and the keys and values of the texts that are written with it.

    Text i has slot i of the cache, its tokens in columns from 0 on, so that none has padding
    however long the others are. ``read`` gives a text a slot; ``step`` runs one more token of each
    at once, in place; ``drop`` gives the slot of one that has ended to the last.
    """

    def __init__(self, model: Any, prefixes: Prefixes) -> None:
        self._model = model
        self._prefixes = prefixes
        self._slots = _make_slots()
        self.lengths: list[int] = []  # tokens of each text that were run
        known = inspect.signature(model.forward).parameters
        self._chooses_logits = "logits_to_keep" in known

    def read(
        self, prompts: list[list[int]], known: Prefix | None = None
    ) -> Iterator[torch.Tensor | None]:
        """Run over prompts at once, one after another in a row, and then give each the next slot.

        Last comes what may follow each of them, [prompts, vocabulary]. Before that it gives way,
        with None, and ``step`` may be called. All prompts begin with ``known``, whose keys and
        values are taken as they are, and go on after it. Raises ``TypeError`` for a model that
        keeps anything but each token's keys and values.
        """
        import torch
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self._model.config)
        first = known.length if known is not None else 0
        for index, (keys, values) in enumerate(known.layers if known is not None else ()):
            cache.update(keys, values, index)
        device = self._model.device
        rests = [prompt[first:] for prompt in prompts]
        tokens = torch.tensor([token for rest in rests for token in rest], device=device)
        owners = torch.repeat_interleave(
            torch.arange(len(rests), device=device),
            torch.tensor([len(rest) for rest in rests], device=device),
        )
        places = torch.cat([torch.arange(first, len(prompt), device=device) for prompt in prompts])
        ends = list(accumulate(len(rest) for rest in rests))
        scores = []
        for at in range(0, len(tokens), READ_TOKENS):
            part = slice(at, at + READ_TOKENS)
            inputs = {"input_ids": tokens[None, part]}
            if len(prompts) > 1:  # else it is a prompt like any other
                inputs["position_ids"] = places[None, part]
                inputs["attention_mask"] = self._only_own(owners, part, first)
            last = [end - 1 - at for end in ends if part.start < end <= part.stop]
            if self._chooses_logits:
                inputs["logits_to_keep"] = torch.tensor(last or [0], device=device)
            output = self._model(**inputs, past_key_values=cache, use_cache=True).logits[0]
            scores.append(output[: len(last)] if self._chooses_logits else output[last])
            yield None
        slot = len(self.lengths)
        self._slots.fill(slot, cache.layers, first, [len(rest) for rest in rests])
        for place, prompt in enumerate(prompts):
            self._prefixes.keep(prompt, self._slots.of(slot + place, len(prompt)))
        self.lengths += [len(prompt) for prompt in prompts]
        yield torch.cat(scores)

    def _only_own(self, owners: torch.Tensor, part: slice, first: int) -> torch.Tensor:
        """The mask with which each prompt in a row sees itself, and the ``first`` that all have."""
        import torch

        seen = torch.arange(-first, min(part.stop, len(owners)), device=owners.device)
        rows = seen[first:][part]
        own = owners[seen.clamp(min=0)] == owners[rows][:, None]
        unseen = (seen >= 0) & ~(own & (seen <= rows[:, None]))
        return self._masked(unseen)[None, None]

    def _masked(self, unseen: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of attention."""
        import torch

        mask = torch.zeros(unseen.shape, dtype=self._model.dtype, device=unseen.device)
        return mask.masked_fill_(unseen, torch.finfo(mask.dtype).min)

    def step(self, tokens: list[int]) -> torch.Tensor:
        """Run the next token of each text; the scores of what may follow, [texts, vocabulary]."""
        import torch

        device = self._model.device
        columns = torch.tensor(self.lengths, device=device)
        width = max(self.lengths) + 1
        unseen = torch.arange(width, device=device) > columns[:, None]
        self._slots.at(columns, width)
        output = self._model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=columns[:, None],
            attention_mask=self._masked(unseen)[:, None, None],
            past_key_values=self._slots,
            use_cache=True,
        )
        self.lengths = [length + 1 for length in self.lengths]
        scores: torch.Tensor = output.logits[:, -1]
        return scores

    def drop(self, slot: int) -> None:
        """Forget a text; the last one has its slot now."""
        last = len(self.lengths) - 1
        if slot < last:
            self._slots.move(last, slot, self.lengths[last])
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()


def _make_slots() -> Any:
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    class Slots(Cache):  # type: ignore[misc]  # transformers is not typed
        """Each layer's keys and values, [slots, heads, columns, features]."""

        def __init__(self) -> None:
            super().__init__(layers=[])
            self._parts: dict[int, list[torch.Tensor]] = {}
            self._rows = self._columns = torch.empty(0, dtype=torch.long)
            self._width = 0

        def fill(self, slot: int, layers: list[Any], first: int, lengths: list[int]) -> None:
            """Copy what another cache has in a row into the slots from ``slot`` on.

            The ``first`` columns are for all of them, then each has its own.
            """
            for index, layer in enumerate(layers):
                if type(layer) is not DynamicLayer:
                    raise TypeError(f"a {type(layer).__name__} is no list of keys and values")
                read = (layer.keys, layer.values)
                most = first + max(lengths) + 1
                parts = self._room(index, read, slot + len(lengths), most)
                for part, new in zip(parts, read, strict=True):
                    at = first
                    for place, length in enumerate(lengths, slot):
                        part[place, :, :first] = new[0, :, :first]
                        part[place, :, first : first + length] = new[0, :, at : at + length]
                        at += length

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

        def at(self, columns: torch.Tensor, width: int) -> None:
            """The next run writes a token of each slot into its column; it reads ``width``."""
            self._columns, self._width = columns, width
            self._rows = torch.arange(len(columns), device=columns.device)

        def update(
            self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, ...]:
            new = (keys, values)
            parts = self._room(layer, new, len(keys), self._width)
            for part, one in zip(parts, new, strict=True):
                part[self._rows, :, self._columns] = one[:, :, 0]
            return tuple(part[: len(keys), :, : self._width] for part in parts)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self._width - 1

        def _room(self, layer: int, like: Any, slots: int, columns: int) -> list[torch.Tensor]:
            """A layer's keys and values, with so many slots and columns at least."""
            parts = self._parts.get(layer)
            if parts is None or parts[0].shape[0] < slots or parts[0].shape[2] < columns:
                parts = self._parts[layer] = [
                    _grown(parts[place] if parts else None, one, slots, columns)
                    for place, one in enumerate(like)
                ]
            return parts

    return Slots()


def _grown(old: Any, like: Any, slots: int, columns: int) -> Any:
    """A tensor with more slots or columns, and what the old one has."""
    if old is not None:
        slots, columns = max(slots, old.shape[0]), max(columns, old.shape[2])
        if columns > old.shape[2]:
            columns = max(columns, old.shape[2] * 5 // 4)  # each growth copies it all
        if slots > old.shape[0]:
            slots = max(slots, old.shape[0] * 5 // 4)
    columns = -(-columns // STEP) * STEP
    new = like.new_zeros((slots, like.shape[1], columns, like.shape[3]))
    if old is not None:
        new[: old.shape[0], :, : old.shape[2]] = old
    return new


# Of a checkpoint's own generation settings: what ``generate`` does with them at each token, and
# ``Sampling`` does not.
_BEYOND = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "no_repeat_ngram_size",
    "remove_invalid_values",
    "renormalize_logits",
    "sequence_bias",
    "suppress_tokens",
    "watermarking_config",
)


def writes_like_alone(model: Any) -> bool:
    """Whether texts can be written in slots: it is tried out, on two of different lengths.

    Not with a model that keeps more, or less, than each token's keys and values, that counts
    positions in a way of its own, or whose ``generate`` does more than choose a token.
    """
    import torch

    wanted = model.generation_config
    if any(getattr(wanted, name, None) for name in _BEYOND):
        return False
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (size,), generator=draw).tolist() for size in (9, 4)]
    decoder = Decoder(model, Prefixes(0))
    try:
        with torch.inference_mode():
            *_, scores = decoder.read([text[:-2] for text in texts])
            _compare(scores, model, [text[:-2] for text in texts])
            for last in (-2, -1):
                scores = decoder.step([text[last] for text in texts])
            _compare(scores, model, texts)
    except Exception as error:
        logger.info("%s does not write in slots: %s", type(model).__name__, error)
        return False
    return True


def _compare(scores: Any, model: Any, texts: list[list[int]]) -> None:
    """Raise ``ValueError`` where scores are not those of the texts alone."""
    import torch

    for text, own in zip(texts, scores.float(), strict=True):
        alone = model(input_ids=torch.tensor([text], device=model.device)).logits[0, -1].float()
        # bfloat16 has 8 bits, and kernels add up in orders of their own.
        most = alone.abs().max() * (1e-3 if model.dtype == torch.float32 else 0.1)
        if not (own - alone).abs().max() <= most:
            raise ValueError("scores differ")
