"""Meshes: what a direct pipeline call gives on the same checkpoint, read by a mesh library.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import base64
import functools
import time
from io import BytesIO
from itertools import cycle, islice

import numpy as np
import pytest

from backend.media.meshes import encode_mesh
from tests import diffusers_checkpoints, three_d_checkpoints
from tests.checkpoints import sentence
from tests.conftest import run, together
from tests.gpu import GPU

DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
PROMPTS = [sentence(words, seed) for seed, words in enumerate((3, 1, 4, 2, 5, 2, 3, 1))]
STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="session")
def shape_checkpoint(tmp_path_factory):
    """``shape_checkpoint("shap_e")`` is its folder, built when it is first asked for."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("shapes") / name
        module = three_d_checkpoints if name.startswith("shap_e") else diffusers_checkpoints
        getattr(module, name)(path)
        return str(path)

    return folder


@pytest.fixture
def coarse(monkeypatch):
    """Surfaces on a grid of 24 x 24 x 24 instead of the renderer's 128, Crane's and direct ones."""
    from diffusers.pipelines.shap_e import ShapERenderer

    decode = functools.partialmethod(ShapERenderer.decode_to_mesh, grid_size=24)
    monkeypatch.setattr(ShapERenderer, "decode_to_mesh", decode)


@pytest.fixture
def direct(shape_checkpoint):
    """Call the pipeline directly: ``direct(prompt, seed=…, …)`` gives the renderer's mesh."""
    import diffusers
    import torch

    def call(prompt, *, seed, device="cpu", **options):
        pipeline = diffusers.ShapEPipeline.from_pretrained(shape_checkpoint("shap_e")).to(device)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipeline(prompt, generator=generator, output_type="mesh", **options).images[0]

    return call


def entry(shape_checkpoint, name="shap_e", **more):
    return {"id": "shapes", "type": "text-to-3d", "hf_model": shape_checkpoint(name), **more}


def opened(data, format_):
    """A file as a mesh library opens it: vertices, faces, and colours from 0 to 255."""
    import trimesh

    loaded = trimesh.load(BytesIO(data), file_type=format_, process=False)
    if format_ == "glb":
        [mesh] = loaded.geometry.values()
    else:
        mesh = loaded
    return np.asarray(mesh.vertices), np.asarray(mesh.faces), mesh.visual.vertex_colors[:, :3]


def data_of(output):
    return base64.b64decode(output["data"])


def assert_same(output, mesh, format_="glb", near=0.0):
    vertices, faces, colors = opened(data_of(output), format_)
    expected = mesh.verts.cpu().numpy()
    assert len(expected) > 500  # not the crumbs of a surface that failed
    assert vertices.shape == expected.shape
    assert np.abs(vertices - expected).max() <= near
    assert np.array_equal(faces, mesh.faces.cpu().numpy())
    channels = np.stack([mesh.vertex_channels[name].cpu().numpy() for name in "RGB"], axis=1)
    assert channels.std() > 0.1
    assert np.abs(colors - 255 * channels).max() <= 1


# Parity.


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("device", DEVICES)
def test_a_mesh_is_what_a_direct_call_makes(make_app, shape_checkpoint, direct, device):
    client = make_app([entry(shape_checkpoint)], devices=(device,)).test_client()
    options = {**STEPS, "guidance_scale": 6.0}
    answer = run(client, "shapes", "red tower", options={**options, "seed": 5})
    assert answer.status_code == 200, answer.json
    assert answer.json["output"]["mime_type"] == "model/gltf-binary"
    assert_same(answer.json["output"], direct("red tower", seed=5, device=device, **options))
    metadata = answer.json["metadata"]
    assert metadata["device"].startswith(device)
    assert metadata["usage"] == {"meshes": 1}
    assert metadata["seed"] == metadata["options"]["seed"] == 5


@pytest.mark.usefixtures("coarse")
def test_eight_callers_at_once_with_mixed_options_get_what_they_would_get_alone(
    make_app, shape_checkpoint, direct
):
    client = make_app([entry(shape_checkpoint, max_batch_size=8)]).test_client()
    kinds = [STEPS, {**STEPS, "guidance_scale": 2.0}, {"num_inference_steps": 5, "format": "ply"}]
    wanted = list(islice(cycle(kinds), 8))
    requests = [
        {"model_id": "shapes", "input": PROMPTS[i], "options": {**options, "seed": 100 + i}}
        for i, options in enumerate(wanted)
    ]
    for place, answer in enumerate(together(client, requests)):
        assert answer.status_code == 200, answer.json
        options = dict(wanted[place])
        format_ = options.pop("format", "glb")
        expected = direct(PROMPTS[place], seed=100 + place, **options)
        assert_same(answer.json["output"], expected, format_)


