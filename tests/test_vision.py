"""Labels, boxes, masks and depths: what transformers' own pipelines give on the same checkpoint.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from backend.adapters import ADAPTERS, segmentation, vision, vision_base, zero_shot_image
from tests.conftest import run, together
from tests.gpu import GPU
from tests.pictures import base64_of, picture, read, written
from tests.vision_calls import checkpoint

__all__ = ["checkpoint"]

FAMILIES = {
    "vit": "image-classification",
    "vit_several": "image-classification",
    "vit_regression": "image-classification",
    "convnext": "image-classification",
    "clip": "zero-shot-image-classification",
    "siglip": "zero-shot-image-classification",
    "yolos": "object-detection",
    "detr": "object-detection",
    "segformer": "image-segmentation",
    "mask2former": "image-segmentation",
    "dpt": "depth-estimation",
    "depth_anything": "depth-estimation",
}
DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
LABELS = ["a red bird", "the river", "old tower at the harbour"]
# Options of ours, under which the tiny models find something; most are the pipeline's too.
OPTIONS = {
    "vit": [{}, {"top_k": 2}, {"top_k": None}],
    "clip": [{}, {"hypothesis_template": "{}"}],
    "siglip": [{}, {"hypothesis_template": "the {} in the morning"}],
    "yolos": [{"threshold": 0.2}, {"threshold": 0.4}],
    "detr": [{}, {"threshold": 0.1}],
    "segformer": [{}, {"subtask": "semantic"}],
    "mask2former": [
        {"threshold": 0.5},
        {"threshold": 0.5, "subtask": "instance"},
        {"subtask": "semantic"},
        {"threshold": 0.3, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.1},
    ],
}
SIZES = [(70, 60), (110, 60), (60, 70), (64, 64)]


def scene(index):
    return picture(*SIZES[index % len(SIZES)], seed=index)


def entry(checkpoint, family, **more):
    type_ = FAMILIES[family]
    return {"id": family, "type": type_, "hf_model": checkpoint(family), **more}


def input_for(family, index=0):
    image = base64_of(scene(index))
    if not FAMILIES[family].startswith("zero-shot"):
        return image
    return {"image": image, "labels": [*LABELS[index % 2 :], f"label {index}"]}


@pytest.fixture(scope="module")
def direct(checkpoint):
    """Call transformers' pipeline: ``direct("vit", 0, top_k=2)`` in the words of our answers."""
    import transformers

    pipelines = {}

    def call(family, index=0, device="cpu", image=None, **options):
        if (family, device) not in pipelines:
            pipelines[family, device] = transformers.pipeline(
                FAMILIES[family], model=checkpoint(family), device=device
            )
        if FAMILIES[family].startswith("zero-shot"):
            options["candidate_labels"] = input_for(family, index)["labels"]
        if options.get("top_k", 0) is None:
            options["top_k"] = 1000
        return pipelines[family, device](image or scene(index), **options)

    return call


def assert_same(family, output, expected):
    """Labels are equal, scores to a thousandth of a percent, boxes and pixels within 1."""
    if FAMILIES[family] == "depth-estimation":
        pixels, wanted = read(output), np.asarray(expected["depth"])
        assert pixels.shape == wanted.shape
        assert wanted.std() > 10
        assert np.abs(pixels.astype(int) - wanted).max() <= 1
        return
    assert [one["label"] for one in output] == [one["label"] for one in expected]
    for one, wanted in zip(output, expected, strict=True):
        assert one["score"] == (
            None if wanted["score"] is None else pytest.approx(wanted["score"], abs=1e-5)
        )
        if "box" in wanted:
            assert list(one["box"]) == ["xmin", "ymin", "xmax", "ymax"]
            assert one["box"] == pytest.approx(wanted["box"], abs=1)
        if "mask" in wanted:
            assert one["mask"]["mime_type"] == "image/png"
            mask, theirs = read(one["mask"]), np.asarray(wanted["mask"])
            assert mask.shape == theirs.shape
            assert set(np.unique(mask)) <= {0, 255}
            assert (mask != theirs).mean() < 1e-3  # a near-tie of two kinds


