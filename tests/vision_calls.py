"""What the tests of models that look at pictures share: their checkpoints, and callers at once."""

from __future__ import annotations

import pytest

from tests import vision_checkpoints, vision_text_checkpoints

BUILDERS = vision_checkpoints.BUILDERS | vision_text_checkpoints.BUILDERS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint("vit")`` is its folder, built when it is first asked for."""
    built: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in built:
            path = tmp_path_factory.mktemp("vision") / name
            BUILDERS[name](path)
            built[name] = str(path)
        return built[name]

    return folder
