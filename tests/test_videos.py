"""Films: what a direct pipeline call gives on the same checkpoint, however it is asked.

What is expected never comes from Crane's own adapters. To be compared to the last bit, frames are
taken where they would be encoded; what is encoded is looked at by itself.
"""

from __future__ import annotations

import base64
import threading
import time
from dataclasses import replace
from io import BytesIO
from itertools import cycle, islice

import av
import numpy as np
import pytest

from backend.adapters import film_shapes
from backend.media import Media
from backend.tasks import TASKS
from tests import video_checkpoints
from tests.checkpoints import built_when_asked, sentence
from tests.conftest import run, together
from tests.gpu import GPU
from tests.pictures import base64_of, difference, picture

DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
# Each family's own class, for each task it does, and the least frames it makes above one.
OF_TEXTS = {
    "wan": ("WanPipeline", 5),
    "ltx": ("LTXPipeline", 9),
    "ltx_noisy": ("LTXPipeline", 9),
    "cogvideox": ("CogVideoXPipeline", 9),
    "text_to_video_ms": ("TextToVideoSDPipeline", 3),
}
OF_PICTURES = {
    "wan_image": ("WanImageToVideoPipeline", 5),
    "wan_both": ("WanImageToVideoPipeline", 5),
    "ltx": ("LTXImageToVideoPipeline", 9),
    "ltx_noisy": ("LTXImageToVideoPipeline", 9),
    "cogvideox_image": ("CogVideoXImageToVideoPipeline", 9),
    "stable_video_diffusion": ("StableVideoDiffusionPipeline", 3),
    "i2vgen_xl": ("I2VGenXLPipeline", 3),
}
FAMILIES = [("text-to-video", family) for family in OF_TEXTS]
FAMILIES += [("image-to-video", family) for family in OF_PICTURES]
SIDES = {"width": 64, "height": 64}
PROMPTS = [sentence(words, seed) for seed, words in enumerate((3, 1, 4, 2, 5, 2, 3, 1))]
SVD = "stable_video_diffusion"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    builders = {build.__name__: build for build in video_checkpoints.BUILDERS}
    return built_when_asked(builders, tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def direct(checkpoint):
    """Call a pipeline directly: ``direct(type, family, index, seed=…, …)`` gives frames."""
    import diffusers
    import torch

    pipelines = {}

    def call(type_, family, index=0, *, seed, device="cpu", **options):
        known = OF_TEXTS if type_ == "text-to-video" else OF_PICTURES
        if (type_, family, device) not in pipelines:
            own = getattr(diffusers, known[family][0])
            pipeline = own.from_pretrained(checkpoint(family), dtype=torch.float32).to(device)
            pipeline.set_progress_bar_config(disable=True)
            if family == "i2vgen_xl":  # which looks for it where transformers 4 had it
                vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
            pipelines[type_, family, device] = pipeline
        if family != SVD:
            options["prompt"] = PROMPTS[index]
        if type_ == "image-to-video":
            options["image"] = picture(80, 72, seed=index)
        there = type_ == "image-to-video" and family == "ltx_noisy"
        generator = torch.Generator(device if there else "cpu").manual_seed(seed)
        torch.manual_seed(seed)  # some draw from the global generator too
        output = pipelines[type_, family, device](**options, generator=generator, output_type="pil")
        return np.stack([np.asarray(frame) for frame in output.frames[0]])

    return call


@pytest.fixture
def lossless(monkeypatch):
    """Have films answered as their frames."""

    def dump(film, options, check):
        file = BytesIO()
        np.save(file, film["frames"])
        return Media("application/x-frames", file.getvalue())

    for name in ("text-to-video", "image-to-video"):
        monkeypatch.setitem(TASKS, name, replace(TASKS[name], dump=dump))


def frames_of(output):
    return np.load(BytesIO(base64.b64decode(output["data"])))


def entry(checkpoint, type_, family, **more):
    return {"id": type_, "type": type_, "hf_model": checkpoint(family), **more}


def input_for(type_, family, index=0):
    """An input of a task, different for each index."""
    if type_ == "text-to-video":
        return PROMPTS[index]
    prompt = {} if family == SVD else {"prompt": PROMPTS[index]}
    return {"image": base64_of(picture(80, 72, seed=index)), **prompt}


def fewest(type_, family):
    return (OF_TEXTS if type_ == "text-to-video" else OF_PICTURES)[family][1]


# Parity.


@pytest.mark.parametrize(("type_", "family"), FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("lossless", "whole_batches")
def test_a_film_is_what_a_direct_call_makes_alone_and_in_a_batch(
    make_app, checkpoint, direct, type_, family, device
):
    client = make_app([entry(checkpoint, type_, family)], devices=(device,)).test_client()
    options = {"num_inference_steps": 3, **SIDES, "num_frames": fewest(type_, family)}
    inputs = [input_for(type_, family, index) for index in range(2)]
    alone = run(client, type_, inputs[0], options={**options, "seed": 5})
    assert alone.status_code == 200, alone.json
    both = run(client, type_, inputs, options={**options, "seed": 5}).json
    expected = [
        direct(type_, family, index, seed=5 + index, device=device, **options) for index in (0, 1)
    ]
    assert expected[0].shape == (options["num_frames"], 64, 64, 3)
    assert expected[0].std() > 10  # not the grey of a film that failed
    assert difference(expected[0], expected[1]) > 10
    assert difference(frames_of(alone.json["output"]), expected[0]) <= 1
    for output, frames in zip(both["output"], expected, strict=True):
        assert difference(frames_of(output), frames) <= 1
    metadata = alone.json["metadata"]
    assert metadata["device"].startswith(device)
    assert metadata["usage"]["video_frames"] == options["num_frames"]
    assert metadata["usage"]["video_seconds"] > 0
    assert both["metadata"]["seed"] == [5, 6]
    both_usage = {name: 2 * count for name, count in metadata["usage"].items()}
    assert both["metadata"]["usage"] == pytest.approx(both_usage)


@pytest.mark.parametrize(
    ("type_", "family", "kinds"),
    [
        (
            "text-to-video",
            "wan",
            [{}, {"guidance_scale": 1.0}, {"num_frames": 9}, {"negative_prompt": "red green"}],
        ),
        ("text-to-video", "ltx", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "red"}]),
        ("image-to-video", SVD, [{}, {"num_frames": 4}, {"motion_bucket_id": 5}, {"fps": 12}]),
        ("image-to-video", "i2vgen_xl", [{}, {"num_inference_steps": 3}]),
    ],
)
@pytest.mark.usefixtures("lossless", "whole_batches")
def test_eight_callers_at_once_with_mixed_options_get_what_they_would_get_alone(
    make_app, checkpoint, direct, type_, family, kinds
):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    base = {"num_inference_steps": 2, **SIDES, "num_frames": fewest(type_, family)}
    wanted = [{**base, **options} for options in islice(cycle(kinds), 8)]
    answers = together(
        client,
        [
            {
                "model_id": type_,
                "input": input_for(type_, family, index),
                "options": {**options, "seed": 100 + index},
            }
            for index, options in enumerate(wanted)
        ],
    )
    for index, (answer, options) in enumerate(zip(answers, wanted, strict=True)):
        assert answer.status_code == 200, answer.json
        expected = direct(type_, family, index, seed=100 + index, **options)
        assert difference(frames_of(answer.json["output"]), expected) <= 1