# Parity.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_is_what_the_pipeline_gives(make_app, checkpoint, direct, family, device):
    client = make_app([entry(checkpoint, family)], devices=(device,)).test_client()
    for options in OPTIONS.get(family, [{}]):
        answer = run(client, family, input_for(family), options=options)
        assert answer.status_code == 200, answer.json
        expected = direct(family, device=device, **options)
        assert expected
        assert_same(family, answer.json["output"], expected)
        metadata = answer.json["metadata"]
        assert metadata["device"].startswith(device)
        assert metadata["usage"]["images"] == 1
        assert "seed" not in metadata


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("whole_batches")
def test_eight_callers_at_once_with_mixed_options_get_what_they_would_get_alone(
    make_app, checkpoint, direct, family
):
    client = make_app([entry(checkpoint, family)]).test_client()
    kinds = OPTIONS.get(family, [{}])
    wanted = [kinds[index % len(kinds)] for index in range(8)]
    answers = together(
        client,
        [
            {"model_id": family, "input": input_for(family, index), "options": options}
            for index, options in enumerate(wanted)
        ],
    )
    for index, (answer, options) in enumerate(zip(answers, wanted, strict=True)):
        assert answer.status_code == 200, answer.json
        assert_same(family, answer.json["output"], direct(family, index, **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("whole_batches")
def test_a_batch_of_pictures_of_all_sizes_answers_each_as_alone(
    make_app, checkpoint, direct, family
):
    client = make_app([entry(checkpoint, family)]).test_client()
    options = OPTIONS.get(family, [{}])[0]
    answer = run(client, family, [input_for(family, i) for i in range(6)], options=options).json
    assert answer["metadata"]["batch_size"] == 6
    assert answer["metadata"]["usage"]["images"] == 6
    for index, output in enumerate(answer["output"]):
        assert_same(family, output, direct(family, index, **options))


@pytest.mark.parametrize(("family", "runs"), [("yolos", [6]), ("detr", [2, 2, 1, 1])])
def test_pictures_of_one_shape_run_together(make_app, checkpoint, monkeypatch, family, runs):
    sizes = []
    real = vision_base.stack

    def stack(features, model):
        sizes.append(len(features))
        return real(features, model)

    monkeypatch.setattr("backend.adapters.vision.stack", stack)
    client = make_app([entry(checkpoint, family)]).test_client()
    run(client, family, [input_for(family, index) for index in range(6)])
    assert sorted(sizes, reverse=True) == runs


def test_large_pictures_are_run_a_few_at_a_time(make_app, checkpoint, monkeypatch):
    monkeypatch.setattr(vision, "TOKENS", 2**14)  # of 2**15 in a run, a megapixel
    client = make_app([entry(checkpoint, "dpt")]).test_client()
    answer = run(client, "dpt", [input_for("dpt")] * 3).json
    assert answer["metadata"]["batch_size"] == 2
    assert len(answer["output"]) == 3
    adapter = ADAPTERS["depth-estimation"](
        client.application.extensions["crane"].registry.get("dpt")
    )
    sizes = [(1, 1), (1024, 1024), (1025, 1024), (5792, 5792)]
    found = [adapter.size(np.broadcast_to(np.uint8(0), (*size, 3)), {}) for size in sizes]
    assert found == [2**14, 2**14, 2**15, 2**19]


def test_callers_with_labels_of_their_own_share_a_run(make_app, checkpoint, direct, monkeypatch):
    texts = []
    real = zero_shot_image.ZeroShotImageClassifier._scores

    def scores(self, pictures, sentences):
        texts.append(len({text for mine in sentences for text in mine}))
        return real(self, pictures, sentences)

    monkeypatch.setattr(zero_shot_image.ZeroShotImageClassifier, "_scores", scores)
    monkeypatch.setattr(zero_shot_image, "MAX_SENTENCES", 6)
    client = make_app([entry(checkpoint, "clip")]).test_client()
    answer = run(client, "clip", [input_for("clip", index) for index in range(5)]).json
    assert texts == [6, 5]  # three that are shared and one for each picture: 3 + 3, and 3 + 2
    for index, output in enumerate(answer["output"]):
        assert_same("clip", output, direct("clip", index))


# What is in an answer.


def test_boxes_and_masks_are_of_the_picture_as_it_is_seen(make_app, checkpoint, direct):
    """A phone's picture lies on its side, and its EXIF says so."""
    upright = scene(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    lying = base64_of(written(upright.transpose(Image.Transpose.ROTATE_90), exif=exif))
    families = ("yolos", "segformer", "dpt")
    client = make_app([entry(checkpoint, family) for family in families]).test_client()
    for family in families:
        options = OPTIONS.get(family, [{}])[0]
        answer = run(client, family, lying, options=options).json
        assert_same(family, answer["output"], direct(family, image=upright, **options))


def test_masks_of_a_large_picture_are_made_smaller_and_enlarged(make_app, checkpoint, monkeypatch):
    monkeypatch.setattr(segmentation, "MAX_MAP", 80 * 60)
    client = make_app([entry(checkpoint, "segformer")]).test_client()
    image = picture(320, 240, seed=3)
    large = run(client, "segformer", base64_of(image)).json["output"]
    monkeypatch.undo()
    whole = run(client, "segformer", base64_of(image)).json["output"]
    assert [one["label"] for one in large] == [one["label"] for one in whole]
    for one, other in zip(large, whole, strict=True):
        mask, wanted = read(one["mask"]), read(other["mask"])
        assert mask.shape == wanted.shape == (240, 320)
        assert (mask != wanted).mean() < 0.05  # along the edges
        steps = np.argwhere(np.diff(mask[:, ::4].astype(int), axis=0))[:, 0] + 1
        assert not (steps % 4).any()  # blocks of 4 x 4


def test_the_receipt_says_what_was_segmented_and_how(make_app, checkpoint):
    families = ("segformer", "mask2former")
    client = make_app([entry(checkpoint, family) for family in families]).test_client()
    names = ("subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold")

    def told(family, **options):
        answer = run(client, family, input_for(family), options=options).json
        return [answer["metadata"]["options"][name] for name in names]

    assert told("segformer") == ["semantic", None, None, None]
    assert told("mask2former") == ["panoptic", 0.9, 0.5, 0.5]
    assert told("mask2former", subtask="instance", threshold=0) == ["instance", 0.0, 0.5, 0.5]


def test_depths_are_told_and_their_picture_can_be_had_as_bare_bytes(make_app, checkpoint, direct):
    client = make_app([entry(checkpoint, "dpt")]).test_client()
    plain = run(client, "dpt", input_for("dpt")).json
    depth = direct("dpt")["predicted_depth"]
    assert plain["metadata"]["min_depth"] == pytest.approx(float(depth.min()), abs=1e-5)
    assert plain["metadata"]["max_depth"] == pytest.approx(float(depth.max()), abs=1e-5)
    body = {"model_id": "dpt", "input": input_for("dpt")}
    bare = client.post("/crane/run", json=body, headers={"Accept": "image/webp"})
    assert bare.mimetype == "image/webp"
    assert read(bare.data).shape[:2] == read(plain["output"]).shape


def test_a_picture_of_one_depth_is_black(make_app, checkpoint, monkeypatch):
    from transformers import DPTForDepthEstimation

    real = DPTForDepthEstimation.forward

    def flat(self, *args, **kwargs):
        outputs = real(self, *args, **kwargs)
        outputs.predicted_depth = outputs.predicted_depth * 0
        return outputs

    monkeypatch.setattr(DPTForDepthEstimation, "forward", flat)
    client = make_app([entry(checkpoint, "dpt")]).test_client()
    answer = run(client, "dpt", input_for("dpt")).json
    assert not read(answer["output"]).any()
    assert answer["metadata"]["min_depth"] == answer["metadata"]["max_depth"] == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 40), (40, 1), (3, 3), (4, 3)])
