"""Meshes out: a thing in three dimensions from a text."""

from __future__ import annotations

from backend.media.meshes import MESH_FORMATS, encode_mesh
from backend.schemas import Choice, Text
from backend.tasks.base import Options, Task, about
from backend.tasks.diffusion import cut_prompt, denoising_steps, first_seed, guidance


class MeshOptions(Options):
    """What is not set is as the model's own pipeline has it."""

    num_inference_steps = denoising_steps()
    guidance_scale = guidance()
    seed = first_seed("input i of a batch")
    format = Choice(
        list(MESH_FORMATS), load_default="glb", metadata=about("how the mesh is written")
    )
    truncate = cut_prompt()


TEXT_TO_3D = Task(
    name="text-to-3d",
    input=Text(),
    options=MeshOptions,
    output='the mesh with its colours, {"mime_type", "data"}',
    example=("A red armchair with four legs.", {"seed": 7}),
    formats=MESH_FORMATS,
    dump=lambda mesh, options, check: encode_mesh(mesh, options["format"]),
)