@pytest.mark.usefixtures("coarse")
def test_an_input_of_a_batch_is_made_from_its_own_seed_as_if_alone(
    make_app, shape_checkpoint, direct
):
    client = make_app([entry(shape_checkpoint)]).test_client()
    answer = run(client, "shapes", PROMPTS[:3], options={**STEPS, "seed": 2**32 - 2})
    assert answer.json["metadata"]["seed"] == [2**32 - 2, 2**32 - 1, 0]
    for output, prompt, seed in zip(
        answer.json["output"], PROMPTS, answer.json["metadata"]["seed"], strict=False
    ):
        assert_same(output, direct(prompt, seed=seed, **STEPS))


@pytest.mark.usefixtures("coarse")
def test_the_receipt_repeats_a_call_without_options(make_app, shape_checkpoint, direct):
    client = make_app([entry(shape_checkpoint)]).test_client()
    first = run(client, "shapes", "old river").json
    options = first["metadata"]["options"]
    assert options == {
        "num_inference_steps": 25,  # the pipeline's own
        "guidance_scale": 4.0,
        "seed": options["seed"],
        "format": "glb",
        "truncate": False,
    }
    again = run(client, "shapes", "old river", options=options).json
    assert again["output"] == first["output"]
    assert_same(first["output"], direct("old river", seed=options["seed"]))
    assert run(client, "shapes", "old river").json["output"] != first["output"]


# Formats.