@pytest.mark.parametrize("family", ["wan", "text_to_video_ms"])
@pytest.mark.usefixtures("lossless", "whole_batches")
def test_a_negative_prompt_of_an_input_goes_before_the_option(make_app, checkpoint, direct, family):
    client = make_app([entry(checkpoint, "text-to-video", family)]).test_client()
    options = {"num_inference_steps": 2, **SIDES, "num_frames": fewest("text-to-video", family)}
    inputs = [
        {"prompt": PROMPTS[0], "negative_prompt": "old tower"},
        {"prompt": PROMPTS[0], "negative_prompt": ""},
        PROMPTS[0],
    ]
    given = {"negative_prompt": "green", "seed": 3}
    batch = run(client, "text-to-video", inputs, options={**options, **given}).json
    for index, negative in enumerate(("old tower", "", "green")):
        expected = direct(
            "text-to-video", family, seed=3 + index, negative_prompt=negative, **options
        )
        assert difference(frames_of(batch["output"][index]), expected) <= 1
    mixed = run(client, "text-to-video", inputs[::2], options={**options, "seed": 3}).json
    for index, negative in enumerate(("old tower", None)):
        expected = direct(
            "text-to-video", family, seed=3 + index, negative_prompt=negative, **options
        )
        assert difference(frames_of(mixed["output"][index]), expected) <= 1