def test_the_smallest_pictures_are_pictures_too(make_app, checkpoint, direct, size):
    image = picture(40, 40, seed=5).crop((0, 0, *size))
    families = ("vit", "yolos", "segformer", "dpt")
    client = make_app([entry(checkpoint, family) for family in families]).test_client()
    for family in families:
        answer = run(client, family, base64_of(image), options=OPTIONS.get(family, [{}])[0])
        assert answer.status_code == 200, answer.json
        if family == "segformer":
            assert_same(family, answer.json["output"], direct(family, image=image))
        if family == "dpt":
            assert read(answer.json["output"]).shape == size[::-1]


# Refusals.


@pytest.mark.parametrize(
    ("family", "options", "field", "told"),
    [
        ("segformer", {"subtask": "panoptic"}, "subtask", "can do semantic segmentation only"),
        ("segformer", {"subtask": "instance"}, "subtask", "'instance'"),
        ("segformer", {"subtask": "all"}, "subtask", "is 'all'"),
        ("segformer", {"threshold": 0.5}, "threshold", "not used in this model's semantic"),
        ("mask2former", {"subtask": "semantic", "mask_threshold": 0.5}, "mask_threshold", "not us"),
        ("mask2former", {"threshold": 1.5}, "threshold", "at most 1.0"),
        ("yolos", {"threshold": -1}, "threshold", "at least 0.0"),
        ("vit", {"top_k": 0}, "top_k", "at least 1"),
        ("vit", {"truncate": True}, "truncate", "is not known here"),
        ("clip", {"hypothesis_template": "a photo"}, "hypothesis_template", "must have {}"),
        ("dpt", {"format": "gif"}, "format", "is 'gif'"),
    ],
)
def test_an_option_that_a_model_cannot_use_is_refused_by_name(
    make_app, checkpoint, family, options, field, told
):
    client = make_app([entry(checkpoint, family)]).test_client()
    answer = run(client, family, input_for(family), options=options)
    assert answer.status_code == 400
    assert told in answer.json["error"]["details"][f"options.{field}"]


