"""Memory of a GPU: it comes back, it may be too little, and two engines may share it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pynvml
import pytest

from tests.checkpoints import large_llama, sentence
from tests.gpu import GPU

pytestmark = [*GPU]

MB = 10**6
WRITE = {"model_id": "m", "input": "the river", "options": {"max_tokens": 8}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Llama of some 270 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("weights")
    large_llama(folder, 32)
    return {"id": "m", "type": "text-generation", "hf_model": str(folder), "dtype": "bfloat16"}


@pytest.fixture
def used():
    """The bytes in use on the first GPU, by whomever."""
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    yield lambda: int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)
    pynvml.nvmlShutdown()


def order(server, what):
    assert server.request("POST", f"/crane/models/m/{what}")[0] == 200


def test_memory_comes_back_when_a_model_leaves(gunicorn, weights, used):
    server = gunicorn([weights], CRANE_DEVICES="cuda:0")
    order(server, "load")  # CUDA's own share stays from here on
    order(server, "unload")
    empty = used()
    for _ in range(5):
        order(server, "load")
        assert server.post(WRITE)[0] == 200
        held = server.get("/crane/models/m")[1]["memory_bytes"]
        assert held > 200 * MB
        assert used() - empty > 0.8 * held
        order(server, "unload")
        assert abs(used() - empty) < 200 * MB


@contextmanager
def all_but(left: int) -> Iterator[None]:
    """Take a GPU's memory, but for so many bytes."""
    import torch

    block = torch.empty(torch.cuda.mem_get_info(0)[0] - left, dtype=torch.uint8, device="cuda:0")
    try:
        yield
    finally:
        del block
        torch.cuda.empty_cache()


def test_too_little_memory_is_told_and_survived(gunicorn, weights):
    server = gunicorn([weights], CRANE_DEVICES="cuda:0")
    assert server.post(WRITE)[0] == 200
    # What it keeps of each token has 65 kB: 300 MB for a whole batch.
    long = WRITE | {"input": [sentence(100)] * 32, "options": {"max_tokens": 32}}
    with all_but(100 * MB):
        status, answer = server.post(long)
        assert status == 200 or (status, answer["error"]["code"]) == (503, "OUT_OF_MEMORY")
        assert server.log_lines(message="m ran out of memory with a batch of 32")
        assert server.post(WRITE)[0] == 200
    assert server.post(long)[0] == 200
    assert server.get("/readyz")[0] == 200
    assert len(server.log_lines(message="m loaded")) == 1


def test_two_engines_share_one_gpu(gunicorn, weights):
    entry = weights | {"replicas": 2}
    server = gunicorn([entry], CRANE_DEVICES="cuda:0,cuda:0", CRANE_WORKERS=2)
    deadline = time.monotonic() + 30
    while not all("pid" in engine for engine in server.get("/readyz")[1]["engines"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    order(server, "load")
    copies = server.get("/crane/models/m")[1]["copies"]
    assert [copy["state"] for copy in copies] == ["ready"] * 2
    assert {copy["device"] for copy in copies} == {"cuda:0"}
    first, second = (engine["memory"] for engine in server.get("/readyz")[1]["engines"])
    pynvml.nvmlInit()
    total = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).total
    assert sum(one["cuda:0"]["budget_bytes"] for one in (first, second)) < total
    outputs = {server.post(WRITE)[1]["output"] for _ in range(8)}
    assert len(outputs) == 1


def test_a_device_map_places_a_model_on_the_engines_gpus(gunicorn, weights):
    plain = gunicorn([weights], CRANE_DEVICES="cuda:0").post(WRITE)[1]
    entry = weights | {"load": {"device_map": "auto"}}
    placed = gunicorn([entry], CRANE_DEVICES="cuda:0").post(WRITE)[1]
    assert placed["output"] == plain["output"]
    assert placed["metadata"]["device"] == "cuda:0"