@pytest.mark.parametrize(
    ("type_", "family", "told"),
    [
        ("image-to-video", SVD, {"guidance_scale": "max_guidance_scale", "fps": "fps"}),
        ("image-to-video", "ltx", {"guidance_scale": "guidance_scale", "fps": "frame_rate"}),
        ("image-to-video", "i2vgen_xl", {"guidance_scale": "guidance_scale", "fps": "target_fps"}),
    ],
)
@pytest.mark.usefixtures("lossless")
def test_an_option_reaches_the_pipeline_by_the_name_it_has_there(
    make_app, checkpoint, direct, type_, family, told
):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    base = {"num_inference_steps": 2, **SIDES, "num_frames": fewest(type_, family)}
    ours = {"guidance_scale": 1.5, "fps": 20}
    answer = run(client, type_, input_for(type_, family), options={**base, **ours, "seed": 1})
    theirs = {told[name]: value for name, value in ours.items()}
    expected = direct(type_, family, seed=1, **base, **theirs)
    assert difference(frames_of(answer.json["output"]), expected) <= 1
    others = direct(type_, family, seed=1, **base)
    assert difference(others, expected) > 1  # it makes a difference


@pytest.mark.usefixtures("lossless")
def test_callers_at_once_share_a_batch(make_app, checkpoint):
    client = make_app([entry(checkpoint, "text-to-video", "ltx")]).test_client()
    options = {"num_inference_steps": 30, **SIDES, "num_frames": 9}
    request = {"model_id": "text-to-video", "input": "red", "options": options}
    client.post("/crane/run", json=request)
    answers = together(client, [request] * 6)
    assert max(answer.json["metadata"]["batch_size"] for answer in answers) > 1


def test_the_global_generator_is_left_as_it_was(make_app, checkpoint):
    import torch

    client = make_app([entry(checkpoint, "image-to-video", "i2vgen_xl")]).test_client()
    options = {"num_inference_steps": 1, **SIDES, "num_frames": 2}
    value = input_for("image-to-video", "i2vgen_xl")
    run(client, "image-to-video", value, options=options)
    before = torch.random.get_rng_state()
    assert run(client, "image-to-video", value, options=options).status_code == 200
    assert torch.equal(torch.random.get_rng_state(), before)


# The file.


def opened(data):
    with av.open(BytesIO(data)) as container:
        [stream] = container.streams
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context, stream.average_rate, np.stack(frames)


@pytest.mark.parametrize("fps", [None, 12])
def test_a_film_is_an_mp4_of_as_many_frames_at_the_rate_asked_for(
    make_app, checkpoint, direct, fps
):
    client = make_app([entry(checkpoint, "text-to-video", "wan")]).test_client()
    options = {"num_inference_steps": 2, **SIDES, "num_frames": 9}
    answer = client.post(
        "/crane/run",
        json={
            "model_id": "text-to-video",
            "input": PROMPTS[0],
            "options": {**options, "fps": fps, "seed": 2},
        },
        headers={"Accept": "video/mp4"},
    )
    assert answer.status_code == 200, answer.json
    assert answer.mimetype == "video/mp4"
    context, rate, frames = opened(answer.data)
    assert (context.name, context.pix_fmt, rate) == ("h264", "yuv420p", fps or 16)
    expected = direct("text-to-video", "wan", seed=2, **options)
    assert frames.shape == expected.shape == (9, 64, 64, 3)
    # Random weights make noise, of which three quarters of the colour are lost; its light is not.
    light = [one @ np.array([0.2126, 0.7152, 0.0722]) for one in (frames, expected)]
    assert np.abs(light[0] - light[1]).mean() < 5
    assert np.corrcoef(light[0].ravel(), light[1].ravel())[0, 1] > 0.95


# How long, how large, how fast.