@pytest.mark.parametrize("size", [(1, 101), (101, 1), (5000, 2)])
@pytest.mark.parametrize("family", ["convnext", "clip"])
def test_a_strip_is_refused_before_its_shorter_side_is_enlarged(make_app, checkpoint, family, size):
    client = make_app([entry(checkpoint, family)]).test_client()
    strip = base64_of(Image.new("RGB", size))
    value = {"image": strip, "labels": LABELS} if family == "clip" else strip
    answer = run(client, family, [input_for(family), value]).json
    answer = run(client, family, value)
    assert answer.status_code == 400
    field = "input.image" if family == "clip" else "input"
    assert "one side is over 100 times" in answer.json["error"]["details"][field]


def test_a_picture_that_the_processor_cannot_take_is_refused_alone(
    make_app, checkpoint, monkeypatch
):
    """DETR's would be 80 pixels wide and, rounded down, none high."""
    monkeypatch.setattr(vision_base, "MAX_ASPECT", 1000)
    client = make_app([entry(checkpoint, "detr")]).test_client()
    strip = base64_of(Image.new("RGB", (500, 1)))
    answer = run(client, "detr", strip)
    assert answer.status_code == 400
    told = "is 500 x 1 pixels, which this model cannot take"
    assert answer.json["error"]["details"] == {"input": told}
    others = together(
        client,
        [{"model_id": "detr", "input": one} for one in (strip, input_for("detr"), strip)],
    )
    assert [one.status_code for one in others] == [400, 200, 400]


