"""Runs of a decoder over texts of different lengths, each of which has a slot in one cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from backend.adapters.prefixes import Prefix, Prefixes

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("crane.adapters")

STEP = 64  # columns by which the cache grows at least
# Of prompts, padded, that are run before those who are written get their next token: a fifth of a
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
        # All that a run over a prompt is for is its keys and values.
        known = inspect.signature(model.forward).parameters
        self._no_logits = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def read(self, prompts: list[list[int]], known: Prefix | None = None) -> Iterator[None]:
        """Run over prompts at once, and then give each the next slot; an empty one has no run.

        It is done when the iterator ends; whenever that gives way, ``step`` may be called between.
        All prompts begin with ``known``, whose keys and values are taken as they are. Raises
        ``TypeError`` for a model that keeps anything but each token's keys and values.
        """
        import torch
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self._model.config)
        start, width = 0, max(map(len, prompts))
        if known is not None:
            start = known.length
            for index, (keys, values) in enumerate(known.layers):
                shape = (len(prompts), -1, -1, -1)
                cache.update(keys.expand(shape), values.expand(shape), index)
        # What follows a prompt, it does not see: nothing has to be masked.
        ids = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(ids, dtype=torch.long, device=self._model.device)
        most = max(1, READ_TOKENS // len(prompts))
        for at in range(start, width, most):
            part = tokens[:, at : at + most]
            self._model(input_ids=part, past_key_values=cache, use_cache=True, **self._no_logits)
            yield
        lengths = [len(prompt) for prompt in prompts]
        if width:
            self._slots.fill(len(self.lengths), cache.layers, lengths)
            for row, prompt in enumerate(prompts):
                self._prefixes.keep(prompt, cache.layers, row)
        self.lengths += lengths

    def step(self, tokens: list[int]) -> torch.Tensor:
        """Run the next token of each text; the scores of what may follow, [texts, vocabulary]."""
        import torch

        device = self._model.device
        columns = torch.tensor(self.lengths, device=device)
        width = max(self.lengths) + 1
        unseen = torch.arange(width, device=device) > columns[:, None]
        mask = torch.zeros(unseen.shape, dtype=self._model.dtype, device=device)
        mask.masked_fill_(unseen, torch.finfo(mask.dtype).min)
        self._slots.at(columns, width)
        output = self._model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=columns[:, None],
            attention_mask=mask[:, None, None],
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

        def fill(self, slot: int, layers: list[Any], lengths: list[int]) -> None:
            """Copy rows of another cache into the slots from ``slot`` on."""
            for index, layer in enumerate(layers):
                if type(layer) is not DynamicLayer:
                    raise TypeError(f"a {type(layer).__name__} is no list of keys and values")
                read = (layer.keys, layer.values)
                parts = self._room(index, read, slot + len(lengths), max(lengths) + 1)
                for part, new in zip(parts, read, strict=True):
                    for row, length in enumerate(lengths):
                        part[slot + row, :, :length] = new[row, :, :length]

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
            for _ in decoder.read([text[:-2] for text in texts]):
                pass
            for last in (-2, -1):
                together = decoder.step([text[last] for text in texts]).float()
            for text, scores in zip(texts, together, strict=True):
                ids = torch.tensor([text], device=model.device)
                alone = model(input_ids=ids).logits[0, -1].float()
                # bfloat16 has 8 bits, and kernels add up in orders of their own.
                most = alone.abs().max() * (1e-3 if model.dtype == torch.float32 else 0.1)
                if not (scores - alone).abs().max() <= most:
                    raise ValueError("scores differ")
    except Exception as error:
        logger.info("%s does not write in slots: %s", type(model).__name__, error)
        return False
    return True
