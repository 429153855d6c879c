"""Options that pictures, films and meshes have alike, for diffusion makes them all."""

from __future__ import annotations

from backend.schemas import Boolean, Integer, Number, Text
from backend.tasks.base import MAX_SEED, about


def side(what: str) -> Integer:
    return Integer(low=8, high=4096, load_default=None, allow_none=True, metadata=about(what))


def denoising_steps() -> Integer:
    metadata = about("denoising steps")
    return Integer(low=1, high=200, load_default=None, allow_none=True, metadata=metadata)


def guidance(what: str = "how closely the prompt is followed") -> Number:
    return Number(low=0.0, high=50.0, load_default=None, allow_none=True, metadata=about(what))


def without(made: str) -> Text:
    metadata = about(f"what the {made} shall not have; an input's own goes before it")
    return Text(blank=True, load_default=None, allow_none=True, metadata=metadata)


def first_seed(each: str) -> Integer:
    metadata = about(f"draws repeat with it; {each} uses seed + i")
    return Integer(low=0, high=MAX_SEED, load_default=None, allow_none=True, metadata=metadata)


def cut_prompt() -> Boolean:
    what = "cut a prompt that is longer than the model reads, instead of refusing it"
    return Boolean(load_default=False, metadata=about(what))