def test_a_processor_that_takes_no_picture_is_our_fault(make_app, checkpoint, monkeypatch):
    from transformers import ViTImageProcessorPil

    def broken(self, *args, **kwargs):
        raise ValueError("secret of the library")

    monkeypatch.setattr(ViTImageProcessorPil, "_preprocess", broken)
    client = make_app([entry(checkpoint, "vit")]).test_client()
    answer = run(client, "vit", input_for("vit"))
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_a_label_longer_than_the_window_is_refused_or_cut(make_app, checkpoint):
    client = make_app([entry(checkpoint, "clip"), entry(checkpoint, "siglip")]).test_client()
    for family in ("clip", "siglip"):
        image = base64_of(scene(0))
        value = {"image": image, "labels": ["the river", "the old tower " * 40]}
        answer = run(client, family, value)
        assert answer.status_code == 400
        told = answer.json["error"]["details"]["input.labels[1]"]
        window = {"clip": 40, "siglip": 64}[family]
        assert f"the model's window is {window}" in told
        cut = run(client, family, value, options={"truncate": True})
        assert cut.status_code == 200
        assert cut.json["metadata"]["truncated"] is True
        assert cut.json["metadata"]["usage"]["input_tokens"] <= 2 * window


@pytest.mark.parametrize(
    ("value", "field", "told"),
    [
        ({"image": "AAAA", "labels": ["x"]}, "input.image", "is no picture"),
        ({"labels": ["x"]}, "input.image", "is missing"),
        ({"image": None, "labels": ["x"]}, "input.image", "must be a picture"),
        ({"image": "", "labels": []}, "input.labels", "must have 1 to 100 items"),
        ({"image": "", "labels": ["x", " "]}, "input.labels[1]", "must not be empty"),
        ("AAAA", "input", "must be an object"),
    ],
)
def test_an_input_at_fault_is_refused_by_name(make_app, checkpoint, value, field, told):
    client = make_app([entry(checkpoint, "clip")]).test_client()
    answer = run(client, "clip", value)
    assert answer.status_code == 400
    assert told in answer.json["error"]["details"][field]


def test_a_label_is_never_a_template_of_ours(make_app, checkpoint):
    client = make_app([entry(checkpoint, "clip")]).test_client()
    value = {**input_for("clip"), "labels": ["{0.__class__}", "{}", "a {label}"]}
    answer = run(client, "clip", value, options={"hypothesis_template": "0 {}"})
    assert answer.status_code == 200, answer.json
    assert {one["label"] for one in answer.json["output"]} == set(value["labels"])


# Loading.


@pytest.mark.parametrize("family", ["vit", "yolos", "mask2former"])
def test_a_picture_model_can_be_quantized(make_app, checkpoint, family):
    client = make_app([entry(checkpoint, family, memory={"quantize": "int8"})]).test_client()
    answer = run(client, family, input_for(family))
    assert answer.json["metadata"]["dtype"] == "float32 with int8 weights"


def test_half_precision_gives_nearly_the_same(make_app, checkpoint, direct):
    families = ("vit", "detr", "segformer", "dpt", "clip")
    entries = [entry(checkpoint, family, dtype="bfloat16") for family in families]
    client = make_app(entries).test_client()
    answers = {family: run(client, family, input_for(family)).json for family in families}
    assert {one["metadata"]["dtype"] for one in answers.values()} == {"bfloat16"}
    scores = {one["label"]: one["score"] for one in answers["vit"]["output"]}
    for one in direct("vit"):
        assert scores[one["label"]] == pytest.approx(one["score"], abs=0.05)
    close = np.abs(read(answers["dpt"]["output"]).astype(int) - np.asarray(direct("dpt")["depth"]))
    assert close.mean() < 12


def test_a_checkpoint_of_another_kind_does_not_load(make_app, checkpoint):
    wrong = {"id": "wrong", "type": "image-segmentation", "hf_model": checkpoint("vit")}
    client = make_app([wrong]).test_client()
    answer = run(client, "wrong", base64_of(scene(0)))
    assert answer.status_code == 503
    assert "a vit model, which does not segment" in answer.json["error"]["message"]


def test_a_file_of_a_form_is_a_picture(make_app, checkpoint, direct):
    from io import BytesIO

    client = make_app([entry(checkpoint, "vit")]).test_client()
    file = (BytesIO(written(scene(0))), "scene.png", "image/png")
    answer = client.post("/crane/run", data={"model_id": "vit", "input": file})
    assert answer.status_code == 200, answer.json
    assert_same("vit", answer.json["output"], direct("vit"))