@pytest.mark.parametrize(
    ("type_", "family", "options", "applied"),
    [
        ("text-to-video", "wan", {"num_frames": 1}, {"num_frames": 1, "fps": 16}),
        ("text-to-video", "wan", {"duration": 0.5}, {"frames": 9, "fps": 16}),
        ("text-to-video", "wan", {"duration": 0.1}, {"frames": 1, "fps": 16}),
        ("text-to-video", "wan", {"duration": 0.1, "fps": 60}, {"frames": 5, "fps": 60}),
        ("text-to-video", "ltx", {"duration": 0.5}, {"frames": 9, "fps": 25}),
        ("text-to-video", "ltx", {"duration": 0.5, "fps": 30}, {"frames": 17, "fps": 30}),
        ("text-to-video", "cogvideox", {}, {"num_frames": 9, "fps": 8, "guidance_scale": 6}),
        ("text-to-video", "text_to_video_ms", {"duration": 0.5}, {"frames": 4, "fps": 8}),
        ("text-to-video", "text_to_video_ms", {}, {"num_frames": 16, "guidance_scale": 9.0}),
        ("image-to-video", "ltx", {"duration": 0.1}, {"frames": 9, "fps": 25}),
        (
            "image-to-video",
            SVD,
            {},
            {"num_frames": 5, "fps": 7, "guidance_scale": 3.0, "motion_bucket_id": 127},
        ),
        ("image-to-video", SVD, {"duration": 0.5}, {"frames": 4, "fps": 7}),
        ("image-to-video", "i2vgen_xl", {"num_frames": 2}, {"fps": 16, "motion_bucket_id": None}),
    ],
)
def test_a_receipt_says_what_was_left_to_the_model(
    make_app, checkpoint, type_, family, options, applied
):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    given = {"num_inference_steps": 1, **SIDES, **options, "seed": 1}
    answer = run(client, type_, input_for(type_, family), options=given)
    assert answer.status_code == 200, answer.json
    metadata = answer.json["metadata"]
    count = applied.get("frames", applied.get("num_frames", options.get("num_frames")))
    seconds = round(count / applied.get("fps", 8), 3)
    assert metadata["usage"] == {"video_frames": count, "video_seconds": seconds}
    _, rate, frames = opened(base64.b64decode(answer.json["output"]["data"]))
    assert (len(frames), rate) == (count, applied.get("fps", 8))
    told = {name: value for name, value in applied.items() if name != "frames"}
    assert told.items() <= metadata["options"].items()
    again = run(client, type_, input_for(type_, family), options=metadata["options"]).json
    assert again["metadata"]["options"] == metadata["options"]
    repeated = opened(base64.b64decode(again["output"]["data"]))[2]
    assert np.abs(repeated - frames.astype(float)).mean() < 2


@pytest.mark.parametrize(
    ("type_", "family"), [("text-to-video", "cogvideox"), ("text-to-video", "text_to_video_ms")]
)
def test_a_film_is_as_large_as_the_model_makes_them_by_itself(make_app, checkpoint, type_, family):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    answer = run(client, type_, "red", options={"num_inference_steps": 1})
    options = answer.json["metadata"]["options"]
    assert (options["width"], options["height"], options["num_inference_steps"]) == (64, 64, 1)


def test_an_entrys_limits_hold_for_what_is_left_to_the_model(make_app, checkpoint):
    limits = {"width": 100, "height": 70, "num_frames": 20}
    client = make_app([entry(checkpoint, "text-to-video", "wan", limits=limits)]).test_client()
    answer = run(client, "text-to-video", "red", options={"num_inference_steps": 1})
    options = answer.json["metadata"]["options"]
    assert (options["width"], options["height"], options["num_frames"]) == (96, 64, 17)
    answer = run(client, "text-to-video", "red", options={"duration": 2})
    told = answer.json["error"]["details"]["options.duration"]
    assert told == "is 33 frames at 16 a second; at most 20 are allowed"


@pytest.mark.parametrize(
    ("of_entry", "asked", "frames"),
    [
        ({"num_frames": 5}, {}, 5),
        ({"num_frames": 5}, {"duration": 0.5}, 9),
        ({"duration": 0.5}, {}, 9),
        ({"duration": 0.5}, {"num_frames": 5}, 5),
        ({"num_frames": 5}, {"duration": None}, 5),
    ],
)
def test_what_a_caller_says_of_the_length_goes_before_the_entrys(
    make_app, checkpoint, of_entry, asked, frames
):
    options = {**of_entry, "num_inference_steps": 1, **SIDES}
    client = make_app([entry(checkpoint, "text-to-video", "wan", options=options)]).test_client()
    answer = run(client, "text-to-video", "red", options=asked)
    assert answer.json["metadata"]["usage"]["video_frames"] == frames


# One checkpoint for both tasks.


