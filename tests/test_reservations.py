"""No shipped task uses more than is reserved for it: through the caller's door."""

from __future__ import annotations

import pytest

from backend.quota.tiers import tiers
from backend.tasks import TASKS
from tests import (
    diffusers_checkpoints,
    generic_checkpoints,
    test_generic,
    test_leaving_a_batch,
    test_numbers,
    three_d_checkpoints,
    video_checkpoints,
)
from tests.checkpoints import built_when_asked
from tests.conftest import answered, run
from tests.pictures import base64_of, mask
from tests.test_leaving_a_batch import seen

SIDES = {"width": 64, "height": 64, "num_inference_steps": 2}
PICTURE = seen(64, 64)
# No word of a model's own, and more bytes than characters: a tokenizer makes most tokens of these.
ODD = "é🦩 Ω 鶴 kranich \n\n 0123456789 ﷺ?! żuraw"
CHAT = {"messages": [{"role": role, "content": ODD} for role in ("system", "user")]}
BUILDERS = {
    **{build.__name__: build for build in diffusers_checkpoints.BUILDERS},
    **{build.__name__: build for build in video_checkpoints.BUILDERS},
    **test_numbers.BUILDERS,
    "shap_e": three_d_checkpoints.shap_e,
}
# The type of a model, its checkpoint, an input and options.
CASES = [
    *test_numbers.CASES,
    ("echo", None, {"text": ODD}, {}),
    ("text-generation", "llama", ODD, {"max_tokens": 9}),
    ("text-generation", "llama_without_end", ODD, {"max_tokens": 9}),
    ("chat", "thinker", CHAT, {"max_tokens": 9}),
    ("text2text-generation", "t5", ODD, {"prefix": ODD}),
    ("embeddings", "masked_lm", ODD, {}),
    ("embeddings", "masked_lm", "red " * 3000, {"truncate": True}),
    ("rerank", "cross_encoder", {"query": ODD, "documents": ["", ODD, "red"]}, {}),
    ("image-text-to-text", "qwen2_vl", test_leaving_a_batch.shown(PICTURE, seen(300, 300)), {}),
    ("text-to-speech", "vits", "we", {}),
    ("text-to-speech", "bark", "we", {}),
    ("text-to-audio", "musicgen", "red", {"duration": 0.5}),
    ("text-to-image", "stable_diffusion", "red", {**SIDES, "num_images": 2}),
    ("image-to-image", "stable_diffusion", {"prompt": "red", "image": PICTURE}, SIDES),
    (
        "inpainting",
        "stable_diffusion",
        {"prompt": "red", "image": PICTURE, "mask": base64_of(mask(64, 64))},
        SIDES,
    ),
    ("text-to-video", "wan", "red", {**SIDES, "num_frames": 5}),
    ("text-to-video", "wan", "red", {**SIDES, "fps": 2}),
    ("image-to-video", "stable_video_diffusion", {"image": PICTURE}, {**SIDES, "num_frames": 3}),
    ("text-to-3d", "shap_e", "red", {"num_inference_steps": 1}),
    ("table-question-answering", "tapas", TASKS["table-question-answering"].example[0], {}),
    *((case.task, case.name, case.value(1), case.options[0]) for case in test_generic.CASES),
]
IDS = [f"{case[0]}-{case[1]}" for case in CASES]
UNITS = {"1k_tokens": 1000, "image": 1, "audio_minute": 60, "video_second": 1}  # a unit for each
ALWAYS = 10_000  # units of each call, so that it is refused


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    generic = {name: getattr(generic_checkpoints, name) for name in GENERIC}
    return built_when_asked({**BUILDERS, **generic}, tmp_path_factory.mktemp("reserved"))


GENERIC = {"tapas", *(case.name for case in test_generic.CASES)} - BUILDERS.keys()


def reserved(client, unit, input_, options):
    """What is reserved of a unit, as the refusal of a call says that costs too much."""
    answer = run(client, unit, input_, options=options)
    assert answer.status_code == 403, answer.json
    words = answer.json["error"]["message"].split()
    return round(float(words[words.index("to") + 1]) - ALWAYS, 3)


def test_every_task_is_here():
    assert {case[0] for case in CASES} == set(TASKS)


@pytest.mark.parametrize(("type_", "family", "value", "options"), CASES, ids=IDS)
def test_no_task_uses_more_than_is_reserved_for_it(
    make_app, folders, type_, family, value, options
):
    weights = {"hf_model": folders(family)} if family else {}
    entry = {"id": "it", "type": type_, **weights, "cost": 1}
    prices = [
        {**entry, "id": unit, "cost": {"per_request": ALWAYS, f"per_{unit}": cost}}
        for unit, cost in UNITS.items()
    ]
    client = make_app([entry, *prices], quota="on", tiers=tiers("free 999/hour")).test_client()
    most = {unit: reserved(client, unit, value, options) for unit in UNITS}
    usage = answered(client, "it", value, **options)[1]["usage"]
    used = {
        "1k_tokens": usage.get("input_tokens", 0) + usage.get("output_tokens", 0),
        "image": usage.get("images", 0),
        "audio_minute": usage.get("audio_seconds", 0),
        "video_second": usage.get("video_seconds", 0),
    }
    assert {unit: count for unit, count in used.items() if count > most[unit]} == {}, most


@pytest.mark.parametrize(
    ("type_", "family", "of"),
    [
        ("embeddings", "masked_lm", lambda text: text),
        ("rerank", "cross_encoder", lambda text: {"query": "red", "documents": [text, text]}),
        ("text-generation", "llama", lambda text: text),
    ],
    ids=["embeddings", "rerank", "text-generation"],
)
def test_a_text_that_is_cut_reserves_no_more_than_the_models_window(
    make_app, folders, type_, family, of
):
    entry = {"id": "it", "type": type_, "hf_model": folders(family)}
    entry["cost"] = {"per_1k_tokens": 1000}
    client = make_app([entry], quota="on", tiers=tiers("free 3000/hour")).test_client()
    options = {"max_tokens": 1} if type_ == "text-generation" else {}

    def status(text, **more):
        return run(client, "it", of(text), options={**options, **more}).status_code

    long = "red " * 3000
    assert status(long, truncate=True) == 403  # while nothing is known of the model
    assert status("red") == 200
    assert client.get("/crane/models/it").json["window"] <= 512
    assert status(long, truncate=True) == 200
    assert status(long) == 403
