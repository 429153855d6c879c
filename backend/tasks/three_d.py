"""Meshes out: a thing in three dimensions from a text."""

from __future__ import annotations

from backend.media.meshes import MESH_FORMATS, encode_mesh
from backend.schemas import Boolean, Choice, Integer, Number, Text
from backend.tasks.base import MAX_SEED, Options, Task, about


class MeshOptions(Options):
    """What is not set is as the model's own pipeline has it."""

    num_inference_steps = Integer(
        low=1, high=200, load_default=None, allow_none=True, metadata=about("denoising steps")
    )
    guidance_scale = Number(
        low=0.0,
        high=50.0,
        load_default=None,
        allow_none=True,
        metadata=about("how closely the prompt is followed"),
    )
    seed = Integer(
        low=0,
        high=MAX_SEED,
        load_default=None,
        allow_none=True,
        metadata=about("draws repeat with it; input i of a batch uses seed + i"),
    )
    format = Choice(
        list(MESH_FORMATS), load_default="glb", metadata=about("how the mesh is written")
    )
    truncate = Boolean(
        load_default=False,
        metadata=about("cut a prompt that is longer than the model reads, instead of refusing it"),
    )


TEXT_TO_3D = Task(
    name="text-to-3d",
    input=Text(),
    options=MeshOptions,
    output='the mesh with its colours, {"mime_type", "data"}',
    example=("A red armchair with four legs.", {"seed": 7}),
    formats=MESH_FORMATS,
    dump=lambda mesh, options: encode_mesh(mesh, options["format"]),
)
