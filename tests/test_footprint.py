"""What a model is guessed to take, and what it is found to."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from backend.adapters import ADAPTERS, footprint
from backend.registry import Registry
from tests import speech_checkpoints, vision_checkpoints
from tests.checkpoints import checkpoint
from tests.conftest import write_models
from tests.hub import Hub
from tests.serving import ROOT

__all__ = ["checkpoint"]

MODELS = [
    ("text-generation", "llama"),
    ("text-generation", "gpt2"),
    ("summarization", "bart"),
    ("text2text-generation", "t5"),
    ("text-classification", "bert_classifier"),
    ("fill-mask", "masked_lm"),
    ("rerank", "cross_encoder"),
    ("text-to-image", "stable_diffusion"),
    ("text-to-image", "stable_diffusion_xl"),
    ("text-to-image", "flux"),
    ("text-to-speech", "vits"),
    ("text-to-speech", "bark"),
    ("image-classification", "vit"),
]


@pytest.fixture
def load(checkpoint, tmp_path):
    """An adapter that is not loaded yet: ``load("text-to-speech", "vits", dtype="bfloat16")``."""

    def make(type_, name, **more):
        folder = tmp_path / name
        for module in (speech_checkpoints, vision_checkpoints):
            if name in module.BUILDERS:
                module.BUILDERS[name](folder)
        folder = folder if folder.exists() else checkpoint(name)
        entry = {"id": "m", "type": type_, "hf_model": str(folder), **more}
        spec = Registry.load(write_models(tmp_path, [entry])).get("m")
        return ADAPTERS[type_](spec, device="cpu", dtype="auto")

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("type_", "name"), MODELS)
def test_the_guess_is_near_what_the_weights_take(load, type_, name, dtype):
    adapter = load(type_, name, dtype=dtype)
    device, guess = adapter.place()
    adapter.load()
    assert (device, guess) == ("cpu", pytest.approx(adapter.footprint(), rel=0.03))


def test_weights_are_counted_once_and_whole(load):
    adapter = load("text-generation", "gpt2", dtype="float32")
    adapter.load()
    tensors = [*adapter.model.parameters(), *adapter.model.buffers()]
    wanted = sum({one.data_ptr(): one.nbytes for one in tensors}.values())
    adapter.again = {"the same": [adapter.model]}
    assert adapter.footprint() == wanted > 100_000


def test_quantized_weights_are_counted_as_they_are(load):
    whole, quarter = (
        load("text-generation", "llama", dtype="float32", **more)
        for more in ({}, {"memory": {"quantize": "int8"}})
    )
    whole.load()
    quarter.load()
    # The embeddings stay as they were.
    assert 0.25 < quarter.footprint() / whole.footprint() < 0.8


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], None, ["model.safetensors"]),
        (["pytorch_model.bin", "vocab.txt"], None, ["pytorch_model.bin"]),
        (["model.safetensors", "model.fp16.safetensors"], None, ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["model.safetensors"], "fp16", ["model.safetensors"]),
        (["model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            None,
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model_index.json", "whole.safetensors", "unet/a.safetensors", "vae/b.bin"],
            None,
            ["unet/a.safetensors", "vae/b.bin"],
        ),
        (
            ["a.safetensors", "1_Dense/b.safetensors", "checkpoint-5/a.safetensors"],
            None,
            ["a.safetensors", "1_Dense/b.safetensors"],
        ),
        (["part/b.safetensors"], None, ["part/b.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], None, ["model.safetensors"]),
        (["README.md"], None, []),
    ],
)
def test_the_files_that_would_be_read_are_the_ones_that_count(names, variant, chosen):
    assert sorted(footprint.weight_files(names, variant)) == sorted(chosen)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 9) + b'{"a": 12}',
    ],
)
def test_a_file_that_is_none_is_not_guessed_at(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    entry = {"id": "m", "type": "text-generation", "hf_model": str(tmp_path)}
    spec = Registry.load(write_models(tmp_path, [entry])).get("m")
    assert footprint.estimate(footprint.find_files(spec), "float32") == 0


@pytest.fixture
def hub(checkpoint):
    hub = Hub(Path(checkpoint("llama")))
    yield hub
    hub.close()


GUESSES = """
import json, sys
from pathlib import Path

from backend.adapters import ADAPTERS
from backend.registry import Registry

spec = Registry.load(Path(sys.argv[1])).get("m")
for _ in range(2):
    adapter = ADAPTERS[spec.type](spec, device="cpu", dtype="auto")
    files, place = adapter.weight_files, adapter.place()
    print(json.dumps([*place, sorted(files.values()), [one.exists() for one in files]]))
    adapter.load()
print(adapter.footprint())
"""


def test_the_guess_is_the_hubs_sizes_before_the_download_and_exact_after(hub, tmp_path):
    entry = {"id": "m", "type": "text-generation", "hf_model": "of/model", "dtype": "bfloat16"}
    done = subprocess.run(
        [sys.executable, "-c", GUESSES, write_models(tmp_path, [entry])],
        cwd=ROOT,
        env=os.environ | hub.environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, after, counted = map(json.loads, done.stdout.splitlines())
    size = (hub.folder / "model.safetensors").stat().st_size
    assert before == ["cpu", size, [size], [False]]
    assert after == ["cpu", pytest.approx(counted, rel=0.03), [size], [True]]
    assert counted == pytest.approx(size / 2, rel=0.03)


def test_what_is_free_is_what_a_container_leaves(tmp_path):
    root = tmp_path / "cgroup"
    root.mkdir()
    assert footprint._left_in_cgroup(root) > 2**60
    (root / "memory.max").write_text("max\n")
    assert footprint._left_in_cgroup(root) > 2**60
    (root / "memory.max").write_text("1000000\n")
    (root / "memory.current").write_text("700000\n")
    (root / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    assert footprint._left_in_cgroup(root) == 400_000
    assert 0 < footprint.spare(footprint.free("cpu")) < psutil.virtual_memory().total
