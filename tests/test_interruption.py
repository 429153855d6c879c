"""A diffusion run ends within its parts once nobody waits, and its large pictures are in tiles."""

from __future__ import annotations

import numpy as np
import pytest

from backend.adapters import ADAPTERS, interruption
from backend.adapters.base import Batch
from backend.errors import DeadlineExceeded
from tests.checkpoints import checkpoint
from tests.pictures import mask, picture

__all__ = ["checkpoint"]

TYPES = ("text-to-image", "image-to-image", "inpainting")
SIDE = 64


@pytest.fixture
def load(make_app, checkpoint):
    """Load an adapter of a tiny checkpoint; it is unloaded at the end."""
    loaded = []

    def make(type_, family="stable_diffusion"):
        entry = {"id": "model", "type": type_, "hf_model": checkpoint(family)}
        spec = make_app([entry]).extensions["crane"].registry.get("model")
        adapter = ADAPTERS[type_](spec, device="cpu", dtype="float32")
        adapter.load()
        loaded.append(adapter)
        return adapter

    yield make
    for adapter in loaded:
        adapter.unload()


def batch_of(adapter, cancelled=lambda place: False, side=SIDE, **options):
    value = {"prompt": "red", "negative_prompt": None}
    if adapter.spec.type in ("image-to-image", "inpainting", "image-to-video"):
        value["image"] = np.asarray(picture(side, side))
    if adapter.spec.type == "inpainting":
        value["mask"] = np.asarray(mask(side, side))
    return Batch(
        inputs=[value],
        options={**adapter.spec.options_schema.load({}), "num_inference_steps": 2, **options},
        seeds=[1],
        cancelled=cancelled,
        progress=lambda *_: None,
    )


def first_and_last(part):
    """The first and the last layer of a VAE's encoder or decoder to run."""
    return part.conv_in, part.conv_out


@pytest.mark.parametrize(
    ("type_", "part"),
    [
        ("text-to-image", "decoder"),
        ("image-to-image", "encoder"),
        ("image-to-image", "decoder"),
        ("inpainting", "encoder"),
        ("inpainting", "decoder"),
    ],
)
def test_encoding_and_decoding_end_once_nobody_waits(load, type_, part):
    adapter = load(type_)
    began, ended = [], []
    first, last = first_and_last(getattr(adapter.pipeline.vae, part))
    first.register_forward_hook(lambda *_: began.append(1))
    last.register_forward_hook(lambda *_: ended.append(1))
    [result] = adapter.predict(batch_of(adapter, lambda place: bool(began), **sides(type_)))
    assert isinstance(result, DeadlineExceeded)
    assert (len(began), ended) == (1, [])
    # And the next run has all of it.
    [result] = adapter.predict(batch_of(adapter, **sides(type_)))
    assert result.output[0].shape == (SIDE, SIDE, 3)
    assert ended


def sides(type_):
    return {"width": SIDE, "height": SIDE} if type_ == "text-to-image" else {}


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3", "flux"])
def test_a_step_ends_once_nobody_waits(load, family):
    adapter = load("text-to-image", family)
    blocks = [
        part
        for part in interruption._interruptible_parts(adapter.pipeline)
        if part in set(adapter.denoiser.modules())
    ]
    assert len(blocks) > 3
    ran = []
    for block in blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    [result] = adapter.predict(batch_of(adapter, lambda place: bool(ran), **sides("text-to-image")))
    assert isinstance(result, DeadlineExceeded)
    assert len(ran) == 1


@pytest.mark.parametrize("type_", TYPES)
def test_only_pictures_above_what_models_are_made_for_are_in_tiles(load, monkeypatch, type_):
    adapter = load(type_)
    vae = adapter.pipeline.vae
    vae.tile_sample_min_size = 32  # the checkpoint's is as large as its pictures
    vae.tile_latent_min_size = 32 // 2 ** (len(vae.config.block_out_channels) - 1)
    shapes = []
    vae.decoder.register_forward_hook(lambda _, __, made: shapes.append(made.shape[-1]))
    vae.encoder.register_forward_hook(lambda _, given, __: shapes.append(given[0].shape[-1]))
    whole = adapter.predict(batch_of(adapter, **sides(type_)))[0].output[0]
    assert set(shapes) == {SIDE}
    shapes.clear()
    monkeypatch.setattr(interruption, "MAX_WHOLE_PIXELS", SIDE * SIDE - 1)
    tiled = adapter.predict(batch_of(adapter, **sides(type_)))[0].output[0]
    assert max(shapes) <= 32
    assert len(shapes) >= 9
    assert tiled.shape == whole.shape
    shapes.clear()
    monkeypatch.setattr(interruption, "MAX_WHOLE_PIXELS", SIDE * SIDE)
    again = adapter.predict(batch_of(adapter, **sides(type_)))[0].output[0]
    assert set(shapes) == {SIDE}
    assert np.array_equal(again, whole)


def test_no_hook_is_left_after_a_run(load):
    adapter = load("text-to-image")

    def hooks():
        parts = adapter.pipeline.components.values()
        modules = [m for part in parts if hasattr(part, "modules") for m in part.modules()]
        return sum(len(module._forward_pre_hooks) for module in modules)

    before = hooks()
    adapter.predict(batch_of(adapter, **sides("text-to-image")))
    adapter.predict(batch_of(adapter, lambda place: True, **sides("text-to-image")))
    assert hooks() == before
