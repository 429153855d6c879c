"""What the tests of models that look at pictures share: their checkpoints."""

from __future__ import annotations

import pytest

from tests import vision_checkpoints, vision_text_checkpoints
from tests.checkpoints import built_when_asked

BUILDERS = vision_checkpoints.BUILDERS | vision_text_checkpoints.BUILDERS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return built_when_asked(BUILDERS, tmp_path_factory.mktemp("vision"))
