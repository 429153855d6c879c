"""Pictures: what a direct pipeline call gives on the same checkpoint, however it is asked.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from io import BytesIO
from itertools import cycle, islice

import numpy as np
import pytest
from PIL import Image
from werkzeug.datastructures import FileStorage
from werkzeug.test import stream_encode_multipart

from backend.adapters.images import ImageGenerator
from backend.tasks.images import SCHEDULERS
from tests.checkpoints import checkpoint, sentence
from tests.conftest import run, together, write_models
from tests.gpu import GPU
from tests.pictures import base64_of, difference, mask, picture, read, written
from tests.serving import Gunicorn

__all__ = ["checkpoint"]

TYPES = {
    "text-to-image": "AutoPipelineForText2Image",
    "image-to-image": "AutoPipelineForImage2Image",
    "inpainting": "AutoPipelineForInpainting",
}
DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
SIDES = {"width": 64, "height": 64}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LIBRARY_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PROMPTS = [sentence(words, seed) for seed, words in enumerate((3, 1, 4, 2, 5, 2, 3, 1))]


def entry(checkpoint, family="stable_diffusion", type_="text-to-image", **more):
    return {"id": type_, "type": type_, "hf_model": checkpoint(family), **more}


def input_for(type_, index=0):
    """An input of a task, different for each index."""
    value = {"prompt": PROMPTS[index]}
    if type_ != "text-to-image":
        value["image"] = base64_of(picture(64, 64, seed=index))
    if type_ == "inpainting":
        value["mask"] = base64_of(mask(64, 64))
    return value


def media_for(type_, index=0):
    """The same for a direct call."""
    media = {}
    if type_ != "text-to-image":
        media["image"] = picture(64, 64, seed=index)
    if type_ == "inpainting":
        media["mask_image"] = mask(64, 64)
    return media


@pytest.fixture(scope="module")
def direct(checkpoint):
    """Call a pipeline directly: ``direct(family, type, index, seed=…, …)`` gives pixels."""
    import diffusers
    import torch

    pipelines = {}

    def call(family, type_, index=0, *, seed, scheduler=None, device="cpu", **options):
        if (family, type_, device) not in pipelines:
            auto = getattr(diffusers, TYPES[type_])
            loaded = auto.from_pretrained(checkpoint(family))
            pipelines[family, type_, device] = loaded.to(device)
        pipeline = pipelines[family, type_, device]
        pipeline.set_progress_bar_config(disable=True)
        own = pipeline.scheduler
        if scheduler is not None:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config)
        try:
            output = pipeline(
                prompt=PROMPTS[index],
                generator=torch.Generator("cpu").manual_seed(seed),
                **media_for(type_, index),
                **options,
            )
        finally:
            pipeline.scheduler = own
        return np.asarray(output.images[0])

    return call


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """A real server, for its engine takes long to import diffusers.

    It has a cache instead of a Hub, and no compiler, which the entry ``compiled`` wants.
    """
    folder = tmp_path_factory.mktemp("server")
    cached = folder / "hub" / "models--tiny--drawer"
    shutil.copytree(checkpoint("stable_diffusion"), cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    entries = [{"id": type_, "type": type_, "hf_model": "tiny/drawer"} for type_ in TYPES]
    entries.append(entry(checkpoint, compile=True) | {"id": "compiled"})
    settings = {
        "HF_HOME": folder,
        "HF_HUB_OFFLINE": 1,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": 1,
    }
    server = Gunicorn(write_models(folder, entries), folder / "data", settings)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


# Parity.


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_picture_is_what_a_direct_call_draws(make_app, checkpoint, direct, family, type_, device):
    client = make_app([entry(checkpoint, family, type_)], devices=(device,)).test_client()
    options = {"num_inference_steps": 4, "guidance_scale": 4.0}
    more = {"strength": 0.8} if type_ != "text-to-image" else {}
    takes_size = type_ == "text-to-image" or family in ("stable_diffusion_3", "flux")
    sides = SIDES if takes_size or type_ == "inpainting" else {}
    answer = run(client, type_, input_for(type_), options={**options, **more, **SIDES, "seed": 5})
    assert answer.status_code == 200, answer.json
    expected = direct(family, type_, seed=5, device=device, **options, **more, **sides)
    assert expected.std() > 10  # not the grey of a picture that failed
    assert difference(read(answer.json["output"]), expected) <= 1
    metadata = answer.json["metadata"]
    assert metadata["device"].startswith(device)
    assert metadata["usage"] == {"images": 1}
    assert metadata["seed"] == metadata["options"]["seed"] == 5


def test_an_inpainting_checkpoint_proper_repaints_as_a_direct_call(make_app, checkpoint, direct):
    family, type_ = "stable_diffusion_inpainting", "inpainting"
    client = make_app([entry(checkpoint, family, type_)]).test_client()
    options = {"num_inference_steps": 3, **SIDES}
    answer = run(client, type_, input_for(type_), options={**options, "seed": 2})
    expected = direct(family, type_, seed=2, **options)
    assert difference(read(answer.json["output"]), expected) <= 1


@pytest.mark.parametrize("type_", ["image-to-image", "inpainting"])
def test_a_picture_is_resized_to_the_sides_that_are_asked_for(make_app, checkpoint, type_):
    import diffusers
    import torch

    client = make_app([entry(checkpoint, type_=type_)]).test_client()
    image, stencil = picture(200, 120), mask(200, 120)
    value = {"prompt": "red", "image": base64_of(image)}
    if type_ == "inpainting":
        value["mask"] = base64_of(stencil)
    options = {"num_inference_steps": 3, "strength": 0.7}
    sides = {"width": 96, "height": 64}
    answer = run(client, type_, value, options={**options, **sides, "seed": 3})
    pipeline = getattr(diffusers, TYPES[type_]).from_pretrained(checkpoint("stable_diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    media = {"image": image.resize((96, 64), Image.Resampling.LANCZOS)}
    if type_ == "inpainting":
        media |= {"mask_image": stencil.resize((96, 64), Image.Resampling.NEAREST), **sides}
    generator = torch.Generator("cpu").manual_seed(3)
    expected = np.asarray(pipeline("red", generator=generator, **media, **options).images[0])
    assert expected.shape == (64, 96, 3)
    assert difference(read(answer.json["output"]), expected) <= 1


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.usefixtures("whole_batches")
def test_eight_callers_at_once_with_mixed_options_get_what_they_would_get_alone(
    make_app, checkpoint, direct, type_
):
    client = make_app([entry(checkpoint, type_=type_)]).test_client()
    kinds = [
        {"num_inference_steps": 3},
        {"num_inference_steps": 3, "guidance_scale": 2.0},
        {"num_inference_steps": 4, "negative_prompt": "red green"},
    ]
    wanted = list(islice(cycle(kinds), 8))
    answers = together(
        client,
        [
            {
                "model_id": type_,
                "input": input_for(type_, index),
                "options": {**options, **SIDES, "seed": 100 + index},
            }
            for index, options in enumerate(wanted)
        ],
    )
    for index, (answer, options) in enumerate(zip(answers, wanted, strict=True)):
        assert answer.status_code == 200, answer.json
        sides = {} if type_ == "image-to-image" else SIDES
        expected = direct("stable_diffusion", type_, index, seed=100 + index, **options, **sides)
        assert difference(read(answer.json["output"]), expected) <= 1


@pytest.mark.parametrize(("name", "class_name"), LIBRARY_SCHEDULERS.items())
@pytest.mark.usefixtures("whole_batches")
def test_each_scheduler_draws_the_same_alone_and_in_a_batch(
    make_app, checkpoint, direct, name, class_name
):
    client = make_app([entry(checkpoint)]).test_client()
    options = {"num_inference_steps": 4, **SIDES}
    answer = run(
        client,
        "text-to-image",
        PROMPTS[:3],
        options={**options, "scheduler": name, "seed": 40},
    )
    assert answer.status_code == 200, answer.json
    assert answer.json["metadata"]["batch_size"] == 3
    assert answer.json["metadata"]["options"]["scheduler"] == name
    for index, output in enumerate(answer.json["output"]):
        expected = direct(
            "stable_diffusion",
            "text-to-image",
            index,
            seed=40 + index,
            scheduler=class_name,
            **options,
        )
        assert difference(read(output), expected) <= 1


def test_every_scheduler_is_among_those_tested():
    assert list(LIBRARY_SCHEDULERS) == SCHEDULERS


def test_schedulers_of_a_family_of_its_own_are_told_apart(make_app, checkpoint):
    client = make_app([entry(checkpoint, "flux")]).test_client()
    answer = run(client, "text-to-image", "red", options={"scheduler": "ddim", **SIDES})
    assert answer.status_code == 400
    assert "'ddim', which does not suit this model" in answer.json["error"]["message"]


def test_a_negative_prompt_of_an_input_goes_before_the_option(make_app, checkpoint, direct):
    client = make_app([entry(checkpoint, "stable_diffusion_xl")]).test_client()
    options = {"num_inference_steps": 3, **SIDES, "seed": 9}
    own = {"prompt": PROMPTS[0], "negative_prompt": "old tower"}
    # Without one, SDXL is guided by zeros, not by the empty text: the three must not be mixed up.
    inputs = [own, {"prompt": PROMPTS[0], "negative_prompt": ""}, PROMPTS[0]]
    answers = [run(client, "text-to-image", value, options=options).json for value in inputs]
    batch = run(client, "text-to-image", inputs, options=options).json
    for index, negative in enumerate(("old tower", "", None)):
        for seed, answer in ((9, answers[index]["output"]), (9 + index, batch["output"][index])):
            expected = direct(
                "stable_diffusion_xl",
                "text-to-image",
                seed=seed,
                negative_prompt=negative,
                num_inference_steps=3,
                **SIDES,
            )
            assert difference(read(answer), expected) <= 1
    pixels = [read(answer["output"]) for answer in answers]
    assert difference(pixels[0], pixels[1]) > 5
    assert difference(pixels[1], pixels[2]) > 5


# Batches and seeds.


def test_equal_options_share_a_batch_and_each_picture_has_its_own_seed(make_app, checkpoint):
    client = make_app([entry(checkpoint)]).test_client()
    options = {"num_inference_steps": 3, **SIDES}
    batch = run(
        client, "text-to-image", [PROMPTS[0]] * 3, options={**options, "num_images": 2, "seed": 11}
    ).json
    assert batch["metadata"]["batch_size"] == 3
    assert batch["metadata"]["seed"] == [11, 13, 15]
    assert batch["metadata"]["usage"] == {"images": 6}
    pictures = [read(one) for outputs in batch["output"] for one in outputs]
    for seed, pixels in enumerate(pictures, start=11):
        alone = run(client, "text-to-image", PROMPTS[0], options={**options, "seed": seed}).json
        assert difference(read(alone["output"]), pixels) <= 1
    assert len({pixels.tobytes() for pixels in pictures}) == 6


def test_callers_at_once_share_a_batch(make_app, checkpoint):
    client = make_app([entry(checkpoint)]).test_client()
    options = {"num_inference_steps": 30, **SIDES}
    request = {"model_id": "text-to-image", "input": "red", "options": options}
    client.post("/crane/run", json=request)
    answers = together(client, [request] * 6)
    assert max(answer.json["metadata"]["batch_size"] for answer in answers) > 1


def test_pictures_of_different_sizes_are_not_mixed_up(make_app, checkpoint):
    client = make_app([entry(checkpoint, type_="image-to-image")]).test_client()
    sizes = [(64, 64), (72, 64), (64, 72), (70, 67)]
    inputs = [
        {"prompt": "red", "image": base64_of(picture(*size, seed=place))}
        for place, size in enumerate(sizes)
    ]
    options = {"num_inference_steps": 4, "seed": 1}
    batch = run(client, "image-to-image", inputs, options=options).json
    for place, (width, height) in enumerate(sizes):
        pixels = read(batch["output"][place])
        assert pixels.shape == (height - height % 8, width - width % 8, 3)
        alone = run(
            client, "image-to-image", inputs[place], options={**options, "seed": 1 + place}
        ).json
        assert difference(read(alone["output"]), pixels) <= 1
        assert alone["metadata"]["options"]["width"] == width - width % 8
    assert batch["metadata"]["options"]["width"] is None  # the inputs differ


def test_a_call_of_more_pictures_than_a_run_takes_is_made_in_several(
    make_app, checkpoint, monkeypatch
):
    monkeypatch.setattr(ImageGenerator, "max_batch_tokens", 200)  # three of 64 x 64
    sizes = []
    real = ImageGenerator._arguments

    def arguments(self, run_, options):
        sizes.append(len(run_))
        return real(self, run_, options)

    monkeypatch.setattr(ImageGenerator, "_arguments", arguments)
    client = make_app([entry(checkpoint)]).test_client()
    options = {"num_inference_steps": 2, **SIDES, "seed": 3}
    several = run(client, "text-to-image", "red", options={**options, "num_images": 8}).json
    assert sizes == [3, 3, 2]
    last = run(client, "text-to-image", "red", options={**options, "seed": 10}).json
    assert difference(read(last["output"]), read(several["output"][7])) <= 1


# One checkpoint for several entries.


def test_entries_of_one_checkpoint_share_its_weights(make_app, checkpoint, tmp_path, direct):
    folder = tmp_path / "weights"
    shutil.copytree(checkpoint("stable_diffusion"), folder)
    entries = [{"id": type_, "type": type_, "hf_model": str(folder)} for type_ in TYPES]
    client = make_app(entries).test_client()
    options = {"num_inference_steps": 3, **SIDES, "seed": 4}
    first, *others = TYPES
    before = {**options, "scheduler": "euler_ancestral"}  # the others shall not take it over
    assert run(client, first, input_for(first), options=before).status_code == 200
    shutil.rmtree(folder)  # what is not loaded by now never will be
    for type_ in others:
        answer = run(client, type_, input_for(type_), options=options)
        assert answer.status_code == 200, answer.json
        sides = {} if type_ == "image-to-image" else SIDES
        expected = direct("stable_diffusion", type_, seed=4, num_inference_steps=3, **sides)
        assert difference(read(answer.json["output"]), expected) <= 1
    states = {model["id"]: model["state"] for model in client.get("/crane/models").json["models"]}
    assert set(states.values()) == {"ready"}


def test_entries_that_share_weights_work_side_by_side(make_app, checkpoint, direct):
    entries = [entry(checkpoint, type_=type_) for type_ in TYPES]
    client = make_app(entries).test_client()
    types = list(islice(cycle(TYPES), 9))
    schedulers = ["ddim", "euler_ancestral"]
    requests = [
        {
            "model_id": type_,
            "input": input_for(type_, place % 8),
            "options": {
                "num_inference_steps": 4,
                **SIDES,
                "seed": place,
                "scheduler": schedulers[place % 2],
            },
        }
        for place, type_ in enumerate(types)
    ]
    names = ["DDIMScheduler", "EulerAncestralDiscreteScheduler"]
    for place, answer in enumerate(together(client, requests)):
        assert answer.status_code == 200, answer.json
        sides = {} if types[place] == "image-to-image" else SIDES
        expected = direct(
            "stable_diffusion",
            types[place],
            place % 8,
            seed=place,
            scheduler=names[place % 2],
            num_inference_steps=4,
            **sides,
        )
        assert difference(read(answer.json["output"]), expected) <= 1


def test_a_checkpoint_in_the_hubs_cache_is_loaded_and_its_commit_told(server):
    for type_ in TYPES:
        status, answer = server.run(
            type_, input_for(type_), options={"num_inference_steps": 2, **SIDES}
        )
        assert status == 200, answer
        assert answer["metadata"]["revision"] == COMMIT


def test_an_entry_that_asks_for_other_weights_of_a_checkpoint_loads_its_own(
    make_app, checkpoint, tmp_path
):
    folder = tmp_path / "weights"
    shutil.copytree(checkpoint("stable_diffusion"), folder)
    entries = [
        {"id": "one", "type": "text-to-image", "hf_model": str(folder)},
        {"id": "two", "type": "text-to-image", "hf_model": str(folder), "dtype": "bfloat16"},
    ]
    client = make_app(entries).test_client()
    options = {"num_inference_steps": 1, **SIDES}
    answers = [run(client, id_, "red", options=options).json for id_ in ("one", "two")]
    assert [answer["metadata"]["dtype"] for answer in answers] == ["float32", "bfloat16"]


def test_a_checkpoint_without_a_pipeline_for_an_entry_fails_that_entry_only(
    make_app, checkpoint, monkeypatch
):
    import diffusers

    entries = [entry(checkpoint), entry(checkpoint, type_="inpainting")]
    client = make_app(entries).test_client()
    options = {"num_inference_steps": 1, **SIDES}
    assert run(client, "text-to-image", "red", options=options).status_code == 200

    def no_pipeline(pipeline):
        raise ValueError("AutoPipeline can't find a pipeline linked to it")

    monkeypatch.setattr(diffusers.AutoPipelineForInpainting, "from_pipe", no_pipeline)
    answer = run(client, "inpainting", input_for("inpainting"), options=options)
    assert answer.status_code == 503
    assert "no pipeline for inpainting" in answer.json["error"]["message"]
    assert run(client, "text-to-image", "red", options=options).status_code == 200


# Steps, and those who leave.


def test_the_steps_of_a_run_are_told_while_it_runs(make_app, checkpoint):
    client = make_app([entry(checkpoint)]).test_client()
    options = {"num_inference_steps": 1, **SIDES}
    run(client, "text-to-image", "red", options=options)
    options["num_inference_steps"] = 60
    caller = threading.Thread(
        target=run, args=(client, "text-to-image", ["red", "old"]), kwargs={"options": options}
    )
    caller.start()
    seen = []
    while caller.is_alive():
        if running := client.get("/crane/models/text-to-image").json["running"]:
            seen.append(running)
        time.sleep(0.01)
    caller.join()
    steps = [running["step"] for running in seen if "step" in running]
    assert len(set(steps)) > 5
    assert steps == sorted(steps)
    assert {running["inputs"] for running in seen} == {2}
    assert {running["steps"] for running in seen if "steps" in running} == {60}
    assert client.get("/crane/models/text-to-image").json["running"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_nobody_waits_for_stops_at_the_next_step(make_app, checkpoint, family, capsys):
    app = make_app([entry(checkpoint, family)], request_timeout_s=1.0)
    client = app.test_client()
    quick = {"num_inference_steps": 1, **SIDES}
    while run(client, "text-to-image", "red", options=quick).status_code == 504:
        pass  # until it is loaded
    answer = run(
        client,
        "text-to-image",
        ["red", "old"],
        # Seconds a step, where it is large.
        options={"num_inference_steps": 200, "num_images": 4, "width": 256, "height": 256},
    )
    assert answer.status_code == 504
    answered = last = client.get("/crane/models/text-to-image").json["running"]
    deadline = time.monotonic() + 20
    while running := client.get("/crane/models/text-to-image").json["running"]:
        last = running
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if answered is not None and "step" in answered:
        assert last["step"] <= answered["step"] + 1
        assert last["step"] < 150
    assert "failed a batch" not in capsys.readouterr().err


def test_a_neighbour_who_leaves_changes_nothing_for_who_stays(make_app, checkpoint, direct):
    client = make_app([entry(checkpoint)]).test_client()
    engine = client.application.extensions["crane"].engine
    options = {"num_inference_steps": 60, **SIDES}
    run(client, "text-to-image", "red", options={**options, "num_inference_steps": 1})
    answers = {}

    def stay(seed):
        answers[seed] = run(
            client, "text-to-image", PROMPTS[0], options={**options, "seed": seed}
        ).json

    from backend.engine.calls import Call

    spec = client.application.extensions["crane"].registry.get("text-to-image")
    applied = spec.options_schema.load(options)
    applied.pop("seed")
    # The first run keeps the model busy, so that the next two share a batch.
    threads = [threading.Thread(target=stay, args=(1,))]
    threads[0].start()
    while not client.get("/crane/models/text-to-image").json["running"]:
        time.sleep(0.005)
    leaver = engine._submit(
        Call(
            request_id="leaver",
            model_id="text-to-image",
            inputs=[{"prompt": "tower", "negative_prompt": None}],
            options=applied,
            seeds=[3],
            timeout_s=60,
        )
    )
    threads.append(threading.Thread(target=stay, args=(2,)))
    threads[1].start()
    threads[0].join(60)
    engine._cancel(leaver)
    threads[1].join(60)
    for seed, answer in answers.items():
        expected = direct(
            "stable_diffusion", "text-to-image", seed=seed, num_inference_steps=60, **SIDES
        )
        assert difference(read(answer["output"]), expected) <= 1


# What is refused.

PICTURE = base64_of(picture(64, 64))


@pytest.mark.parametrize(
    ("type_", "value", "options", "path", "told"),
    [
        ("text-to-image", "red", {"width": 65}, "options.width", "a multiple of 8, not 65"),
        ("text-to-image", "red", {"height": 8192}, "options.height", "at most 4096"),
        ("text-to-image", "red", {"num_images": 17}, "options.num_images", "at most 16"),
        ("text-to-image", "red", {"scheduler": "eular"}, "options.scheduler", "'euler'"),
        ("text-to-image", "red", {"format": "tiff"}, "options.format", "png, webp"),
        ("text-to-image", "red", {"strength": 0.5}, "options.strength", "not known here"),
        ("text-to-image", " ", {}, "input", "must not be empty"),
        ("text-to-image", {"promt": "red"}, {}, "input.promt", "did you mean 'prompt'?"),
        ("text-to-image", 5, {}, "input", "a prompt, or an object with a prompt, not a number"),
        ("text-to-image", "river " * 40, {}, "input.prompt", "the model reads 77"),
        ("image-to-image", {"prompt": "red"}, {}, "input.image", "is missing"),
        (
            "image-to-image",
            {"prompt": "red", "image": PICTURE},
            {"strength": 0.01, "num_inference_steps": 50},
            "options.strength",
            "leaves none of 50 num_inference_steps",
        ),
        (
            "image-to-image",
            {"prompt": "red", "image": base64_of(picture(5000, 16))},
            {},
            "input.image",
            "is 5000 x 16 pixels, and this model makes 8 x 8 to 4096 x 4096",
        ),
        (
            "image-to-image",
            {"prompt": "red", "image": base64_of(picture(4, 4))},
            {},
            "input.image",
            "is 4 x 4 pixels",
        ),
        (
            "inpainting",
            {"prompt": "red", "image": PICTURE, "mask": base64_of(mask(32, 64))},
            {},
            "input.mask",
            "is 32 x 64 pixels, and the image 64 x 64",
        ),
    ],
)
def test_a_fault_is_named_with_its_field(make_app, checkpoint, type_, value, options, path, told):
    client = make_app([entry(checkpoint, type_=type_)]).test_client()
    answer = run(client, type_, value, options=options)
    assert answer.status_code == 400, answer.json
    assert told in answer.json["error"]["details"][path]


@pytest.mark.parametrize(
    ("options", "value", "path"),
    [
        ({"negative_prompt": "old"}, "red", "options.negative_prompt"),
        ({}, {"prompt": "red", "negative_prompt": "old"}, "input.negative_prompt"),
        ({"width": 72}, "red", "options.width"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(make_app, checkpoint, options, value, path):
    client = make_app([entry(checkpoint, "flux")]).test_client()
    answer = run(client, "text-to-image", value, options=options)
    assert answer.status_code == 400
    assert path in answer.json["error"]["details"]


def test_a_prompt_may_be_cut_and_the_log_does_not_have_it(server):
    options = {"num_inference_steps": 1, **SIDES, "truncate": True}
    assert server.run("text-to-image", "river " * 40, options=options)[0] == 200
    assert "river" not in server.log()


def test_one_bad_input_of_a_call_is_named_by_its_place(make_app, checkpoint):
    client = make_app([entry(checkpoint)]).test_client()
    answer = run(client, "text-to-image", ["red", "river " * 40], options=SIDES)
    assert list(answer.json["error"]["details"]) == ["input[1].prompt"]


# What the checkpoint's own safety checker blacks out.


def test_a_picture_that_the_checkpoint_blacks_out_is_told(make_app, checkpoint):
    client = make_app([entry(checkpoint, "stable_diffusion_flagging")]).test_client()
    answer = run(client, "text-to-image", "red", options={"num_inference_steps": 1, **SIDES})
    assert answer.json["metadata"]["flagged"] is True
    assert read(answer.json["output"]).max() == 0
    clean = make_app([entry(checkpoint)]).test_client()
    answer = run(clean, "text-to-image", "red", options={"num_inference_steps": 1, **SIDES})
    assert "flagged" not in answer.json["metadata"]


# Forms, formats, and bare bytes.


def post_form(client, **parts):
    parts = {name.replace("__", "."): part for name, part in parts.items()}
    return client.post("/crane/run", data=parts, content_type="multipart/form-data")


def test_a_form_base64_and_a_data_url_give_the_same_answer(make_app, checkpoint):
    client = make_app([entry(checkpoint, type_="image-to-image")]).test_client()
    image = written(picture(64, 64, seed=3), "JPEG")
    options = {"num_inference_steps": 3, "seed": 8}
    plain = base64_of(image)
    lines = "\n".join(plain[at : at + 76] for at in range(0, len(plain), 76))
    spellings = [plain, lines, f"data:image/jpeg;base64,{plain}", f"data:;base64,{plain}"]
    spellings.append("data:image/jpeg," + "".join(f"%{byte:02X}" for byte in image))
    answers = [
        run(client, "image-to-image", {"prompt": "red", "image": text}, options=options)
        for text in spellings
    ]
    for input_part in ({"input__prompt": "red"}, {"input": json.dumps({"prompt": "red"})}):
        answers.append(
            post_form(
                client,
                model_id="image-to-image",
                **input_part,
                input__image=(BytesIO(image), "boat.jpg"),
                options=json.dumps(options),
            )
        )
    outputs = {answer.json["output"]["data"] for answer in answers}
    assert [answer.status_code for answer in answers] == [200] * 7
    assert len(outputs) == 1


def test_a_file_that_a_form_keeps_on_disk_is_read_and_closed(make_app, checkpoint):
    client = make_app([entry(checkpoint, type_="image-to-image")]).test_client()
    image = written(picture(640, 480), "BMP")
    assert len(image) > 500_000  # in memory up to here
    parts = {
        "model_id": "image-to-image",
        "input.prompt": "red",
        "input.image": FileStorage(BytesIO(image), "boat.bmp"),
        "options": json.dumps({"num_inference_steps": 2, **SIDES}),
    }
    # Written here, because the test client leaves a file of its own open.
    stream, _, boundary = stream_encode_multipart(parts, use_tempfile=False)
    answer = client.post(
        "/crane/run",
        data=stream.read(),
        content_type=f"multipart/form-data; boundary={boundary}",
    )
    assert answer.status_code == 200, answer.json


@pytest.mark.parametrize(
    ("parts", "path", "told"),
    [
        ({"model_id": "image-to-image"}, "input", "is missing"),
        ({"model_id": "image-to-image", "options": "{"}, "options", "is not valid JSON"),
        ({"model_id": "image-to-image", "input": "x", "input__prompt": "y"}, "input", "JSON"),
        ({"model_id": "image-to-image", "input": "[]", "input__prompt": "y"}, "input", "object"),
        ({"model_id": "image-to-image", "imput": "x"}, "imput", "not a part that is known"),
        ({"model_id": "image-to-image", "input__a__b": "x"}, "input.a.b", "not a part"),
        ({"model_id": "echo", "input__a": (BytesIO(b"x"), "x")}, "input.a", "is a file"),
        ({"model_id": "echo", "input": (BytesIO(b"x"), "x")}, "input", "is a file"),
    ],
)
def test_a_fault_in_a_form_is_named(make_app, checkpoint, parts, path, told):
    entries = [entry(checkpoint, type_="image-to-image"), {"id": "echo", "type": "echo"}]
    answer = post_form(make_app(entries).test_client(), **parts)
    assert answer.status_code == 400
    assert told in answer.json["error"]["details"][path]


def test_a_part_that_is_there_twice_is_refused(client):
    answer = client.post(
        "/crane/run",
        data={"model_id": "echo", "input": ["a", "b"]},
        content_type="multipart/form-data",
    )
    assert answer.json["error"]["details"] == {"input": "is there twice; send a batch as JSON"}


def test_a_form_may_be_text_alone(client):
    answer = post_form(client, model_id="echo", input="[5]", options='{"delay_ms": 1}')
    assert answer.json["output"] == "[5]"
    assert answer.json["metadata"]["options"] == {"delay_ms": 1}


def test_a_form_without_a_boundary_or_with_too_many_parts_is_refused(client):
    answer = client.post("/crane/run", data=b"x", content_type="multipart/form-data")
    assert answer.status_code == 400
    assert "without a boundary" in answer.json["error"]["message"]
    answer = post_form(client, **{f"input__{number}": "x" for number in range(101)})
    assert answer.status_code == 413
    assert "more than 100 parts" in answer.json["error"]["message"]


@pytest.fixture
def drawer(make_app, checkpoint):
    """Ask for a picture with an Accept header: ``drawer("image/png", format="png")``."""
    own = entry(checkpoint, options={"format": "webp", "num_inference_steps": 1, **SIDES})
    client = make_app([own]).test_client()

    def ask(accept, value="red", **options):
        body = {"model_id": "text-to-image", "input": value, "options": {"seed": 1, **options}}
        return client.post("/crane/run", json=body, headers={"Accept": accept} if accept else {})

    return ask


@pytest.mark.parametrize(
    ("accept", "options", "mime_type"),
    [
        (None, {}, "application/json"),
        ("*/*", {}, "application/json"),
        ("application/json, image/png;q=0.5", {}, "application/json"),
        ("image/png", {}, "image/png"),
        ("image/png, */*", {}, "image/png"),
        ("image/*", {}, "image/webp"),  # the entry's own
        ("image/*", {"format": "jpeg"}, "image/jpeg"),
        ("image/jpeg, image/png;q=0.2", {}, "image/jpeg"),
        ("image/avif, image/jpeg;q=0.5, image/png;q=0.7", {}, "image/png"),
    ],
)
def test_the_answer_has_the_form_that_accept_asks_for(drawer, accept, options, mime_type):
    answer = drawer(accept, **options)
    assert answer.status_code == 200, answer.json
    assert answer.mimetype == mime_type
    if mime_type != "application/json":
        assert read(answer.data).shape == (64, 64, 3)


def test_bare_bytes_are_the_same_picture_with_the_receipt_in_a_header(drawer):
    bare, plain = drawer("image/png"), drawer(None, format="png")
    assert read(bare.data).tobytes() == read(plain.json["output"]).tobytes()
    assert bare.headers["Content-Disposition"] == 'inline; filename="text-to-image.png"'
    receipt = json.loads(bare.headers["X-Crane-Metadata"])
    assert set(receipt) == set(plain.json["metadata"])
    assert receipt["options"]["format"] == "png"
    assert receipt["request_id"] == bare.headers["X-Request-ID"]


def test_the_receipt_in_a_header_is_ascii_and_short(drawer):
    answer = drawer("image/png", negative_prompt="\u2028é" * 300, truncate=True)
    receipt = answer.headers["X-Crane-Metadata"]
    assert receipt.isascii()
    assert len(receipt) < 4096
    assert json.loads(receipt)["options"]["negative_prompt"] == "\u2028é" * 100 + "…"


@pytest.mark.parametrize(
    ("accept", "value", "options", "told"),
    [
        ("text/html", "red", {}, "application/json, image/png, image/jpeg, image/webp"),
        ("image/png", "red", {"format": "jpeg"}, "leaves out image/jpeg"),
        ("image/png", ["red"], {}, "Several outputs"),
        ("image/png", "red", {"num_images": 2}, "Several outputs"),
    ],
)
def test_what_accept_leaves_out_is_refused(drawer, accept, value, options, told):
    answer = drawer(accept, value, **options)
    assert answer.status_code == 406
    assert told in answer.json["error"]["message"]


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
def test_each_format_is_what_it_says(drawer, format_):
    answer = drawer(f"image/{format_}")
    assert Image.open(BytesIO(answer.data)).format == format_.upper()


# Ways to fit a small device.


@pytest.mark.parametrize(
    "memory",
    [
        {"quantize": "int8"},
        {"quantize": "float8"},
        {"vae_tiling": True, "vae_slicing": True},
        {"attention_slicing": True},
    ],
)
def test_a_model_that_saves_memory_draws_nearly_the_same(make_app, checkpoint, direct, memory):
    client = make_app([entry(checkpoint, memory=memory)]).test_client()
    options = {"num_inference_steps": 2, **SIDES}
    answer = run(client, "text-to-image", PROMPTS[0], options={**options, "seed": 6})
    assert answer.status_code == 200, answer.json
    expected = direct("stable_diffusion", "text-to-image", seed=6, **options)
    close = np.abs(read(answer.json["output"]).astype(int) - expected.astype(int)).mean()
    quantize = memory.get("quantize")
    assert 0 < close < 12 if quantize else close < 1
    dtype = answer.json["metadata"]["dtype"]
    assert dtype == (f"float32 with {quantize} weights" if quantize else "float32")


@pytest.mark.parametrize("memory", [{"offload": "model"}, {"offload": "sequential"}])
@pytest.mark.parametrize("mark", [pytest.param("cuda:0", marks=GPU)])
def test_offloaded_entries_of_one_checkpoint_draw_the_same(
    make_app, checkpoint, direct, memory, mark
):
    entries = [entry(checkpoint, type_=type_, memory=memory) for type_ in TYPES]
    client = make_app(entries, devices=("cuda:0",)).test_client()
    options = {"num_inference_steps": 2, **SIDES}
    for type_ in (*TYPES, *TYPES):  # to and fro
        answer = run(client, type_, input_for(type_), options={**options, "seed": 6})
        assert answer.status_code == 200, answer.json
        sides = {} if type_ == "image-to-image" else SIDES
        expected = direct(
            "stable_diffusion", type_, seed=6, device="cuda", num_inference_steps=2, **sides
        )
        assert difference(read(answer.json["output"]), expected) <= 1


def test_tiles_are_used_where_a_picture_is_large(make_app, checkpoint, direct):
    client = make_app([entry(checkpoint, memory={"vae_tiling": True})]).test_client()
    sides = {"width": 192, "height": 192}
    answer = run(
        client, "text-to-image", PROMPTS[0], options={"num_inference_steps": 1, **sides, "seed": 6}
    )
    whole = direct("stable_diffusion", "text-to-image", seed=6, num_inference_steps=1, **sides)
    assert difference(read(answer.json["output"]), whole) > 0  # the seams differ


@pytest.mark.filterwarnings("ignore::Warning:torch")  # the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_a_compiled_model_draws_the_same(make_app, checkpoint, direct):
    family = "stable_diffusion_shallow"
    client = make_app([entry(checkpoint, family, compile=True)]).test_client()
    options = {"num_inference_steps": 2, **SIDES}
    answer = run(client, "text-to-image", PROMPTS[0], options={**options, "seed": 6})
    assert answer.status_code == 200, answer.json
    expected = direct(family, "text-to-image", seed=6, **options)
    assert difference(read(answer.json["output"]), expected) <= 1


def test_a_model_is_not_compiled_where_there_is_no_compiler(server):
    status, answer = server.run("compiled", "red")
    assert status == 503
    assert "nothing can be compiled for cpu here" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("family", "more", "told"),
    [
        ("stable_diffusion", {"memory": {"offload": "model"}}, "needs CUDA, and this model is on"),
        ("stable_diffusion", {"memory": {"offload": "sequential"}}, "needs CUDA"),
        ("flux", {"memory": {"attention_slicing": True}}, "attention_slicing is not something"),
        ("stable_diffusion", {"device": "cuda:7"}, "cuda:7 is not on this machine"),
    ],
)
def test_what_the_device_or_model_cannot_do_fails_the_load_with_the_reason(
    make_app, checkpoint, family, more, told
):
    client = make_app([entry(checkpoint, family, **more)]).test_client()
    answer = run(client, "text-to-image", "red")
    assert answer.status_code == 503
    assert told in answer.json["error"]["message"]
    assert told in client.get("/crane/models/text-to-image").json["error"]


def test_a_text_model_can_be_quantized_and_nothing_else(make_app, checkpoint):
    text = {"type": "text-generation", "hf_model": checkpoint("llama")}
    entries = [
        {"id": "small", **text, "memory": {"quantize": "int8"}},
        {"id": "sliced", **text, "memory": {"vae_tiling": True}},
        {"id": "compiled", **text, "compile": True},
    ]
    client = make_app(entries).test_client()
    answer = run(client, "small", "the river", options={"max_tokens": 4})
    assert answer.json["metadata"]["dtype"] == "float32 with int8 weights"
    for id_, asked in (("sliced", "memory.vae_tiling"), ("compiled", "compile")):
        answer = run(client, id_, "the river")
        assert f"asks for {asked}, which type text-generation" in answer.json["error"]["message"]
