"""Generic tasks: what transformers' own pipeline gives on the same checkpoint.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import shutil
from io import BytesIO
from itertools import cycle, islice

import numpy as np
import pytest
from PIL import Image

from backend.adapters import ADAPTERS, generic_pictures
from backend.adapters.base import Batch, Prediction
from backend.adapters.interruption import interruptible_parts
from backend.adapters.masks import best_boxes, mask_of
from backend.adapters.plain import plain
from backend.errors import DeadlineExceeded
from backend.tasks import TASKS
from backend.tasks.generic import GENERIC, NOT_SERVED, dump_generic
from backend.tasks.usage import most_usage
from tests import generic_checkpoints
from tests.checkpoints import bart
from tests.conftest import run, together
from tests.generic_checkpoints import LABELS
from tests.gpu import GPU
from tests.pictures import base64_of, picture, read

DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
LOW = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_crop": 3}


@pytest.fixture(scope="session")
def generic(tmp_path_factory):
    """``generic("sam")`` is its folder, built when it is first asked for."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("generic") / name
        path.mkdir()
        getattr(generic_checkpoints, name)(path)
        return str(path)

    return folder


@pytest.fixture(scope="session")
def direct(generic):
    """transformers' own pipeline: ``direct("sam", "mask-generation", device="cpu")``."""
    import transformers

    @functools.cache
    def pipeline(name, task, device="cpu"):
        return transformers.pipeline(task, model=generic(name), device=device)

    return pipeline


def entry(generic, name, type_, **more):
    return {"id": "it", "type": type_, "hf_model": generic(name), **more}


# What is sent, different for each index.


