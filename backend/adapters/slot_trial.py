"""Whether texts can be written in slots with a model: it is tried out."""

from __future__ import annotations

import inspect
import json
import logging
from typing import Any

from backend.adapters.slots import Decoder, Layout
from backend.engine import turns

logger = logging.getLogger("crane.adapters")

# What was tried out and did well: a later load of the like need not be, which takes several runs.
_TRIED: set[tuple[Any, ...]] = set()

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


def layout_of(model: Any) -> Layout | None:
    """How texts are written in slots; None where they cannot be, which shows with two of them.

    Not with a model that keeps more, or less, than each token's keys and values, that counts
    positions or attends in a way of its own, or whose ``generate`` does more than choose a token.
    """
    wanted = model.generation_config
    if any(getattr(wanted, name, None) for name in _BEYOND):
        return None
    try:
        layout = Layout(
            windows=_windows(model),
            chooses_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
        )
        if (like := _like(model)) not in _TRIED:
            _try_out(model, layout)
            _TRIED.add(like)
    except Exception as error:
        logger.info("%s does not write in slots: %s", type(model).__name__, error)
        return None
    return layout


def _windows(model: Any) -> tuple[int | None, ...]:
    """How far back each layer looks, as ``generate`` knows it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config
    if config._attn_implementation != "sdpa":
        raise ValueError(f"its attention is {config._attn_implementation}")
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise ValueError("its attention is in chunks")
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(f"a {type(layer).__name__} is no list of keys and values")
        windows.append(getattr(layer, "sliding_window", None))
    return tuple(windows)


def _like(model: Any) -> tuple[Any, ...]:
    """What two models have in common that write alike, whatever their weights are."""
    settings = model.config.to_dict()
    settings.pop("_name_or_path", None)
    return type(model), model.dtype, model.device.type, json.dumps(settings, default=str)


def _try_out(model: Any, layout: Layout) -> None:
    """Read one text, then another while the first goes on; then both go on."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randint(vocabulary, (size,), generator=draw).tolist() for size in (9, 5))
    decoder = Decoder(model, layout)
    with turns.hold(model.device.type), torch.inference_mode():
        decoder.add()
        _compare(decoder.run([one[:7]]), model, [one[:7]])
        decoder.add()
        turns.offer()
        _compare(decoder.run([one[7:8], other[:4]]), model, [one[:8], other[:4]])
        turns.offer()
        _compare(decoder.run([one[8:], other[4:]]), model, [one, other])


def _compare(scores: Any, model: Any, texts: list[list[int]]) -> None:
    """Raise ``ValueError`` where scores are not those of the texts alone."""
    import torch

    for text, own in zip(texts, scores.float(), strict=True):
        alone = model(input_ids=torch.tensor([text], device=model.device)).logits[0, -1].float()
        # bfloat16 has 8 bits, and kernels add up in orders of their own.
        most = alone.abs().max() * (1e-3 if model.dtype == torch.float32 else 0.1)
        if not (own - alone).abs().max() <= most:
            raise ValueError("scores differ")
