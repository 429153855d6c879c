"""Models whose arithmetic overflows: an error that says so, not what only looks like an answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from backend.adapters.numbers import has_nan
from tests import (
    checkpoints,
    recognition_checkpoints,
    speech_checkpoints,
    vision_checkpoints,
    vision_text_checkpoints,
)
from tests.checkpoints import built_when_asked, sentence
from tests.conftest import run, together
from tests.test_leaving_a_batch import seen, shown, spoken

BUILDERS = {
    **checkpoints.BUILDERS,
    **recognition_checkpoints.BUILDERS,
    **speech_checkpoints.BUILDERS,
    **vision_checkpoints.BUILDERS,
    **vision_text_checkpoints.BUILDERS,
}
TEXT = sentence(6)
STEPS = {"num_inference_steps": 2}
# Of each kind of adapter one, with what it is sent.
CASES = [
    ("text-generation", "llama", TEXT, {}),
    ("text-generation", "llama", TEXT, {"num_beams": 2}),
    ("chat", "llama", {"messages": [{"role": "user", "content": TEXT}]}, {}),
    ("summarization", "bart", TEXT, {}),
    ("summarization", "bart", TEXT, {"num_beams": 3}),
    ("translation", "nllb", TEXT, {"temperature": 1}),
    ("embeddings", "masked_lm", TEXT, {"normalize": True}),
    ("feature-extraction", "masked_lm", TEXT, {}),
    ("rerank", "cross_encoder", {"query": "red", "documents": [TEXT, "old"]}, {}),
    ("text-classification", "bert_classifier", TEXT, {}),
    ("zero-shot-classification", "nli", {"text": TEXT, "labels": ["red", "green"]}, {}),
    ("token-classification", "token_classifier", TEXT, {}),
    ("question-answering", "question_answerer", {"question": "who", "context": TEXT}, {}),
    ("fill-mask", "masked_lm", f"{TEXT} [MASK]", {}),
    ("automatic-speech-recognition", "whisper", spoken(2, 1), {}),
    ("automatic-speech-recognition", "whisper", spoken(2, 1), {"return_timestamps": "segments"}),
    ("automatic-speech-recognition", "ctc", spoken(2, 1), {}),
    ("image-classification", "vit", seen(64, 64), {}),
    ("zero-shot-image-classification", "clip", {"image": seen(64, 64), "labels": ["red"]}, {}),
    ("object-detection", "detr", seen(64, 64), {}),
    ("image-segmentation", "segformer", seen(64, 64), {}),
    ("image-segmentation", "mask2former", seen(64, 64), {}),
    ("depth-estimation", "dpt", seen(64, 64), {}),
    ("image-to-text", "blip", seen(64, 64), {}),
    ("image-text-to-text", "idefics3", shown(seen(64, 64)), {}),
    ("visual-question-answering", "vilt", {"image": seen(64, 64), "question": "red"}, {}),
    ("visual-question-answering", "blip_vqa", {"image": seen(64, 64), "question": "red"}, {}),
    ("text-to-image", "stable_diffusion", "red", STEPS),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return built_when_asked(BUILDERS, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def spoiled(folders, tmp_path):
    """A copy of a checkpoint that ``spoil(name, tensor)`` was at: ``spoiled("llama", spoil)``."""
    from safetensors.torch import load_file, save_file

    def copy(family, spoil, where="**"):
        folder = tmp_path / family
        shutil.copytree(folders(family), folder)
        files = list(folder.glob(f"{where}/*.safetensors"))
        assert files
        for file in files:
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    spoil(name, tensor)
            save_file(tensors, file, {"format": "pt"})
        return str(folder)

    return copy


def fault(response):
    assert response.status_code == 500, response.json
    assert response.json["error"]["code"] == "INTERNAL_ERROR"
    return response.json["error"]["message"]


@pytest.mark.parametrize(
    ("type_", "family", "value", "options"), CASES, ids=lambda one: one if type(one) is str else ""
)
def test_what_is_no_number_is_an_error_and_no_answer(
    make_app, spoiled, type_, family, value, options
):
    weights = spoiled(family, lambda name, tensor: tensor.fill_(np.nan))
    client = make_app([{"id": "it", "type": type_, "hf_model": weights}]).test_client()
    assert "bfloat16" in fault(run(client, "it", value, options=options))


@pytest.mark.parametrize(
    ("type_", "family", "where", "value", "options"),
    [
        ("text-to-image", "stable_diffusion", "vae", "red", STEPS),
        ("text-to-speech", "vits", "**", TEXT, {}),
    ],
)
def test_a_decoder_that_overflows_gives_no_black_picture_and_no_silence(
    make_app, spoiled, type_, family, where, value, options
):
    """As some do in float16, of latents that are sound."""

    def spoil(name, tensor):
        if name.startswith(("decoder.conv_out", "decoder.conv_pre")):
            tensor.fill_(np.inf)

    weights = spoiled(family, spoil, where)
    client = make_app([{"id": "it", "type": type_, "hf_model": weights}]).test_client()
    assert "bfloat16" in fault(run(client, "it", value, options=options))


@pytest.mark.parametrize(
    ("type_", "family", "table", "options"),
    [
        ("summarization", "bart", "model.encoder.embed_tokens.weight", {}),
        ("summarization", "bart", "model.encoder.embed_tokens.weight", {"num_beams": 2}),
        ("embeddings", "masked_lm", "bert.embeddings.word_embeddings.weight", {}),
        ("text-classification", "bert_classifier", "bert.embeddings.word_embeddings.weight", {}),
    ],
)
def test_one_that_overflows_breaks_none_beside_it(
    make_app, folders, spoiled, type_, family, table, options
):
    """It is one token's weights that do it, and that token is in one of eight texts."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folders(family))
    sound = [sentence(words, seed) for seed, words in enumerate((3, 9, 4, 7, 5, 6, 8))]
    texts = [*sound[:3], "0123", *sound[3:]]
    [bad, *_] = tokens("0123", add_special_tokens=False)["input_ids"]
    assert not any(bad in tokens(text)["input_ids"] for text in sound)

    def spoil(name, tensor):
        if name == table:
            tensor[bad] = np.inf

    entries = [
        {"id": "sound", "type": type_, "hf_model": folders(family)},
        {"id": "it", "type": type_, "hf_model": spoiled(family, spoil)},
    ]
    client = make_app(entries).test_client()
    options = {**options, **({"max_tokens": 8} if type_ == "summarization" else {})}
    requests = [{"model_id": "it", "input": text, "options": options} for text in texts]
    answers = together(client, requests)
    assert "float16" in fault(answers.pop(3))
    for text, answer in zip(sound, answers, strict=True):
        assert answer.status_code == 200, answer.json
        expected = run(client, "sound", text, options=options).json["output"]
        if type_ == "embeddings":
            np.testing.assert_allclose(answer.json["output"], expected, atol=1e-5)
        elif type_ == "summarization":
            assert answer.json["output"] == expected
        else:
            assert [one["label"] for one in answer.json["output"]] == [
                one["label"] for one in expected
            ]


@pytest.mark.parametrize(
    ("output", "broken"),
    [
        (float("nan"), True),
        (float("inf"), False),
        ("nan", False),
        (None, False),
        (True, False),
        (10**400, False),
        (np.float32([1, np.nan]), True),
        (np.float64([[1], [np.inf]]), False),
        (np.uint8([1]), False),
        ([{"label": "a", "score": 0.5}, {"label": "b", "score": float("nan")}], True),
        ({"a": [1.0, (2.0, [float("nan")])]}, True),
        ({"a": [1.0, (2.0, ["b", None, Path()])]}, False),
    ],
)
def test_a_nan_is_found_wherever_it_is(output, broken):
    assert has_nan(output) is broken
