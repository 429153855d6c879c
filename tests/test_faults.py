"""Too little memory, broken devices, hanging loads: each by an adapter that fails that way."""

from __future__ import annotations

import errno
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from backend.adapters.echo import Echo
from backend.engine import faults
from tests.conftest import ECHO, order, run, together
from tests.serving import ROOT, wait_for
from tests.test_residency import MB, Sized, events, held_bytes, sized, state, unloads

__all__ = ["events", "sized"]


def caused(error, cause):
    """An error that a library raises from another one."""
    error.__cause__ = cause
    return error


def device_is_full():
    """As CUDA says it."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def host_is_full():
    torch.empty(10**15)


def array_is_too_large():
    np.empty(10**15)


FULL = [device_is_full, host_is_full, array_is_too_large]


@pytest.fixture
def batches():
    return []


@pytest.fixture
def narrow(add_task, batches):
    """The entry of a model that has room for so many inputs at once: ``narrow(2)``."""

    def entry(most, fail=device_is_full, **more):
        class Narrow(Echo):
            def predict(self, batch):
                batches.append(len(batch))
                if len(batch) > most:
                    fail()
                return super().predict(batch)

        return add_task("narrow", Narrow) | more

    return entry


def requests(count, model_id="narrow"):
    return [{"model_id": model_id, "input": number} for number in range(count)]


@pytest.mark.parametrize("fail", FULL)
def test_a_batch_that_is_too_much_is_run_by_halves(make_app, narrow, batches, fail):
    client = make_app([narrow(3, fail)]).test_client()
    answer = run(client, "narrow", list(range(10)))
    assert answer.json["output"] == list(range(10))
    assert batches == [10, 5, 2, 3, 5, 2, 3]
    assert answer.json["metadata"]["batch_size"] == 10
    batches.clear()
    assert run(client, "narrow", list(range(7))).status_code == 200
    assert batches == [3, 3, 1]  # which it knows by now


def test_other_callers_notice_nothing(make_app, narrow, batches):
    client = make_app([narrow(2)]).test_client()
    answers = together(client, requests(12))
    assert [answer.json["output"] for answer in answers] == list(range(12))


def test_what_is_too_much_alone_is_a_503_and_the_model_goes_on(make_app, add_task, batches):
    class Picky(Echo):
        def predict(self, batch):
            batches.append(len(batch))
            if "huge" in batch.inputs:
                device_is_full()
            return super().predict(batch)

    client = make_app([add_task("picky", Picky)]).test_client()
    refused = run(client, "picky", "huge")
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "OUT_OF_MEMORY")
    assert "picky ran out of memory on cpu" in refused.json["error"]["message"]
    assert int(refused.headers["Retry-After"]) >= 1
    assert batches == [1, 1]
    assert run(client, "picky").status_code == 200
    assert state(client, "picky") == "ready"


def test_models_that_nobody_uses_leave_before_it_is_tried_again(
    make_app, sized, add_task, events, monkeypatch
):
    monkeypatch.setattr("backend.engine.worker.UNUSED_S", 0.0)

    class NeedsTheOthersRoom(Sized):
        weights, guess = MB, None

        def predict(self, batch):
            if sorted(unloads(type(self).events)) != ["a", "b"]:
                device_is_full()
            return super().predict(batch)

    NeedsTheOthersRoom.events = events
    entries = [sized("a"), sized("b"), sized("kept", pinned=True)]
    client = make_app([*entries, add_task("needy", NeedsTheOthersRoom)]).test_client()
    for name in ("a", "b", "kept"):
        assert run(client, name).status_code == 200
    assert run(client, "needy").status_code == 200
    assert state(client, "kept") == "ready"


def test_what_is_too_much_alone_costs_no_one_else_a_model(make_app, sized, add_task, events):
    class Huge(Echo):
        def predict(self, batch):
            device_is_full()

    client = make_app([sized("a"), add_task("huge", Huge)]).test_client()
    assert run(client, "a").status_code == 200
    assert run(client, "huge", [1, 2, 3]).json["error"]["code"] == "OUT_OF_MEMORY"
    assert state(client, "a") == "ready"
    assert unloads(events) == []


def test_a_load_that_runs_out_of_memory_is_tried_once_more(make_app, sized, add_task, events):
    class NeedsTheOthersRoom(Sized):
        weights, guess = MB, None
        tries = 0

        def load(self):
            type(self).tries += 1
            if self.tries == 1 or "never" in self.spec.id:
                device_is_full()
            super().load()

    NeedsTheOthersRoom.events = events
    never = type("Never", (NeedsTheOthersRoom,), {"tries": 0})
    entries = [sized("a"), add_task("needy", NeedsTheOthersRoom), add_task("never", never)]
    client = make_app(entries).test_client()
    assert run(client, "a").status_code == 200
    assert run(client, "needy").status_code == 200
    assert events == [("load", "a"), ("unload", "a"), ("load", "needy")]
    refused = run(client, "never")
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "OUT_OF_MEMORY")
    assert never.tries == 2
    assert state(client, "never") == "unloaded"
    assert held_bytes(client) == 0


def test_nothing_of_a_failed_batch_is_kept(make_app, add_task):
    kept = []

    class KeepsNothing(Echo):
        def predict(self, batch):
            block = torch.zeros(10)
            kept.append(weakref.ref(block))
            if len(kept) == 1:
                try:
                    raise ValueError("within another error")
                except ValueError:
                    device_is_full()
            gc.collect()
            assert kept[0]() is None
            return super().predict(batch)

    client = make_app([add_task("clean", KeepsNothing)]).test_client()
    assert run(client, "clean").status_code == 200


@pytest.mark.parametrize("knotted", [False, True])
def test_all_garbage_is_looked_for_only_where_weights_are_left(
    make_app, add_task, monkeypatch, knotted
):
    kept, looks = [], []

    class Knotted(Echo):
        def load(self):
            self.model = torch.nn.Linear(2, 2)
            self.model.itself = [self.model] if knotted else []
            kept.extend(weakref.ref(one) for one in self.model.parameters())

        def unload(self):
            del self.model

    client = make_app([add_task("knotted", Knotted)]).test_client()
    assert run(client, "knotted").status_code == 200
    real = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: looks.append(real()))
    assert order(client, "knotted", "unload").status_code == 200
    wait_for(lambda: held_bytes(client) == 0)
    assert [one() for one in kept] == [None, None]
    assert bool(looks) == knotted


CUDA_CALL = "when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("error", "full", "broken"),
    [
        (MemoryError(), True, False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True, False),
        (torch.OutOfMemoryError("CUDA out of memory."), True, False),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True, False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), True, False),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), True, False),
        (RuntimeError("std::bad_alloc"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA driver error: out of memory"), True, False),
        (RuntimeError("HIP error: out of memory"), True, False),
        (RuntimeError(f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED {CUDA_CALL}"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, False),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
            True,
            False,
        ),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), True, False),
        (RuntimeError("CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES"), True, False),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True, False),
        (RuntimeError("CURAND_STATUS_ALLOCATION_FAILED"), True, False),
        (RuntimeError("NCCL Error 1: Failed to CUDA calloc 6291456 bytes"), True, False),
        (caused(ValueError("the weights"), torch.OutOfMemoryError("CUDA")), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), False, True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False, True),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("HIP error: unspecified launch failure"), False, True),
        (RuntimeError(f"CUDA error: CUBLAS_STATUS_EXECUTION_FAILED {CUDA_CALL}"), False, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False, True),
        (caused(ValueError("a step"), RuntimeError("CUDA error: misaligned address")), False, True),
        (torch.AcceleratorError("CUDA error: invalid configuration argument"), False, False),
        (torch.AcceleratorError("CUDA error: no kernel image is available"), False, False),
        (torch.AcceleratorError("CUDA error: invalid device ordinal"), False, False),
        (RuntimeError(f"CUDA error: CUBLAS_STATUS_INVALID_VALUE {CUDA_CALL}"), False, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False, False),
        (RuntimeError("The size of tensor a must match: not a CUDA error: at all"), False, False),
        (ValueError("CUDA error: in a text"), False, False),
        (ValueError("a text about running out of memory"), False, False),
    ],
)
def test_errors_are_told_apart(error, full, broken):
    assert faults.is_out_of_memory(error) is full
    assert faults.is_broken_device(error) is broken


@pytest.mark.parametrize("works", [True, False])
def test_a_device_that_is_there_is_asked_whether_it_still_works(monkeypatch, works):
    def synchronize(device):
        if not works:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED")
    assert faults.is_broken_device(error) is not works


class Breaks(Echo):
    """Loses its device at its second call, as after an illegal access."""

    calls = 0

    def predict(self, batch):
        type(self).calls += 1
        if "break" in batch.inputs:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().predict(batch)


def test_a_model_whose_device_broke_is_defunct_and_is_not_tried_again(make_app, add_task):
    client = make_app([add_task("breaks", type("Own", (Breaks,), {}))]).test_client()
    answer = run(client, "breaks", ["fine", "break"])
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    assert state(client, "breaks") == "defunct"
    ready = client.get("/readyz")
    assert ready.status_code == 503
    [reason] = ready.json["reasons"]
    assert reason.startswith("breaks stopped working. The model's device failed")


def test_what_a_dead_model_held_is_given_back(make_app, sized, add_task, events):
    class Dies(Sized):
        weights, guess = MB, None

        def predict(self, batch):
            raise SystemExit

    Dies.events = events
    client = make_app([add_task("dies", Dies), sized("a")], memory_budget=MB).test_client()
    assert run(client, "dies").status_code == 503
    assert run(client, "a").status_code == 200


PLUGIN = """
import sys
from dataclasses import replace
from backend.adapters import ADAPTERS
from backend.adapters.echo import Echo
from backend.tasks import TASKS

