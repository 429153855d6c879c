"""Meshes: vertices, faces and colours to bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.media import Media

# What is written: the option `format`, and its media type.
MESH_FORMATS = {"glb": "model/gltf-binary", "ply": "model/ply"}

# Models have z upwards, as PLY files do; glTF has y upwards.
_Z_UP_TO_Y_UP = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], float)


def encode_mesh(mesh: Mapping[str, Any], format_: str) -> Media:
    """Write ``{"vertices", "faces", "colors"}`` as ``glb`` or ``ply``.

    ``vertices`` are float ``(n, 3)`` with z upwards, ``faces`` the indices of three vertices each,
    ``colors`` red, green and blue from 0 to 1 for each vertex. A GLB turns them upright by its
    node, so that the vertices are the same in both kinds of file.
    """
    import trimesh

    colors = (np.asarray(mesh["colors"]).clip(0, 1) * 255).round().astype(np.uint8)
    made: Any = trimesh.Trimesh(
        vertices=mesh["vertices"],
        faces=mesh["faces"],
        vertex_colors=colors,
        process=False,  # which would merge and reorder what the model made
    )
    if format_ == "glb":
        scene: Any = trimesh.Scene()
        scene.add_geometry(made, transform=_Z_UP_TO_Y_UP)
        return Media(MESH_FORMATS["glb"], scene.export(file_type="glb"))
    return Media(MESH_FORMATS["ply"], made.export(file_type="ply"))
