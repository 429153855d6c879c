"""A batch whose runs are for several callers: who leaves costs no run, and changes nothing."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from backend.adapters import ADAPTERS, packing, zero_shot_image
from backend.adapters.base import Batch
from backend.errors import DeadlineExceeded
from backend.inputs import load_inputs
from backend.tasks import TASKS
from tests import (
    checkpoints,
    recognition_checkpoints,
    speech_checkpoints,
    three_d_checkpoints,
    video_checkpoints,
    vision_checkpoints,
    vision_text_checkpoints,
)
from tests.checkpoints import built_when_asked, sentence
from tests.pictures import base64_of, picture
from tests.sounds import wav

BUILDERS = {
    **checkpoints.BUILDERS,
    **recognition_checkpoints.BUILDERS,
    **vision_checkpoints.BUILDERS,
    **vision_text_checkpoints.BUILDERS,
    **{build.__name__: build for build in video_checkpoints.BUILDERS},
    **speech_checkpoints.BUILDERS,
    "shap_e": three_d_checkpoints.shap_e,
}
SIDES = {"width": 64, "height": 64, "num_inference_steps": 4}
FEW_FRAMES = {**SIDES, "num_frames": 3}


def spoken(seconds, seed):
    samples = np.random.default_rng(seed).normal(scale=3000, size=int(seconds * 16000))
    return base64.b64encode(wav(samples.astype(np.int16), 16000)).decode()


def seen(width, height, seed=0):
    return base64_of(picture(width, height, seed=seed))


def shown(*images):
    parts = [{"type": "image", "image": image} for image in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "red"}]}]}


@dataclass
class Case:
    """Two inputs that a family runs apart from each other, and the part that runs for each."""

    type: str
    family: str
    leaver: Any
    stayer: Any
    part: str = "model"
    options: dict[str, Any] | None = None
    apart: bool = True


CASES = [
    Case(
        "question-answering",
        "question_answerer",
        {"question": "which river", "context": sentence(300, 1)},
        {"question": "which tower", "context": sentence(200, 2)},
    ),
    Case(
        "rerank",
        "cross_encoder",
        {"query": "red", "documents": [sentence(3, seed) for seed in range(5)]},
        {"query": "red", "documents": [sentence(9, seed) for seed in range(4)]},
    ),
    Case(
        "zero-shot-classification",
        "nli",
        {"text": "the red river", "labels": ["red", "green", "old"]},
        {"text": "the city", "labels": ["tower", "food", "music", "new"]},
    ),
    Case("object-detection", "detr", seen(110, 60), seen(60, 70)),
    Case(
        "zero-shot-image-classification",
        "clip",
        {"image": seen(64, 64), "labels": ["red", "green"]},
        {"image": seen(64, 64, 1), "labels": ["tower", "river"]},
    ),
    Case("image-to-text", "git", seen(64, 64), seen(64, 64, 1), apart=False),
    Case(
        "image-text-to-text",
        "idefics3",
        shown(seen(64, 64)),
        shown(seen(64, 64), seen(64, 64, 1)),
    ),
    Case(
        "visual-question-answering",
        "vilt",
        {"image": seen(64, 64), "question": "the red river"},
        {"image": seen(64, 64, 1), "question": "what is on the old tower?"},
    ),
    Case(
        "visual-question-answering",
        "blip_vqa",
        {"image": seen(64, 64), "question": "the red river"},
        {"image": seen(64, 64, 1), "question": "what is on the old tower?"},
        part="model.text_decoder",
    ),
    *(
        Case(
            "text-to-image",
            "stable_diffusion",
            {"prompt": "red", "negative_prompt": "green"},
            {"prompt": "old river"},
            part="denoiser",
            options={**SIDES, "scheduler": scheduler},
        )
        # What is left amid its steps serves the next run, whatever it kept of them.
        for scheduler in ("heun", "pndm", "unipc")
    ),
    Case(
        "image-to-video",
        "stable_video_diffusion",
        {"image": seen(80, 72)},
        {"image": seen(80, 72, 1)},
        part="denoiser",
        options=FEW_FRAMES,
    ),
    Case(
        "image-to-video",
        "i2vgen_xl",
        {"image": seen(80, 72), "prompt": "red"},
        {"image": seen(80, 72, 1), "prompt": "old river"},
        part="denoiser",
        options=FEW_FRAMES,
    ),
    Case(
        "automatic-speech-recognition",
        "ctc_without_mask",
        spoken(70, 1),
        spoken(2, 2),
        part="_listener._model",
    ),
    Case(
        "automatic-speech-recognition",
        "whisper",
        spoken(70, 1),
        spoken(2, 2),
        part="_listener._model.model.encoder",
        options={"language": "de"},
    ),
]


class Run:
    """A loaded adapter, and how often its part has run since the last call."""

    def __init__(self, app, case):
        self._case = case
        self._crane = app.extensions["crane"]
        self._spec = self._crane.registry.get("it")
        self.adapter = ADAPTERS[case.type](self._spec, device="cpu", dtype="float32")
        self.adapter.load()
        part = self.adapter
        for name in case.part.split("."):
            part = getattr(part, name)
        part.register_forward_pre_hook(lambda *_: self._count())
        self.steps = 0

    def _count(self):
        self.steps += 1

    def __call__(self, inputs, cancelled=lambda place: False):
        self.steps = 0
        options = self._spec.options_schema.load(self._case.options or {})
        options.pop("seed", None)
        task = TASKS[self._case.type]
        with self._crane.media.reading() as reading:
            loaded = load_inputs(self._crane.config, task, inputs, options, reading)
        batch = Batch(
            inputs=loaded,
            options=options,
            seeds=[7] * len(inputs),
            cancelled=cancelled,
            progress=lambda *_: None,
        )
        return self.adapter.predict(batch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return built_when_asked(BUILDERS, tmp_path_factory.mktemp("families"))


def same(one, other, within=1e-5):
    """Whether outputs are equal, but for the last bits of their numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k], within) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(
            same(*pair, within) for pair in zip(one, other, strict=True)
        )
    if isinstance(one, float | np.ndarray):
        return np.allclose(one, other, atol=within)
    return one == other


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_who_leaves_costs_no_more_runs_and_changes_nothing(make_app, folders, case, monkeypatch):
    monkeypatch.setattr(zero_shot_image, "MAX_SENTENCES", 1)
    monkeypatch.setattr(packing, "SETTLED", 10**6)  # to pack may change a pixel by 1
    entry = {"id": "it", "type": case.type, "hf_model": folders(case.family), "max_batch_size": 1}
    run = Run(make_app([entry]), case)
    [alone] = run([case.stayer])
    needed = run.steps
    run([case.leaver, case.stayer])
    both = run.steps
    assert both > needed or not case.apart

    run([case.leaver, case.stayer], lambda place: place == 0)
    assert run.steps == needed
    _, stayed = run([case.leaver, case.stayer], lambda place: place == 0)
    assert same(stayed.output, alone.output)

    # Amid the leaver's first run, of those that ask between their steps.
    _, stayed = run([case.leaver, case.stayer], lambda place: place == 0 and run.steps > 0)
    assert run.steps <= needed + 1
    assert same(stayed.output, alone.output)

    run([case.leaver], lambda place: True)
    assert run.steps == 0
    run.adapter.unload()