def test_a_checkpoint_that_does_both_tasks_may_have_an_entry_for_each(make_app, checkpoint):
    types = ("text-to-video", "image-to-video")
    client = make_app([entry(checkpoint, type_, "ltx") for type_ in types]).test_client()
    options = {"num_inference_steps": 1, **SIDES, "num_frames": 9}
    for type_ in types:
        answer = run(client, type_, input_for(type_, "ltx"), options=options)
        assert answer.status_code == 200, answer.json


@pytest.mark.parametrize(
    ("type_", "family", "name"),
    [
        ("text-to-video", SVD, "StableVideoDiffusionPipeline"),
        ("image-to-video", "wan", "WanPipeline"),
        ("image-to-video", "text_to_video_ms", "TextToVideoSDPipeline"),
    ],
)
def test_a_checkpoint_for_another_task_is_unavailable(make_app, checkpoint, type_, family, name):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    answer = run(client, type_, input_for(type_, family))
    assert answer.status_code == 503
    told = f"Its checkpoint is for a {name}, which does not do {type_}."
    assert told in answer.json["error"]["message"]


# Steps, and those who leave.


@pytest.mark.parametrize(
    ("type_", "family"),
    [
        ("text-to-video", "ltx"),
        ("text-to-video", "text_to_video_ms"),
        ("image-to-video", "i2vgen_xl"),
    ],
)
def test_the_steps_of_a_run_are_told_while_it_runs(make_app, checkpoint, type_, family):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    value, options = input_for(type_, family), {**SIDES, "num_frames": fewest(type_, family)}
    run(client, type_, value, options={**options, "num_inference_steps": 1})
    caller = threading.Thread(
        target=run,
        args=(client, type_, value),
        kwargs={"options": {**options, "num_inference_steps": 60}},
    )
    caller.start()
    seen = []
    while caller.is_alive():
        if running := client.get(f"/crane/models/{type_}").json["running"]:
            seen.append(running)
        time.sleep(0.01)
    caller.join()
    steps = [running["step"] for running in seen if "step" in running]
    assert len(set(steps)) > 5
    assert steps == sorted(steps)
    assert {running["steps"] for running in seen if "steps" in running} == {60}


@pytest.mark.parametrize(
    ("type_", "family"),
    [
        ("text-to-video", "wan"),
        ("text-to-video", "text_to_video_ms"),
        ("image-to-video", SVD),
        ("image-to-video", "i2vgen_xl"),
    ],
)
def test_a_film_that_nobody_waits_for_stops_at_the_next_step(
    make_app, checkpoint, type_, family, capsys
):
    client = make_app([entry(checkpoint, type_, family)], request_timeout_s=1.0).test_client()
    value, options = input_for(type_, family), {**SIDES, "num_frames": fewest(type_, family)}
    while (
        run(client, type_, value, options={**options, "num_inference_steps": 1}).status_code == 504
    ):
        pass  # until it is loaded
    slow = {"width": 192, "height": 192, "num_frames": 17, "num_inference_steps": 200}
    answer = run(client, type_, [value, value], options=slow)
    assert answer.status_code == 504
    last = client.get(f"/crane/models/{type_}").json["running"]
    deadline = time.monotonic() + 20
    while running := client.get(f"/crane/models/{type_}").json["running"]:
        last = running
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert last is None or last.get("step", 0) < 150
    assert "failed a batch" not in capsys.readouterr().err


# What is refused.


