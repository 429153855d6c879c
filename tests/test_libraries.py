"""The model libraries: who looks at one that another thread is importing, and when they come."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend.engine import libraries
from tests.conftest import ECHO, MINILM
from tests.serving import ROOT, wait_for

# Each looks at torch, if it is there, in the thread of a model that may not need it.
LOOKS = {
    "an error": "faults.is_out_of_memory(RuntimeError('no'))",
    "a broken device": "faults.is_broken_device(RuntimeError('no'))",
    "memory that is released": "hub.release_memory([weakref.ref(adapter)])",
    "bytes that are counted": "footprint.count(adapter)",
    "tensors": "list(footprint.tensors(adapter))",
    "a team that ends": "turns.end_team()",
    "threads of a run": "runner.use_threads(1)",
}
LOOK = """
import os, sys, threading, weakref
from backend.adapters import footprint, hub
from backend.adapters.echo import Echo
from backend.engine import faults, turns
from backend.engine.runner import Runner
from backend.registry import ModelSpec

adapter = Echo(ModelSpec(id="echo", type="echo", options_schema=None))
adapter.load()
runner = Runner({"echo": adapter}, threads=(1, 1), make_room=None, out_of_memory=None)
half_imported = threading.Event()

def stop(event, args):
    if event == "import" and args[0] == "torch._C":
        half_imported.set()
        threading.Event().wait(60)

sys.addaudithook(stop)
threading.Thread(target=__import__, args=("torch",), daemon=True).start()
assert half_imported.wait(60) and "torch" in sys.modules
LOOK
os._exit(0)
"""


def test_a_library_is_seen_when_it_is_whole(tmp_path, monkeypatch):
    name = "a_library_that_takes_its_time"
    (tmp_path / f"{name}.py").write_text(
        "from tests.test_libraries import begun, go_on\nbegun.set()\nassert go_on.wait(20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    assert libraries.imported(name) is None
    thread = threading.Thread(target=libraries.load, args=([name],))
    thread.start()
    assert begun.wait(20)
    assert name in sys.modules
    assert libraries.imported(name) is None
    go_on.set()
    thread.join(20)
    assert libraries.imported(name) is sys.modules[name]


begun, go_on = threading.Event(), threading.Event()


@pytest.fixture
def held():
    """Another thread loads until the event is set."""
    gate, loads = threading.Event(), threading.Event()

    def load():
        with libraries.alone.hold("another"):
            loads.set()
            gate.wait(20)

    thread = threading.Thread(target=load)
    thread.start()
    assert loads.wait(20)
    yield gate
    gate.set()
    thread.join(20)


def test_libraries_are_not_imported_while_another_thread_loads(held, tmp_path, monkeypatch):
    (tmp_path / "a_small_library.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(libraries.load, ["a_small_library"])
        wait_for(lambda: libraries.alone._line)
        assert "a_small_library" not in sys.modules
        held.set()
        done.result(20)
    assert sys.modules.pop("a_small_library")


def test_whoever_is_not_wanted_any_more_waits_no_longer(held):
    def load():
        with libraries.alone.hold("a", lambda: False) as wanted:
            return wanted

    with ThreadPoolExecutor(1) as threads:
        try:
            assert threads.submit(load).result(10) is False
        finally:
            held.set()


def test_a_thread_that_loads_may_import_libraries():
    looks = iter([True])
    with (
        libraries.alone.hold("a"),
        libraries.alone.hold("the model libraries", lambda: next(looks, False)) as wanted,
    ):
        assert wanted
    assert libraries.alone.holder is None


@pytest.mark.parametrize("look", LOOKS)
def test_nobody_stumbles_over_torch_while_another_thread_imports_it(look):
    code = LOOK.replace("LOOK", LOOKS[look])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_calls_of_other_models_are_answered_while_a_first_model_loads(gunicorn):
    server = gunicorn([ECHO, MINILM])
    engine, over = server.engine(), threading.Event()
    statuses = set()

    def call():
        while not over.is_set():
            statuses.add(server.run()[0])

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    loaded = server.run("embedder", "a crane")
    over.set()
    for thread in threads:
        thread.join(20)
    assert (loaded[0], statuses) == (200, {200})
    assert server.engine().pid == engine.pid


@pytest.mark.parametrize("models", [[ECHO], [ECHO, MINILM]], ids=["none", "one"])
def test_an_engine_imports_the_libraries_at_its_start_where_a_model_needs_them(gunicorn, models):
    server = gunicorn(models)

    def has_torch():
        return any("libtorch" in one.path for one in server.engine().memory_maps())

    assert server.run("echo", 1)[0] == 200
    if models == [ECHO]:
        assert not has_torch()
    else:
        wait_for(has_torch, timeout_s=60)
    assert server.get("/crane/models/echo")[1]["state"] == "ready"


GROWTH = """
import os, sys, psutil
from backend.config import Config
from backend.engine.engine import Engine
from backend.registry import Registry

Engine(Config.from_env(), Registry([]))
import torch

layer = torch.nn.Linear(64, 256, dtype=torch.bfloat16)
with torch.inference_mode():
    layer(torch.ones(1, 64, dtype=torch.bfloat16))
    before = psutil.Process().memory_info().rss
    for rows in range(1, 801):
        layer(torch.ones(rows, 64, dtype=torch.bfloat16))
print(psutil.Process().memory_info().rss - before)
"""


def test_kernels_of_shapes_that_do_not_come_again_leave():
    """Each shape of a layer's inputs has one; an operator may have more of them kept."""

    def growth(**settings):
        env = os.environ | {"CRANE_QUOTA": "off"} | settings
        done = subprocess.run(
            [sys.executable, "-c", GROWTH], cwd=ROOT, env=env, capture_output=True, check=True
        )
        return int(done.stdout)

    kept = growth(**dict.fromkeys(libraries.KERNEL_CACHES, "1024"))
    if kept < 100_000_000:
        pytest.skip("this processor's kernels are small")
    assert growth() < 0.7 * kept