def test_work_in_shares_leaves_out_what_is_for_those_who_left():
    gone = set()
    batch = Batch(
        inputs=["a", "b", "c"],
        options={},
        seeds=[None] * 3,
        cancelled=lambda place: place in gone,
        progress=lambda *_: None,
    )
    shares = batch.shares([0, 1, 0, 2, 1, 0, 2], 3)
    assert next(shares) == [0, 1, 2]
    gone.add(1)
    assert list(shares) == [[3, 5, 6]]
    assert list(batch.shares([1, 1], 3)) == []
    assert batch.waited_for(range(3)) == [0, 2]
    gone |= {0, 2}
    assert batch.abandoned()


# What is done for each input by itself, before the model's pass and after it.
OPTIONS = {"text-to-image": SIDES, "image-to-video": FEW_FRAMES}
PARTS = dict.fromkeys(("text-to-image", "image-to-video", "text-to-3d"), "denoiser")
PARTS["text-to-speech"] = "model.model"
SAID = {"question": "which river", "context": "the old river"}
ONE_BY_ONE = [
    ("depth-estimation", "dpt", seen(64, 64), "processor"),
    ("depth-estimation", "dpt", seen(64, 64), "answer"),
    ("image-segmentation", "mask2former", seen(64, 64), "answer"),
    ("image-to-text", "git", seen(64, 64), "processor"),
    ("image-text-to-text", "idefics3", shown(seen(64, 64)), "_encode"),
    ("text-to-image", "stable_diffusion", {"prompt": "red"}, "_prepare"),
    ("image-to-video", "i2vgen_xl", {"image": seen(80, 72), "prompt": "red"}, "_film"),
    ("question-answering", "question_answerer", SAID, "count_tokens"),
    ("rerank", "cross_encoder", {"query": "red", "documents": ["a"]}, "readable"),
    ("text-to-speech", "vits", "the red river", "model.prompt"),
    ("text-to-3d", "shap_e", "red", "_tokens"),
]


@pytest.mark.parametrize(("type_", "family", "value", "part"), ONE_BY_ONE)
def test_what_is_done_for_each_input_ends_once_nobody_waits(
    make_app, folders, type_, family, value, part
):
    part_of = PARTS.get(type_, "model")
    case = Case(type_, family, value, value, part=part_of, options=OPTIONS.get(type_))
    entry = {"id": "it", "type": type_, "hf_model": folders(family), "max_batch_size": 8}
    run = Run(make_app([entry]), case)
    *owners, name = part.split(".")
    owner = run.adapter
    for one in owners:
        owner = getattr(owner, one)
    real, done = getattr(owner, name), []

    class Counted:
        def __call__(self, *args, **kwargs):
            done.append(1)
            return real(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(real, name)

    setattr(owner, name, Counted())
    answers = run([value] * 3, lambda place: bool(done))
    assert len(done) == 1
    assert [type(one) for one in answers[1:]] == [DeadlineExceeded] * 2
    run.adapter.unload()