@pytest.mark.usefixtures("coarse")
def test_glb_and_ply_are_the_same_mesh_and_each_stands_upright(make_app, shape_checkpoint):
    import trimesh

    client = make_app([entry(shape_checkpoint)]).test_client()
    meshes = {}
    for format_, mime_type in (("glb", "model/gltf-binary"), ("ply", "model/ply")):
        options = {**STEPS, "seed": 3, "format": format_}
        output = run(client, "shapes", "red tower", options=options).json["output"]
        assert output["mime_type"] == mime_type
        meshes[format_] = opened(data_of(output), format_)
        seen = trimesh.load(BytesIO(data_of(output)), file_type=format_, process=False)
        bounds = np.asarray(seen.bounds)
        x, y, z = meshes[format_][0].T
        up = {"ply": (x, y, z), "glb": (x, z, -y)}[format_]  # glTF has y upwards, the model z
        assert np.allclose(bounds, [[a.min() for a in up], [a.max() for a in up]], atol=1e-6)
    for one, other in zip(meshes["glb"], meshes["ply"], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("format_", ["glb", "ply"])
def test_corners_in_one_place_stay_as_many_as_the_model_made(format_):
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]] * 2, np.float32)
    faces = np.array([[0, 1, 2], [5, 4, 3]], np.uint32)
    grey = np.array([[0.2] * 3] * 5 + [[1.5, -0.5, 0.5]], np.float32)
    mesh = {"vertices": corners, "faces": faces, "colors": grey}
    vertices, read_faces, colors = opened(encode_mesh(mesh, format_).data, format_)
    assert np.array_equal(vertices, corners)
    assert np.array_equal(read_faces, faces)
    assert colors.tolist() == [[51] * 3] * 5 + [[255, 0, 128]]


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("accept", "magic"), [("model/gltf-binary", b"glTF"), ("model/ply", b"ply\n")]
)
def test_a_bare_mesh_is_a_file_by_itself(make_app, shape_checkpoint, accept, magic):
    client = make_app([entry(shape_checkpoint)]).test_client()
    body = {"model_id": "shapes", "input": "red", "options": {**STEPS, "seed": 1}}
    answer = client.post("/crane/run", json=body, headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.mimetype == accept
    assert answer.data.startswith(magic)


# Time.


def loaded(client):
    """Ask until the model is loaded, which may take longer than a call's time."""
    while run(client, "shapes", "river " * 100).json["error"]["code"] != "VALIDATION_ERROR":
        pass
    return client


def idle_within(client, seconds):
    deadline = time.monotonic() + seconds
    while client.get("/crane/models/shapes").json["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("coarse")
def test_a_call_that_nobody_waits_for_stops_at_the_next_step(
    make_app, shape_checkpoint, monkeypatch, capsys
):
    from diffusers import PriorTransformer

    client = loaded(make_app([entry(shape_checkpoint)], request_timeout_s=1.0).test_client())
    calls, forward = [], PriorTransformer.forward

    def slow(self, *args, **kwargs):
        calls.append(client.get("/crane/models/shapes").json["running"])
        time.sleep(0.1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PriorTransformer, "forward", slow)
    answer = run(client, "shapes", ["red", "old"], options={"num_inference_steps": 50})
    done = len(calls)
    assert answer.status_code == 504
    idle_within(client, 5)
    assert 2 <= done <= len(calls) <= done + 1
    # Heun's method looks twice at each step but one.
    assert calls[1] == {"inputs": 2, "step": 1, "steps": 2 * 99}
    assert "failed a batch" not in capsys.readouterr().err


def test_a_surface_that_nobody_waits_for_is_not_drawn_to_its_end(
    make_app, shape_checkpoint, monkeypatch
):
    from diffusers.pipelines.shap_e.renderer import MeshDecoder

    client = loaded(make_app([entry(shape_checkpoint)], request_timeout_s=0.5).test_client())
    drawn, forward = [], MeshDecoder.forward

    def noted(self, *args):
        drawn.append(args)
        return forward(self, *args)

    monkeypatch.setattr(MeshDecoder, "forward", noted)
    answer = run(client, "shapes", "red", options={"num_inference_steps": 1})
    assert answer.status_code == 504
    idle_within(client, 5)
    assert drawn == []  # querying the grid's two million points takes longer than the call has


@pytest.mark.usefixtures("coarse")
def test_a_neighbour_who_leaves_changes_nothing_for_who_stays(make_app, shape_checkpoint, direct):
    from backend.adapters.base import Batch
    from backend.adapters.three_d import MeshMaker

    app = make_app([entry(shape_checkpoint)], devices=("cpu",))
    spec = app.extensions["crane"].registry.get("shapes")
    adapter = MeshMaker(spec, device="cpu", dtype="float32")
    adapter.load()
    left = []

    def progress(done, *_):
        left.append(done)

    options = {**spec.options_schema.load({}), "num_inference_steps": 3}
    batch = Batch(
        inputs=["red", "old river"],
        options=options,
        seeds=[1, 2],
        cancelled=lambda place: place == 0 and len(left) > 1,
        progress=progress,
    )
    gone, stayed = adapter.predict(batch)
    assert type(gone).__name__ == "DeadlineExceeded"
    expected = direct("old river", seed=2, num_inference_steps=3)
    assert np.array_equal(stayed.output["vertices"], expected.verts.numpy())
    assert left == [1, 2, *range(6, 11)]  # of twice five
    adapter.unload()


# What is refused.


@pytest.mark.usefixtures("coarse")
def test_a_prompt_past_the_models_window_is_cut_where_that_is_asked_for(
    make_app, shape_checkpoint, direct
):
    client = make_app([entry(shape_checkpoint)]).test_client()
    prompt = "river " * 40
    refused = run(client, "shapes", prompt)
    assert refused.status_code == 400
    assert "the model reads 77" in refused.json["error"]["details"]["input"]
    options = {**STEPS, "truncate": True, "seed": 3}
    answer = run(client, "shapes", prompt, options=options).json
    assert answer["metadata"]["truncated"] is True
    assert_same(answer["output"], direct(prompt, seed=3, **STEPS))
    assert "truncated" not in run(client, "shapes", "red", options=options).json["metadata"]


@pytest.mark.usefixtures("coarse")
def test_a_mesh_without_a_surface_is_refused_and_its_neighbours_are_not(
    make_app, shape_checkpoint, monkeypatch, capsys
):
    client = make_app([entry(shape_checkpoint, "shap_e_empty")]).test_client()
    refused = run(client, "shapes", ["red", "old"], options=STEPS)
    assert refused.status_code == 400
    assert "a mesh without a surface" in refused.json["error"]["message"]
    assert "failed a batch" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "options", "path", "told"),
    [
        (" ", {}, "input", "must not be empty"),
        ({"prompt": "red"}, {}, "input", "must be a string, not an object"),
        ("red", {"format": "obj"}, "options.format", "glb, ply"),
        ("red", {"num_inference_steps": 0}, "options.num_inference_steps", "at least 1"),
        ("red", {"num_inference_steps": 201}, "options.num_inference_steps", "at most 200"),
        ("red", {"guidance_scale": -1}, "options.guidance_scale", "at least 0"),
        ("red", {"negative_prompt": "old"}, "options.negative_prompt", "is not known here"),
        ("red", {"frame_size": 64}, "options.frame_size", "is not known here"),
        ("red", {"seed": -1}, "options.seed", "at least 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    make_app, shape_checkpoint, value, options, path, told
):
    client = make_app([entry(shape_checkpoint)]).test_client()
    answer = run(client, "shapes", value, options=options)
    assert answer.status_code == 400
    assert told in answer.json["error"]["details"][path]


def test_a_checkpoint_that_makes_no_meshes_is_told(make_app, shape_checkpoint):
    client = make_app([entry(shape_checkpoint, "stable_diffusion")]).test_client()
    answer = run(client, "shapes", "red")
    assert answer.status_code == 503
    assert "Its checkpoint has no pipeline for text-to-3d." in answer.json["error"]["message"]
