"""Which devices an engine has, and which engines a model may live on."""

from __future__ import annotations

import pynvml
import pytest

from backend.adapters import footprint
from backend.config import Config
from backend.engine import devices
from backend.engine.devices import Devices
from backend.engine.placement import homes
from backend.errors import ModelUnavailable
from backend.registry import Registry
from tests.checkpoints import checkpoint
from tests.conftest import ECHO, write_models

__all__ = ["checkpoint"]

FOUR = ("cuda:0", "cuda:1", "cuda:2+cuda:3", "cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, as NVIDIA's library would tell, or without its driver."""

    def of(gpus, torch="2.13.0"):
        def init():
            if gpus is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

        monkeypatch.setattr(pynvml, "nvmlInit", init)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: gpus)
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
        monkeypatch.setattr(devices, "version", lambda name: torch)

    return of


@pytest.mark.parametrize(
    ("gpus", "engines"),
    [
        (None, ("auto",)),
        (0, ("auto",)),
        (1, ("auto",)),
        (3, ("cuda:0", "cuda:1", "cuda:2")),
    ],
)
def test_there_is_an_engine_for_each_gpu(machine, monkeypatch, gpus, engines):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(gpus)
    assert devices.found(("auto",)) == engines
    assert devices.found(("cpu", "cpu")) == ("cpu", "cpu")


def test_a_torch_that_knows_no_gpu_gets_none(machine):
    machine(4, torch="2.13.0+cpu")
    assert devices.gpus({}) == 0


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("0", 1), ("1, 0", 2), ("-1", 0), ("0,9,1", 1), ("GPU-1a2b,GPU-3c4d,MIG-5e", 3)],
)
def test_gpus_that_are_hidden_do_not_count(machine, visible, count):
    machine(4)
    assert devices.gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize(
    ("index", "before", "after"),
    [
        (0, None, "0"),
        (1, None, "1"),
        (2, None, "2,3"),
        (1, "5,7,GPU-1a,9", "7"),
        (2, "5,7,GPU-1a,9", "GPU-1a,9"),
        (2, "5", ""),
        (3, None, None),
        (3, "1", "1"),
    ],
)
def test_an_engine_sees_no_gpu_but_its_own(index, before, after):
    environ = {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
    Devices(FOUR, index).keep_to(environ)
    assert environ.get("CUDA_VISIBLE_DEVICES") == after


def test_a_device_has_its_own_name_outside_and_cudas_inside():
    second = Devices(FOUR, 1)
    assert second.local("auto") == second.local("cuda") == second.local("cuda:1") == "cuda:0"
    assert (second.local("cpu"), second.shown("cpu")) == ("cpu", "cpu")
    assert (second.shown("cuda:0"), second.shown("cuda")) == ("cuda:1", "cuda:1")
    two = Devices(FOUR, 2)
    assert [two.local(name) for name in ("auto", "cuda:2", "cuda:3")] == ["cuda:0"] * 2 + ["cuda:1"]
    assert two.shown("cuda:1") == "cuda:3"
    for other in ("cuda:0", "cuda:3"):
        with pytest.raises(ModelUnavailable, match=f"{other} is not among CRANE_DEVICES, cuda:0,"):
            second.local(other)
    only = Devices(("auto",))
    assert [only.local(name) for name in ("auto", "cuda:1", "mps")] == ["auto", "cuda:1", "mps"]
    assert only.shown("cuda:0") == "cuda:0"


def test_engines_share_main_memory_and_the_gpus_that_several_have():
    assert Devices(FOUR, 0).sharers("cpu") == 4
    assert Devices(FOUR, 1).sharers("cuda:1") == 1
    twice = ("cuda:0", "cuda:0", "cuda:0+cuda:1")
    assert [Devices(twice, i).sharers(name) for i, name in enumerate(twice)] == [3, 3, 3]
    both = Devices(FOUR, 2)
    assert both.memory("cuda:1") == "cuda:2+cuda:3"
    assert both.parts("cuda:2+cuda:3") == ["cuda:0", "cuda:1"]
    assert (both.memory("cpu"), both.parts("cpu")) == ("cpu", ["cpu"])


def registry(tmp_path, *entries):
    named = [ECHO | {"id": f"m{place}"} | entry for place, entry in enumerate(entries)]
    return Registry.load(write_models(tmp_path, named))


@pytest.mark.parametrize(
    ("entry", "engines"),
    [
        ({}, [0, 1, 2, 3]),
        ({"device": "cpu"}, [0, 1, 2, 3]),
        ({"device": "cuda"}, [0, 1, 2]),
        ({"device": "cuda:1"}, [1]),
        ({"device": "cuda:3"}, [2]),
        ({"device": "cuda:7"}, [0, 1, 2, 3]),  # each of which says that it is not there
        ({"load": {"device_map": "auto"}}, [2]),
        ({"load": {"device_map": "auto"}, "device": "cuda:0"}, [0]),
    ],
)
def test_a_model_may_live_where_its_device_is(tmp_path, entry, engines):
    [spec] = known = registry(tmp_path, entry)
    assert homes(spec, known, FOUR) == engines


def test_pinned_models_are_dealt_out_in_turns(tmp_path):
    pinned = {"pinned": True}
    two, nine = pinned | {"replicas": 2}, pinned | {"replicas": 9}
    known = registry(tmp_path, pinned, {}, two, pinned, nine)
    dealt = [homes(spec, known, ("cpu", "cpu", "cpu")) for spec in known]
    assert dealt == [[0], [0, 1, 2], [1, 2], [0], [1, 2, 0]]


def test_threads_and_memory_are_divided_among_engines(monkeypatch):
    monkeypatch.setattr("backend.config.cores", lambda: 16)
    assert Config(workers=2).engine_threads == (16, 14)
    settings = {"engine": "process", "engine_socket": "/run/x"}
    assert Config(workers=2, devices=("cpu",) * 4, **settings).engine_threads == (4, 3)
    assert Config(workers=2, devices=("cpu",) * 32, **settings).engine_threads == (1, 1)
    assert footprint.spare(1000) == 900


def test_engines_in_the_http_process_are_one():
    with pytest.raises(ValueError, match="CRANE_ENGINE=inline is one engine in each HTTP process"):
        Config(devices=("cpu", "cpu"))


def test_a_device_map_changes_where_a_model_is_and_not_what_it_says(make_app, checkpoint):
    entry = {"id": "plain", "type": "text-generation", "hf_model": checkpoint("llama")}
    placed = entry | {"id": "placed", "load": {"device_map": "auto"}}
    client = make_app([entry, placed], devices=("cpu",)).test_client()
    body = {"input": "the river", "options": {"max_tokens": 8}}
    answers = [
        client.post("/crane/run", json=body | {"model_id": name}).json
        for name in ("plain", "placed")
    ]
    assert answers[0]["output"] == answers[1]["output"]
    assert answers[1]["metadata"]["device"] == "cpu"