@pytest.mark.parametrize(
    ("type_", "family", "options", "path", "told"),
    [
        (
            "text-to-video",
            "wan",
            {"num_frames": 8},
            "num_frames",
            "4k + 1 for this model, such as 5 or 9, not 8",
        ),
        (
            "text-to-video",
            "ltx",
            {"num_frames": 10},
            "num_frames",
            "8k + 1 for this model, such as 9 or 17",
        ),
        (
            "text-to-video",
            "cogvideox",
            {"num_frames": 13},
            "num_frames",
            "8k + 1 for this model, such as 9 or 17",
        ),
        (
            "image-to-video",
            "wan_image",
            {"num_frames": 1},
            "num_frames",
            "4k + 1 for this model, such as 5, not 1",
        ),
        (
            "text-to-video",
            "wan",
            {"num_frames": 5, "duration": 1},
            "duration",
            "without num_frames",
        ),
        ("text-to-video", "wan", {"num_frames": 1001}, "num_frames", "at most 1000"),
        ("text-to-video", "wan", {"duration": 61}, "duration", "at most 60"),
        ("text-to-video", "wan", {"fps": 7.5}, "fps", "must be a whole number"),
        ("text-to-video", "wan", {"width": 72}, "width", "a multiple of 16 for this model, not 72"),
        (
            "text-to-video",
            "ltx",
            {"height": 48},
            "height",
            "a multiple of 32 for this model, not 48",
        ),
        ("image-to-video", SVD, {"height": 68}, "height", "a multiple of 8 for this model"),
        ("image-to-video", "cogvideox_image", {"width": 96}, "width", "must be 64 for this model"),
        (
            "image-to-video",
            SVD,
            {"negative_prompt": "red"},
            "negative_prompt",
            "not something this",
        ),
        (
            "image-to-video",
            "i2vgen_xl",
            {"motion_bucket_id": 9},
            "motion_bucket_id",
            "not something",
        ),
        ("text-to-video", "wan", {"motion_bucket_id": 9}, "motion_bucket_id", "not known here"),
        ("text-to-video", "wan", {"format": "gif"}, "format", "mp4"),
        ("text-to-video", "wan", {"scheduler": "ddim"}, "scheduler", "not known here"),
        (
            "text-to-video",
            "wan",
            {"width": 1024, "height": 1024, "num_frames": 513},
            "num_frames",
            "leads to 513 frames; at most 512 of 1024 x 1024 are made",
        ),
        (
            "text-to-video",
            "wan",
            {"width": 4096, "height": 4096, "duration": 60},
            "duration",
            "leads to 961 frames; at most 32 of 4096 x 4096 are made",
        ),
    ],
)
def test_an_option_that_cannot_be_is_named(
    make_app, checkpoint, type_, family, options, path, told
):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    answer = run(client, type_, input_for(type_, family), options=options)
    assert answer.status_code == 400, answer.json
    assert told in answer.json["error"]["details"][f"options.{path}"]


PICTURE = base64_of(picture(64, 64))


@pytest.mark.parametrize(
    ("type_", "family", "value", "path", "told"),
    [
        ("text-to-video", "wan", "", "input", "must not be empty"),
        ("text-to-video", "wan", {"promt": "red"}, "input.promt", "did you mean 'prompt'?"),
        ("text-to-video", "ltx", "river " * 200, "input.prompt", "the model reads 128"),
        ("text-to-video", "text_to_video_ms", "river " * 40, "input.prompt", "the model reads 77"),
        (
            "text-to-video",
            "ltx",
            {"prompt": "red", "negative_prompt": "river " * 200},
            "input.negative_prompt",
            "the model reads 128",
        ),
        ("image-to-video", SVD, {"prompt": "red"}, "input.image", "is missing"),
        (
            "image-to-video",
            SVD,
            {"image": PICTURE, "prompt": "red"},
            "input.prompt",
            "not something",
        ),
        (
            "image-to-video",
            SVD,
            {"image": PICTURE, "negative_prompt": "red"},
            "input.negative_prompt",
            "not something",
        ),
        ("image-to-video", "i2vgen_xl", {"image": PICTURE}, "input.prompt", "is missing, and"),
        ("image-to-video", SVD, {"image": "AAAA"}, "input.image", "no picture of a kind"),
    ],
)
def test_an_input_that_cannot_be_is_named(make_app, checkpoint, type_, family, value, path, told):
    client = make_app([entry(checkpoint, type_, family)]).test_client()
    answer = run(client, type_, value, options={"num_inference_steps": 1})
    assert answer.status_code == 400, answer.json
    assert told in answer.json["error"]["details"][path]


def test_a_prompt_may_be_cut(make_app, checkpoint):
    client = make_app([entry(checkpoint, "text-to-video", "ltx")]).test_client()
    options = {"num_inference_steps": 1, **SIDES, "num_frames": 9, "truncate": True}
    assert run(client, "text-to-video", "river " * 200, options=options).status_code == 200


def test_one_bad_input_of_a_call_is_named_by_its_place(make_app, checkpoint):
    client = make_app([entry(checkpoint, "text-to-video", "ltx")]).test_client()
    answer = run(client, "text-to-video", ["red", "river " * 200], options=SIDES)
    assert list(answer.json["error"]["details"]) == ["input[1].prompt"]


def test_the_largest_film_is_of_a_size_that_fits_in_memory():
    assert film_shapes.MAX_FILM_PIXELS * 3 * 4 <= 8 * 2**30  # in float32
