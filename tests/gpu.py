"""What a test that needs CUDA is marked with; ``make test-gpu`` runs those."""

from __future__ import annotations

import os

import pytest


def on_the_test_device() -> bool:
    if os.environ.get("CRANE_TEST_DEVICE") != "cuda":
        return False
    import torch

    return torch.cuda.is_available()


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_the_test_device(), reason="needs CUDA and CRANE_TEST_DEVICE=cuda"),
]