def tone(seconds, rate, index=0):
    """Notes that fade, in steps of 16 bits, so that a WAV has the very same samples."""
    at = np.arange(int(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * (200 + 90 * index) * at) * np.exp(-(1 + index) * at)
    return (np.rint(wave * 20_000) / 32768).astype(np.float32)


def wav(samples, rate):
    import wave

    file = BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes((samples * 32768).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


@functools.cache
def film(frames=9, index=0):
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(frames):
            image = picture(48, 32, seed=10 * index + number)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file.getvalue()


def frames_of(data):
    import av

    with av.open(BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def words(index):
    boxes = [[2, 3, 20, 9], [24, 3, 40 + index, 9], [2, 12, 30, 18]]
    return [(LABELS[(index + at) % 7], box) for at, box in enumerate(boxes)]


def questions(index):
    return [
        {"name": "a", "type": "noul", "instructions": f"Is it {LABELS[index % 7]}?"},
        {"name": "b", "type": "choice", "options": LABELS[: 2 + index % 3]},
        {"name": "c", "type": "score", "instructions": "How old?", "options": ["old", "new"]},
    ]


class Case:
    """One task: its checkpoint, an input by index, and the library's answer to that."""

    def __init__(self, task, name, value, expect, *options):
        self.task, self.name, self.value, self.expect = task, name, value, expect
        self.options = options or ({},)


def expect_sound(pipeline, index, options):
    return pipeline(tone(0.4, 8_000, index), **{"top_k": 5, **options})


def expect_judged(pipeline, index, options):
    samples = {"candidate_labels": LABELS[index % 3 : 5]}
    return pipeline(tone(0.4, 16_000, index), **samples, **options)


def expect_film(pipeline, index, options):
    kept = [frames_of(film(9, index))[at] for at in (0, 3, 5, 8)]  # evenly spaced of nine
    inputs = pipeline.image_processor(kept, return_tensors="pt")
    options = {"top_k": 5, **options}
    options["top_k"] = options["top_k"] or len(LABELS)
    return pipeline.postprocess(pipeline.forward(inputs), **options)


def expect_masks(pipeline, index, options):
    """Up to the last step, for which the library wants torchvision."""
    from transformers.models.sam.image_processing_pil_sam import _rle_to_mask

    looks = ("points_per_crop", "crops_n_layers")
    options = dict(options)
    most = options.pop("top_k", None)
    image = picture(40 + index, 30, seed=index)
    chunks = [
        pipeline.forward(inputs, **{k: v for k, v in options.items() if k not in looks})
        for inputs in pipeline.preprocess(image, **{k: v for k, v in options.items() if k in looks})
    ]
    found = [
        (float(score), [int(side) for side in box], _rle_to_mask(runs))
        for chunk in chunks
        for score, box, runs in zip(
            chunk["iou_scores"], chunk["boxes"], chunk["masks"], strict=True
        )
    ]
    best = naive_best([box for _, box, _ in found], [score for score, _, _ in found], 0.7)
    names = ("xmin", "ymin", "xmax", "ymax")
    return [
        {
            "score": found[at][0],
            "box": dict(zip(names, found[at][1], strict=True)),
            "mask": found[at][2],
        }
        for at in best[:most]
    ]


def naive_best(boxes, scores, most_overlap):
    """Suppress boxes as it is described, one pair after another."""

    def overlap(one, other):
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        shared = max(0, width) * max(0, height)
        areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
        return shared / (areas - shared) if areas - shared else 0.0

    kept = []
    for at in sorted(range(len(boxes)), key=lambda at: -scores[at]):
        if all(overlap(boxes[at], boxes[better]) <= most_overlap for better in kept):
            kept.append(at)
    return kept


def expect_document(pipeline, index, options):
    thousandths = [
        (word, [1000 * x0 // 60, 1000 * y0 // 40, 1000 * x1 // 60, 1000 * y1 // 40])
        for word, (x0, y0, x1, y1) in words(index)
    ]
    return pipeline(
        image=picture(60, 40, seed=index),
        question=f"which {LABELS[index % 7]} ?",
        word_boxes=thousandths,
        **options,
    )


def expect_decision(pipeline, index, options):
    asked = {}
    for question in questions(index):
        one = {"type": question["type"], "instructions": question.get("instructions")}
        if question["type"] == "choice":
            one["criteria"] = dict.fromkeys(question["options"])
        elif question["type"] == "score":
            one["criteria"] = question["options"]
        asked[question["name"]] = one
    return pipeline({"state": f"The {LABELS[index % 7]} is old.", "questions": asked})


def nested(vectors):
    return np.asarray(vectors[0])


CASES = [
    Case(
        "audio-classification",
        "wav2vec2",
        lambda i: wav(tone(0.4, 8_000, i), 8_000),
        expect_sound,
        {},
        {"top_k": None},
        {"top_k": 2, "function_to_apply": "sigmoid"},
    ),
    Case(
        "audio-classification",
        "wav2vec2_multi_label",
        lambda i: wav(tone(0.4, 8_000, i), 8_000),
        expect_sound,
        {},
        {"function_to_apply": "none"},
    ),
    Case(
        "zero-shot-audio-classification",
        "clap",
        lambda i: {"audio": wav(tone(0.4, 16_000, i), 16_000), "labels": LABELS[i % 3 : 5]},
        expect_judged,
        {},
        {"hypothesis_template": "old {} music"},
    ),
    Case(
        "video-classification",
        "videomae",
        lambda i: base64.b64encode(film(9, i)).decode(),
        expect_film,
        {},
        {"top_k": 2, "function_to_apply": "sigmoid"},
        {"top_k": None},
    ),
    Case(
        "mask-generation",
        "sam",
        lambda i: base64_of(picture(40 + i, 30, seed=i)),
        expect_masks,
        {**LOW, "mask_threshold": 0.9},
        {**LOW, "mask_threshold": 0.9, "crops_n_layers": 1},
        {**LOW, "mask_threshold": 0.9, "pred_iou_thresh": 0.2, "top_k": 4},
        {
            **LOW,
            "mask_threshold": 0.9,
            "stability_score_thresh": 0.4,
            "stability_score_offset": 0.2,
        },
    ),
    Case(
        "image-feature-extraction",
        "vit",
        lambda i: base64_of(picture(40, 30, seed=i)),
        lambda pipeline, i, options: nested(pipeline(picture(40, 30, seed=i), **options)),
        {},
        {"pool": True},
    ),
    Case(
        "feature-extraction",
        "bert",
        lambda i: " ".join(LABELS[: i % 7 + 1]),
        lambda pipeline, i, options: nested(pipeline(" ".join(LABELS[: i % 7 + 1]))),
    ),
    Case(
        "zero-shot-object-detection",
        "owlvit",
        lambda i: {"image": base64_of(picture(50, 40, seed=i)), "labels": ["red", "old river"]},
        lambda pipeline, i, options: pipeline(
            picture(50, 40, seed=i), candidate_labels=["red", "old river"], **options
        ),
        {},
        {"threshold": 0.6},
        {"threshold": 0.05, "top_k": 3},
    ),
    Case(
        "keypoint-matching",
        "superglue",
        lambda i: {"images": [base64_of(picture(70, 80, seed=s)) for s in (i, i + 1)]},
        lambda pipeline, i, options: pipeline(
            [picture(70, 80, seed=s) for s in (i, i + 1)], **options
        ),
        {},
        {"threshold": 0.05},
    ),
    Case(
        "document-question-answering",
        "layoutlm",
        lambda i: {
            "image": base64_of(picture(60, 40, seed=i)),
            "question": f"which {LABELS[i % 7]} ?",
            "words": [{"text": word, "box": box} for word, box in words(i)],
        },
        expect_document,
        {},
        {"top_k": 3, "max_answer_len": 1},
        {"top_k": 2, "handle_impossible_answer": True},
    ),
    Case(
        "decision",
        "decider",
        lambda i: {"state": f"The {LABELS[i % 7]} is old.", "questions": questions(i)},
        expect_decision,
    ),
]
IDS = [case.name for case in CASES]


def assert_near(output, expected):
    """Equal, with numbers to 1e-4 and masks to the pixel."""
    if isinstance(expected, dict):
        assert output.keys() == expected.keys()
        for key in expected:
            assert_near(output[key], expected[key])
    elif isinstance(expected, np.ndarray) and expected.dtype == bool:
        assert np.array_equal(read(output), expected * 255)
    elif isinstance(expected, np.ndarray):
        assert np.asarray(output).shape == expected.shape
        assert np.abs(np.asarray(output) - expected).max() < 1e-4
    elif isinstance(expected, list | tuple):
        assert len(output) == len(expected)
        for one, other in zip(output, expected, strict=True):
            assert_near(one, other)
    elif isinstance(expected, float):
        assert output == pytest.approx(expected, abs=1e-4)
    else:
        assert output == expected


# Parity.


# What a receipt counts of the media that are sent.
USED = {
    "audio-classification": ["audio_seconds"],
    "zero-shot-audio-classification": ["audio_seconds"],
    "video-classification": ["video_seconds"],
    "feature-extraction": [],
    "table-question-answering": [],
    "decision": [],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_answer_is_what_the_librarys_own_pipeline_gives(make_app, generic, direct, case, device):
    client = make_app([entry(generic, case.name, case.task)], devices=(device,)).test_client()
    for options in case.options:
        answer = run(client, "it", case.value(0), options=options)
        assert answer.status_code == 200, answer.json
        expected = case.expect(direct(case.name, case.task, device), 0, options)
        assert len(expected) > 0
        assert_near(answer.json["output"], expected)
        assert answer.json["metadata"]["device"].startswith(device)
        usage = answer.json["metadata"]["usage"]
        assert usage.pop("inputs") == 1
        assert list(usage) == USED.get(case.task, ["images"])
        assert all(used > 0 for used in usage.values())
        assert "seed" not in answer.json["metadata"]


OLD = {"table": {"columns": ["name", "age"], "rows": [["tower", "9"]]}, "question": "how old?"}
TABLE = Case("table-question-answering", "tapas", lambda _: OLD, None)


@pytest.mark.parametrize("case", [*CASES, TABLE], ids=[*IDS, TABLE.name])
def test_each_task_answers_in_bfloat16(make_app, generic, case):
    """NumPy, which pipelines answer with, has no such numbers."""
    app = make_app([entry(generic, case.name, case.task)], dtype="bfloat16")
    answer = run(app.test_client(), "it", case.value(0), options=case.options[0])
    assert answer.status_code == 200, answer.json
    assert answer.json["metadata"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_eight_callers_at_once_get_what_they_would_get_alone(make_app, generic, direct, case):
    client = make_app([entry(generic, case.name, case.task, max_batch_size=8)]).test_client()
    wanted = list(islice(cycle(case.options), 8))
    answers = together(
        client,
        [
            {"model_id": "it", "input": case.value(place), "options": options}
            for place, options in enumerate(wanted)
        ],
    )
    for place, answer in enumerate(answers):
        assert answer.status_code == 200, answer.json
        expected = case.expect(direct(case.name, case.task), place, wanted[place])
        assert_near(answer.json["output"], expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_batch_has_the_answers_of_its_inputs(make_app, generic, direct, case):
    client = make_app([entry(generic, case.name, case.task)]).test_client()
    options = case.options[-1]
    answer = run(client, "it", [case.value(place) for place in range(3)], options=options)
    expected = [case.expect(direct(case.name, case.task), place, options) for place in range(3)]
    assert_near(answer.json["output"], expected)


# Sounds.


def test_a_sound_is_heard_at_the_models_rate_whatever_its_own(make_app, generic, direct):
    client = make_app([entry(generic, "wav2vec2", "audio-classification")]).test_client()
    answer = run(client, "it", wav(tone(0.4, 44_100), 44_100)).json["output"]
    expected = direct("wav2vec2", "audio-classification")(tone(0.4, 8_000), top_k=5)
    assert [one["label"] for one in answer] == [one["label"] for one in expected]
    for one, other in zip(answer, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=0.02)


@pytest.mark.parametrize(
    ("name", "type_", "seconds", "most"),
    [
        ("clap", "zero-shot-audio-classification", 2.5, 2.0),
        ("spectrogram_transformer", "audio-classification", 1.5, 0.995),
    ],
)
def test_a_sound_that_is_too_long_is_cut_at_its_end_where_that_is_asked_for(
    make_app, generic, direct, name, type_, seconds, most
):
    client = make_app([entry(generic, name, type_)]).test_client()
    samples = tone(seconds, 16_000)
    samples[int(most * 16_000) :] = 0.9  # which is not to be heard
    labels = {"labels": LABELS[:3]} if name == "clap" else {}
    value = {"audio": wav(samples, 16_000), **labels} if labels else wav(samples, 16_000)
    refused = run(client, "it", value)
    assert refused.status_code == 400
    at = "input.audio" if labels else "input"
    assert refused.json["error"]["details"][at] == (
        f"lasts {seconds} s and the model hears {most:.4g} s; shorten it, or set "
        "options.truncate to true"
    )
    answer = run(client, "it", value, options={"truncate": True}).json
    assert answer["metadata"]["truncated"] is True
    how = {"candidate_labels": LABELS[:3]} if labels else {"top_k": 5}
    expected = direct(name, type_)(samples[: int(most * 16_000)], **how)
    assert_near(answer["output"], expected)


def test_a_sound_is_bounded_where_the_model_sets_no_limit(make_app, generic):
    """Here 2 ** 15 frames of 20 samples at 8 kHz; wav2vec 2.0 has 320 of them at 16 kHz."""
    client = make_app([entry(generic, "wav2vec2", "audio-classification")]).test_client()
    answer = run(client, "it", wav(tone(82, 8_000), 8_000))
    assert answer.status_code == 400
    assert answer.json["error"]["details"]["input"] == (
        "lasts 82 s and the model hears 81.92 s; shorten it, or set options.truncate to true"
    )


@pytest.mark.parametrize(
    ("name", "type_", "value"),
    [
        ("wav2vec2", "audio-classification", {"samples": tone(0.4, 8_000), "rate": 8_000}),
        (
            "spectrogram_transformer",
            "audio-classification",
            {"samples": tone(0.4, 16_000), "rate": 16_000},
        ),
        ("bert", "feature-extraction", "river"),
    ],
)
def test_a_run_ends_between_two_layers_once_nobody_waits(make_app, generic, name, type_, value):
    spec = make_app([entry(generic, name, type_)]).extensions["crane"].registry.get("it")
    adapter = ADAPTERS[type_](spec, device="cpu", dtype="float32")
    adapter.load()
    ran = []
    for layer in list(interruptible_parts(adapter.pipeline.model))[1:]:
        layer.register_forward_hook(lambda *_: ran.append(1))

    def predict(cancelled):
        ran.clear()
        batch = Batch(
            inputs=[value],
            options=spec.options_schema.load({}),
            seeds=[None],
            cancelled=cancelled,
            progress=lambda *_: None,
        )
        return adapter.predict(batch)[0]

    assert isinstance(predict(lambda place: bool(ran)), DeadlineExceeded)
    assert len(ran) == 1
    assert isinstance(predict(lambda place: False), Prediction)
    assert len(ran) > 1
    adapter.unload()


@pytest.mark.parametrize("name", ["wav2vec2", "spectrogram_transformer"])
def test_a_sound_is_heard_from_25_ms_on(make_app, generic, name):
    client = make_app([entry(generic, name, "audio-classification")]).test_client()
    rate = 8_000 if name == "wav2vec2" else 16_000
    assert run(client, "it", wav(tone(0.025, rate), rate)).status_code == 200
    answer = run(client, "it", wav(tone(0.0245, rate), rate))
    assert answer.status_code == 400
    assert "the shortest that is heard is 0.025 s" in answer.json["error"]["details"]["input"]


def test_a_template_is_not_a_way_into_the_server(make_app, generic, direct):
    client = make_app([entry(generic, "clap", "zero-shot-audio-classification")]).test_client()
    value = {"audio": wav(tone(0.4, 16_000), 16_000), "labels": ["{0.__class__}", "music"]}
    answer = run(client, "it", value, options={"hypothesis_template": "{0.__init__} {} {1}"})
    assert "no other braces" in answer.json["error"]["details"]["options.hypothesis_template"]
    answer = run(client, "it", value, options={"hypothesis_template": "a {}!"})
    assert answer.status_code == 200
    said = {f"a {label}!": label for label in value["labels"]}
    expected = direct("clap", "zero-shot-audio-classification")(
        tone(0.4, 16_000), candidate_labels=list(said), hypothesis_template="{}"
    )
    expected = [{"label": said[one["label"]], "score": one["score"]} for one in expected]
    assert_near(answer.json["output"], expected)


# Films.


def test_a_film_with_fewer_frames_than_the_model_sees_has_them_repeated(make_app, generic, direct):
    client = make_app([entry(generic, "videomae", "video-classification")]).test_client()
    answer = run(client, "it", base64.b64encode(film(2)).decode())
    assert answer.status_code == 200, answer.json
    pipeline = direct("videomae", "video-classification")
    first, last = frames_of(film(2))
    inputs = pipeline.image_processor([first, first, last, last], return_tensors="pt")
    assert_near(answer.json["output"], pipeline.postprocess(pipeline.forward(inputs)))


# Texts and the model's window.


def test_a_text_past_the_window_is_cut_where_that_is_asked_for(make_app, generic, direct):
    client = make_app([entry(generic, "bert", "feature-extraction")]).test_client()
    text = "river " * 100
    refused = run(client, "it", text)
    assert refused.status_code == 400
    assert "has 102 tokens and the model's window is 64" in str(refused.json["error"]["details"])
    answer = run(client, "it", text, options={"truncate": True}).json
    assert answer["metadata"]["truncated"] is True
    expected = direct("bert", "feature-extraction")(text, truncation=True, max_length=64)
    assert_near(answer["output"], nested(expected))


@pytest.mark.parametrize(
    ("name", "type_", "value"),
    [
        ("owlvit", "zero-shot-object-detection", {"image": base64_of(picture(50, 40))}),
        (
            "clap",
            "zero-shot-audio-classification",
            {"audio": wav(tone(0.4, 16_000), 16_000)},
        ),
    ],
)
def test_a_label_past_the_window_is_refused_by_its_place(make_app, generic, name, type_, value):
    client = make_app([entry(generic, name, type_)]).test_client()
    answer = run(client, "it", {**value, "labels": ["red", "river " * 40]})
    assert answer.status_code == 400
    [(path, fault)] = answer.json["error"]["details"].items()
    assert path == "input.labels[1]"
    assert "and the model's window is" in fault


# Documents, tables, decisions.


def ask(index=0, **more):
    return {"image": base64_of(picture(60, 40)), "question": f"which {LABELS[index]} ?", **more}


def test_a_long_document_is_read_in_parts_that_overlap(make_app, generic, direct):
    client = make_app([entry(generic, "layoutlm", "document-question-answering")]).test_client()
    many = [LABELS[place * place % 7] for place in range(200)]
    boxes = [[place % 50, place // 10, place % 50 + 5, place // 10 + 2] for place in range(200)]
    listed = [{"text": w, "box": box} for w, box in zip(many, boxes, strict=True)]
    answer = run(client, "it", ask(words=listed), options={"top_k": 5})
    sides = (60, 40, 60, 40)
    expected = direct("layoutlm", "document-question-answering")(
        image=picture(60, 40),
        question="which river ?",
        word_boxes=[
            (w, [1000 * at // side for at, side in zip(box, sides, strict=True)])
            for w, box in zip(many, boxes, strict=True)
        ],
        top_k=5,
    )
    assert len(expected) == 5
    assert_near(answer.json["output"], expected)


def test_a_question_about_a_document_leaves_room_for_its_words(make_app, generic):
    client = make_app([entry(generic, "layoutlm", "document-question-answering")]).test_client()
    listed = [{"text": "river", "box": [0, 0, 5, 5]}] * 100
    for words_asked, status in ((28, 200), (29, 400)):
        value = {**ask(words=listed), "question": "river " * words_asked}
        answer = run(client, "it", value)
        assert answer.status_code == status, answer.json
    assert answer.json["error"]["details"] == {
        "input.question": "has 29 tokens and the model reads 28 of a question; shorten it"
    }


def test_a_model_that_writes_writes_what_is_likeliest_whatever_its_checkpoint_says(
    make_app, generic
):
    import transformers

    type_ = "document-question-answering"
    client = make_app([entry(generic, "donut", type_)]).test_client()
    answers = [run(client, "it", ask(place)).json["output"] for place in (0, 1, 0, 1)]
    pipeline = transformers.pipeline(type_, model=generic("donut"))
    pipeline.model.generation_config.do_sample = False
    expected = [
        pipeline(image=picture(60, 40), question=ask(place)["question"]) for place in (0, 1, 0, 1)
    ]
    assert all(one[0]["answer"] for one in expected)
    assert answers == expected
    refused = run(client, "it", ask(words=[{"text": "old", "box": [5, 5, 9, 9]}]))
    assert refused.status_code == 400
    assert refused.json["error"]["details"] == {
        "input.words": "is not something this model can be asked"
    }


def test_a_table_is_answered_as_a_direct_call_does(make_app, generic, direct):
    import pandas

    client = make_app([entry(generic, "tapas", "table-question-answering")]).test_client()
    table = {"columns": ["tower", "metres"], "rows": [["old", "324"], ["new", "333"]]}
    answer = run(client, "it", {"table": table, "question": "how old is the tower?"})
    assert answer.status_code == 200, answer.json
    frame = pandas.DataFrame(table["rows"], columns=table["columns"])
    expected = direct("tapas", "table-question-answering")(
        table=frame, query="how old is the tower?"
    )
    assert expected["cells"]
    assert_near(answer.json["output"], expected)
    table["rows"] *= 30
    value = {"table": table, "question": "how old is the tower?"}
    refused = run(client, "it", value)
    assert refused.status_code == 400
    assert "the model's window is 64" in refused.json["error"]["details"]["input.table"]
    answer = run(client, "it", value, options={"truncate": True})
    assert answer.json["metadata"]["truncated"] is True
    frame = pandas.DataFrame(table["rows"], columns=table["columns"])
    expected = direct("tapas", "table-question-answering")(
        table=frame, query="how old is the tower?"
    )
    assert_near(answer.json["output"], expected)


@pytest.mark.parametrize(
    ("limit", "most", "at", "told"),
    [
        ("MAX_MASKS", 26, "options.points_per_crop", "more masks than are compared here"),
        ("MAX_RUNS", 100, "options.points_per_crop", "raise pred_iou_thresh"),
        ("MAX_MASK_PIXELS", 60 * 40 * 2, "options.top_k", "at most 2 of a picture so large"),
    ],
)
def test_more_masks_than_memory_has_room_for_are_refused(
    make_app, generic, monkeypatch, limit, most, at, told
):
    client = make_app([entry(generic, "sam", "mask-generation")]).test_client()
    options = {**LOW, "mask_threshold": 0.9, "crops_nms_thresh": 1.0}
    whole = run(client, "it", IMAGE, options=options)
    assert len(whole.json["output"]) == 27  # three for each of nine points
    monkeypatch.setattr(generic_pictures, limit, most)
    answer = run(client, "it", IMAGE, options=options)
    assert answer.status_code == 400
    assert told in answer.json["error"]["details"][at]
    if at == "options.top_k":
        best = run(client, "it", IMAGE, options={**options, "top_k": 2}).json["output"]
        assert best == whole.json["output"][:2]


def test_masks_of_a_large_picture_are_made_smaller_and_enlarged(make_app, generic, monkeypatch):
    client = make_app([entry(generic, "sam", "mask-generation")]).test_client()
    options = {**LOW, "mask_threshold": 0.9, "crops_nms_thresh": 1.0}
    small = picture(60, 40)
    large = base64_of(small.resize((240, 160), Image.Resampling.NEAREST))
    monkeypatch.setattr(generic_pictures, "MAX_SEEN", 60 * 40)
    answer = run(client, "it", large, options=options).json["output"]
    seen = np.asarray(small.resize((240, 160), Image.Resampling.NEAREST).resize((60, 40)))
    expected = run(client, "it", base64_of(Image.fromarray(seen)), options=options).json["output"]
    assert len(answer) == len(expected) == 27
    for one, wanted in zip(answer, expected, strict=True):
        assert one["score"] == wanted["score"]
        assert one["box"] == {side: 4 * at for side, at in wanted["box"].items()}
        mask = read(wanted["mask"])
        assert np.array_equal(read(one["mask"]), mask.repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize(
    ("points", "layers", "inputs"), [(1, 0, 1), (32, 0, 1), (33, 0, 2), (32, 1, 5), (64, 2, 84)]
)
def test_masks_at_many_points_are_charged_as_many_inputs(points, layers, inputs):
    task = TASKS["mask-generation"]
    options = task.options().load({"points_per_crop": points, "crops_n_layers": layers})
    count, used = most_usage(task, [np.zeros((40, 60, 3), np.uint8)], options)
    assert (count, used["images"]) == (inputs, 1)


STRIP = base64_of(Image.new("RGB", (1, 101)))


@pytest.mark.parametrize(
    ("name", "type_", "value", "at"),
    [
        ("sam", "mask-generation", STRIP, "input"),
        ("segformer", "image-feature-extraction", STRIP, "input"),
        ("owlvit", "zero-shot-object-detection", {"image": STRIP, "labels": ["a"]}, "input.image"),
        (
            "superglue",
            "keypoint-matching",
            {"images": [base64_of(picture(60, 40)), STRIP]},
            "input.images[1]",
        ),
        (
            "layoutlm",
            "document-question-answering",
            {"image": STRIP, "question": "old?", "words": [{"text": "old", "box": [0, 0, 1, 9]}]},
            "input.image",
        ),
    ],
    ids=["sam", "segformer", "owlvit", "superglue", "layoutlm"],
)
def test_a_strip_is_refused(make_app, generic, name, type_, value, at):
    client = make_app([entry(generic, name, type_)]).test_client()
    answer = run(client, "it", value)
    assert answer.status_code == 400
    assert "one side is over 100 times" in answer.json["error"]["details"][at]


TOO_MUCH = {
    "characters": (
        ["a"],
        [["1"], *[["\ufe0f" * 9_000]] * 2],
        "input.table",
        "has over 16384 characters in its first 3 rows",
    ),
    "columns": (["a"] * 64, [["1"] * 64], "input.table.columns", "must have 63 items at most"),
    "a row": (["a"] * 30, [["1"] * 30] * 2, "input.table", "has 30 columns, of which not one row"),
    "a cell": (["a"], [["1" * 10_001]], "input.table.rows[0][0]", "10000 characters at most"),
    "nothing": (["", ""], [["", ""]] * 2, "input.table", "has nothing in it"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_table_that_the_model_cannot_read_is_refused(make_app, generic, name):
    columns, rows, at, told = TOO_MUCH[name]
    client = make_app([entry(generic, "tapas", "table-question-answering")]).test_client()
    value = {"table": {"columns": columns, "rows": rows}, "question": "how old is the tower?"}
    for truncate in (False, True):
        answer = run(client, "it", value, options={"truncate": truncate})
        assert answer.status_code == 400
        assert told in answer.json["error"]["details"][at]


def test_of_a_table_of_many_rows_the_first_are_read(make_app, generic, direct):
    """Of the library's own ways to read them one raises, another takes an hour."""
    import pandas

    client = make_app([entry(generic, "tapas", "table-question-answering")]).test_client()
    ask = direct("tapas", "table-question-answering")
    question = "how old is the tower?"
    # The tokens left by the question are for the name and the rows, if they are not empty.
    left = 64 - 2 - len(ask.tokenizer.tokenize(question))
    for cell, most, at in (("7", left - 1, "input.table"), ("", 63, "input.table.rows")):
        rows = [["7"], *[[cell]] * 50_000]
        value = {"table": {"columns": ["a"], "rows": rows}, "question": question}
        answer = run(client, "it", value)
        assert answer.status_code == 400
        assert list(answer.json["error"]["details"]) == [at]
        answer = run(client, "it", value, options={"truncate": True})
        assert answer.status_code == 200, answer.json
        assert answer.json["metadata"]["truncated"] is True
        frame = pandas.DataFrame(rows[:most], columns=["a"])
        assert_near(answer.json["output"], ask(table=frame, query=question))


def without(monkeypatch, package):
    """Let a package seem not to be installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )


def test_a_task_whose_package_is_not_here_says_so(make_app, generic, monkeypatch):
    without(monkeypatch, "pandas")
    client = make_app([entry(generic, "tapas", "table-question-answering")]).test_client()
    table = {"columns": ["tower"], "rows": [["old"]]}
    answer = run(client, "it", {"table": table, "question": "how old?"})
    assert answer.status_code == 503
    assert "It needs pandas, which is not installed here." in answer.json["error"]["message"]


def test_a_checkpoint_of_a_kind_that_cannot_be_asked_so_says_so(make_app, tmp_path):
    bart(tmp_path / "bart")
    entry_ = {"id": "it", "type": "table-question-answering", "hf_model": str(tmp_path / "bart")}
    table = {"columns": ["tower"], "rows": [["old"]]}
    answer = run(make_app([entry_]).test_client(), "it", {"table": table, "question": "how old?"})
    assert answer.status_code == 503
    assert (
        "a model of the kind 'bart'; for this task it must be 'tapas'"
        in (answer.json["error"]["message"])
    )


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="it is here")
@pytest.mark.parametrize("processor", ["Sam2ImageProcessor", "Sam2ImageProcessorFast"])
def test_a_checkpoint_whose_package_is_not_here_says_so(make_app, generic, tmp_path, processor):
    folder = tmp_path / "sam"
    shutil.copytree(generic("sam"), folder)
    settings = folder / "preprocessor_config.json"
    said = json.loads(settings.read_text())
    settings.write_text(json.dumps({**said, "image_processor_type": processor}))
    own = {"id": "it", "type": "mask-generation", "hf_model": str(folder)}
    answer = run(make_app([own]).test_client(), "it", IMAGE)
    assert answer.status_code == 503
    assert "It needs torchvision, which is not installed" in answer.json["error"]["message"]


def test_a_checkpoint_that_does_not_suit_the_task_is_not_blamed_on_a_package(make_app, generic):
    client = make_app([entry(generic, "bert", "mask-generation")]).test_client()
    answer = run(client, "it", IMAGE)
    assert answer.status_code == 503
    assert "The log has the reason" in answer.json["error"]["message"]


# What is refused.

IMAGE = base64_of(picture(60, 40))


@pytest.mark.parametrize(
    ("name", "type_", "value", "options", "path", "told"),
    [
        ("wav2vec2", "audio-classification", IMAGE, {}, "input", "is no sound"),
        ("wav2vec2", "audio-classification", 5, {}, "input", "must be sound"),
        (
            "wav2vec2",
            "audio-classification",
            wav(tone(0.4, 8_000), 8_000),
            {"function_to_apply": "tanh"},
            "options.function_to_apply",
            "softmax",
        ),
        ("videomae", "video-classification", IMAGE, {}, "input", "is no film"),
        ("videomae", "video-classification", "/etc/passwd", {}, "input", "is neither base64"),
        ("sam", "mask-generation", "file:///etc/passwd", {}, "input", ""),
        ("sam", "mask-generation", IMAGE, {"points_per_crop": 65}, "options.points_per_crop", "64"),
        ("sam", "mask-generation", IMAGE, {"crops_n_layers": 3}, "options.crops_n_layers", "2"),
        ("segformer", "image-feature-extraction", IMAGE, {"pool": True}, "options.pool", "asked"),
        ("owlvit", "zero-shot-object-detection", {"image": IMAGE}, {}, "input.labels", "missing"),
        (
            "owlvit",
            "zero-shot-object-detection",
            {"image": IMAGE, "labels": [" "]},
            {},
            "input.labels[0]",
            "must not be empty",
        ),
        ("superglue", "keypoint-matching", {"images": [IMAGE]}, {}, "input.images", "2 to 2"),
        (
            "layoutlm",
            "document-question-answering",
            {"image": IMAGE, "question": "old?"},
            {},
            "input.words",
            "is missing",
        ),
        (
            "layoutlm",
            "document-question-answering",
            ask(words=[{"text": "old", "box": [5, 5, 61, 9]}]),
            {},
            "input.words[0].box",
            "is beyond the picture, which is 60 x 40 pixels",
        ),
        (
            "layoutlm",
            "document-question-answering",
            ask(words=[{"text": "old", "box": [5, 5, 4, 9]}]),
            {},
            "input.words[0].box",
            "must be [left, top, right, bottom]",
        ),
        (
            "layoutlm",
            "document-question-answering",
            ask(words=[{"text": "old", "box": [5, 5, 9]}]),
            {},
            "input.words[0].box",
            "must have 4 to 4 items",
        ),
        (
            "decider",
            "table-question-answering",
            {"table": {"columns": ["a", "b"], "rows": [["1", "2"], ["3"]]}, "question": "?"},
            {},
            "input.table.rows[1]",
            "must have 2 items",
        ),
        (
            "decider",
            "decision",
            {"state": "old", "questions": [{"name": "a", "type": "noul", "options": ["b"]}]},
            {},
            "input.questions[0].options",
            "must not be there",
        ),
        (
            "decider",
            "decision",
            {"state": "old", "questions": [{"name": "a", "type": "choice"}]},
            {},
            "input.questions[0].options",
            "is missing",
        ),
        (
            "decider",
            "decision",
            {
                "state": "old",
                "questions": [{"name": "a", "type": "choice", "options": ["b", "b"]}],
            },
            {},
            "input.questions[0].options",
            "must differ",
        ),
        (
            "decider",
            "decision",
            {"state": "old", "questions": [{"name": "a", "type": "noul"}] * 2},
            {},
            "input.questions",
            "names that differ",
        ),
        (
            "decider",
            "decision",
            {
                "state": "old",
                "questions": [
                    {"name": "a", "type": "score", "options": [str(n) for n in range(27)]}
                ],
            },
            {},
            "input.questions[0].options",
            "must have 26 items at most for this model",
        ),
        (
            "decider",
            "decision",
            {"state": "old " * 2000, "questions": [{"name": "a", "type": "noul"}]},
            {},
            "input.state",
            "the model's window is 1024",
        ),
    ],
)
def test_what_a_model_cannot_be_asked_is_refused_by_name(
    make_app, generic, capsys, name, type_, value, options, path, told
):
    client = make_app([entry(generic, name, type_)]).test_client()
    answer = run(client, "it", value, options=options)
    assert answer.status_code == 400, answer.json
    assert told in answer.json["error"]["details"][path]
    assert "failed a batch" not in capsys.readouterr().err


def test_an_input_that_is_refused_leaves_its_neighbours_alone(make_app, generic, direct):
    client = make_app([entry(generic, "bert", "feature-extraction")]).test_client()
    answers = together(
        client,
        [
            {"model_id": "it", "input": text}
            for text in ("river", "tower " * 100, "old river", "music " * 100)
        ],
    )
    assert [answer.status_code for answer in answers] == [200, 400, 200, 400]
    expected = direct("bert", "feature-extraction")("old river")
    assert_near(answers[2].json["output"], nested(expected))


# Time.


def test_a_call_that_nobody_waits_for_stops_before_its_next_label(
    make_app, generic, monkeypatch, capsys
):
    import time

    from transformers import OwlViTForObjectDetection

    type_ = "zero-shot-object-detection"
    app = make_app([entry(generic, "owlvit", type_)], request_timeout_s=1.0)
    client, image = app.test_client(), base64_of(picture(50, 40))
    while run(client, "it", {"image": image, "labels": ["red"]}).status_code == 504:
        pass  # until it is loaded
    calls, forward = [], OwlViTForObjectDetection.forward

    def slow(self, *args, **kwargs):
        calls.append(args)
        time.sleep(0.1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(OwlViTForObjectDetection, "forward", slow)
    value = {"image": image, "labels": ["red"] * 100}
    answer = run(client, "it", [value, value])
    done = len(calls)
    assert answer.status_code == 504
    deadline = time.monotonic() + 5
    while client.get("/crane/models/it").json["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert 1 <= done <= len(calls) <= done + 1
    assert "failed a batch" not in capsys.readouterr().err


# Loading.


def test_an_entry_loads_its_model_as_it_says(make_app, generic, direct):
    own = entry(
        generic,
        "vit",
        "image-feature-extraction",
        load={"add_pooling_layer": False},
        dtype="bfloat16",
    )
    client = make_app([own]).test_client()
    assert run(client, "it", IMAGE, options={"pool": True}).status_code == 400
    answer = run(client, "it", IMAGE).json
    assert answer["metadata"]["dtype"] == "bfloat16"
    expected = nested(direct("vit", "image-feature-extraction")(picture(60, 40)))
    difference = np.abs(np.asarray(answer["output"]) - expected)
    assert 0 < difference.max() < 0.2  # of halves, which JSON has as numbers all the same


def test_weights_are_kept_in_8_bits_where_an_entry_says_so(make_app, generic, direct):
    own = entry(generic, "bert", "feature-extraction", memory={"quantize": "int8"})
    answer = run(make_app([own]).test_client(), "it", "river tower").json
    assert answer["metadata"]["dtype"] == "float32 with int8 weights"
    expected = nested(direct("bert", "feature-extraction")("river tower"))
    difference = np.abs(np.asarray(answer["output"]) - expected)
    assert 1e-3 < difference.max() < 0.3


# Every task, and outputs of every kind.


def test_every_pipeline_of_the_library_is_served_or_listed_with_the_reason():
    from transformers.pipelines import SUPPORTED_TASKS

    names = set(SUPPORTED_TASKS)
    assert names - set(TASKS) - set(NOT_SERVED) == set()
    assert set(NOT_SERVED) <= names - set(TASKS)
    assert {task.name for task in GENERIC} <= names


def test_all_that_a_library_may_give_becomes_json_and_pictures():
    from collections import namedtuple
    from dataclasses import dataclass

    import orjson
    import torch
    from PIL import Image
    from transformers.modeling_outputs import BaseModelOutput

    @dataclass
    class Box:
        left: float
        right: torch.Tensor

    Pair = namedtuple("Pair", "one other")
    given = {
        1: np.float32(0.5),
        "nan": [float("nan"), float("inf"), np.float64("nan"), torch.tensor(float("-inf"))],
        "halves": torch.tensor([[1.5, float("nan")]], dtype=torch.bfloat16, requires_grad=True),
        "numbers": torch.tensor([3, 255], dtype=torch.uint8),
        "flags": np.array([True, False]),
        "mask": torch.tensor([[True, False]]),
        "names": np.array(["a", "b"]),
        "box": Box(1.0, torch.tensor(2)),
        "pair": Pair(1, (2, {3})),
        "model": BaseModelOutput(last_hidden_state=torch.zeros(1, 2)),
        "grey": Image.new("L", (2, 1), 7),
        "colours": Image.new("RGBA", (2, 1), (1, 2, 3, 255)),
        "none": None,
    }
    travelled = plain(given)
    pictures = {name: travelled.pop(name) for name in ("mask", "grey", "colours")}
    written = orjson.loads(
        orjson.dumps(dump_generic(travelled, {}, lambda: None), option=orjson.OPT_SERIALIZE_NUMPY)
    )
    assert written == {
        "1": 0.5,
        "nan": [None, None, None, None],
        "halves": [[1.5, None]],
        "numbers": [3, 255],
        "flags": [True, False],
        "names": ["a", "b"],
        "box": {"left": 1.0, "right": 2},
        "pair": [1, [2, [3]]],
        "model": {"last_hidden_state": [[0.0, 0.0]]},
        "none": None,
    }
    shown = {
        name: read(media.data) for name, media in dump_generic(pictures, {}, lambda: None).items()
    }
    assert shown["mask"].tolist() == [[255, 0]]
    assert shown["grey"].tolist() == [[7, 7]]
    assert shown["colours"].tolist() == [[[1, 2, 3]] * 2]
    with pytest.raises(TypeError, match="object is nothing that travels"):
        plain([object()])


def test_the_best_boxes_are_those_that_a_plain_look_at_every_pair_keeps():
    draws = np.random.default_rng(3)
    for most_overlap in (0.0, 0.3, 0.7, 1.0):
        corners = draws.integers(0, 20, (60, 2))
        boxes = np.concatenate([corners, corners + draws.integers(0, 12, (60, 2))], axis=1)
        scores = draws.permutation(60) / 60
        kept = best_boxes(boxes.astype(np.float32), scores, most_overlap)
        assert kept == naive_best(boxes.tolist(), scores, most_overlap)
    assert best_boxes(np.zeros((0, 4)), np.zeros(0), 0.5) == []


def test_a_mask_is_drawn_from_its_runs_down_the_columns():
    drawn = mask_of({"size": [2, 3], "counts": [1, 3, 2]})
    assert drawn.astype(int).tolist() == [[0, 1, 0], [1, 1, 0]]
    assert mask_of({"size": [1, 2], "counts": [0, 2]}).all()