class Breaks(Echo):
    def predict(self, batch):
        if "break" in batch.inputs:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().predict(batch)

class Hangs(Echo):
    def load(self):
        import time
        time.sleep(1000)

class Stays(Echo):
    def predict(self, batch):
        import time
        if "hang" in batch.inputs:
            time.sleep(1000)
        return super().predict(batch)

for name, adapter in {"breaks": Breaks, "hangs": Hangs, "stays": Stays}.items():
    TASKS[name] = replace(TASKS["echo"], name=name)
    ADAPTERS[name] = adapter
"""
# Only for the engine, and only where a device breaks: it takes seconds.
TORCH = """
if "backend.engine.server" in sys.orig_argv:
    import torch
"""


def test_an_engine_whose_device_broke_is_replaced_while_http_stays_up(gunicorn, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PLUGIN + TORCH)
    entries = [ECHO, {"id": "b", "type": "breaks"}]
    server = gunicorn(entries, PYTHONPATH=f"{ROOT}:{tmp_path}", CRANE_WORKERS=2)
    engine, workers = server.engine().pid, {one.pid for one in server.http_workers()}
    with ThreadPoolExecutor(3) as threads:
        others = [
            threads.submit(server.run, "echo", number, options={"delay_ms": 20_000})
            for number in range(2)
        ]
        wait_for(lambda: server.under_way("echo") == 2)
        for status, answer in (server.run("b", "break"), *(other.result() for other in others)):
            assert (status, answer["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    assert_replaced(server, engine, workers, "b")


@pytest.mark.parametrize(
    ("model_id", "settings", "told"),
    [
        ("h", {"CRANE_LOAD_TIMEOUT": "1s"}, (503, "MODEL_UNAVAILABLE")),
        (
            "s",
            {"CRANE_HANG_TIMEOUT": "300ms", "CRANE_REQUEST_TIMEOUT": "1500ms"},
            (504, "TIMEOUT_ERROR"),
        ),
    ],
)
def test_an_engine_with_a_model_that_hangs_is_replaced_when_other_calls_are_done(
    gunicorn, tmp_path, model_id, settings, told
):
    (tmp_path / "sitecustomize.py").write_text(PLUGIN)
    entries = [ECHO, {"id": "h", "type": "hangs"}, {"id": "s", "type": "stays"}]
    server = gunicorn(entries, PYTHONPATH=f"{ROOT}:{tmp_path}", CRANE_WORKERS=2, **settings)
    engine, workers = server.engine().pid, {one.pid for one in server.http_workers()}
    with ThreadPoolExecutor(2) as threads:
        hanging = threads.submit(server.run, model_id, "hang")
        time.sleep(0.8)  # so that it is under way as the model is given up, and in time still
        status, answer = server.run("echo", "other", options={"delay_ms": 1400})
        assert (status, answer.get("output")) == (200, "other")
        status, answer = hanging.result()
        assert (status, answer["error"]["code"]) == told
    if model_id == "s":
        assert_replaced(server, engine, workers, "s")
    else:
        wait_for(lambda: server.run("echo")[0] == 200)
        assert server.engine().pid != engine
    [line] = server.log_lines(level="ERROR", logger="crane.engine")
    assert "Its thread is here" in line["message"]
    assert "time.sleep(1000)" in line["message"]
    metrics = server.request("GET", "/metrics")[2].decode()
    assert f'crane_defunct_total{{cause="hangs",model="{model_id}"}} 1.0' in metrics


def assert_replaced(server, engine, workers, model_id):
    wait_for(lambda: server.run("echo")[0] == 200)
    wait_for(lambda: server.get("/readyz")[0] == 200)
    assert server.run(model_id, "fine")[0] == 200
    assert server.engine().pid != engine
    assert {one.pid for one in server.http_workers()} == workers
    [line] = server.log_lines(logger="crane.supervisor")
    assert line["exit_code"] == 70


@pytest.mark.parametrize("late", ["loads", "fails"])
def test_a_load_that_hangs_is_given_up(make_app, add_task, events, late):
    gate = threading.Event()

    class Hangs(Sized):
        weights, guess = MB, None

        def load(self):
            assert gate.wait(20)
            if late == "fails":
                raise RuntimeError("late, and in vain")
            super().load()

    Hangs.events = events
    client = make_app(
        [add_task("hangs", Hangs)], load_timeout_s=0.3, hang_timeout_s=0.4
    ).test_client()
    started = time.monotonic()
    answer = run(client, "hangs")
    assert 0.2 < time.monotonic() - started < 5
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    assert "hangs did not load in 0.3 s." in answer.json["error"]["message"]
    assert state(client, "hangs") == "defunct"
    gate.set()
    wait_for(lambda: held_bytes(client) == 0)  # what it loaded late is let go
    assert [what for what, _ in events] == (["load", "unload"] if late == "loads" else [])
