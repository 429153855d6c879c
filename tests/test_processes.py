"""Crane under real gunicorn: several HTTP workers, one engine, and what happens when one dies."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from backend import cores
from backend.config import Config
from backend.engine import file_lock, wire
from backend.engine.calls import Call
from backend.engine.remote import RemoteEngine
from backend.errors import ModelUnavailable
from backend.media import audio, images, video
from tests.conftest import ECHO, MINILM
from tests.pictures import base64_of, picture
from tests.serving import ROOT, wait_for, wait_for_end

CORES = cores.allowed()

GATED = """
import os
import time
from dataclasses import replace
from pathlib import Path
from backend.adapters import ADAPTERS
from backend.adapters.echo import Echo
from backend.tasks import TASKS

class Gated(Echo):
    def predict(self, batch):
        while not Path(os.environ["GATE"]).exists() and not batch.abandoned():
            time.sleep(0.01)
        return super().predict(batch)

TASKS["gated"] = replace(TASKS["echo"], name="gated")
ADAPTERS["gated"] = Gated
"""


@pytest.fixture
def gate(tmp_path):
    """The file that lets the calls of the model ``gated`` end, where ``with_gate`` has that."""
    return tmp_path / "gate"


@pytest.fixture
def with_gate(gunicorn, gate, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(GATED)
    settings = {"GATE": gate, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return lambda **more: gunicorn([ECHO, {"id": "gated", "type": "gated"}], **settings, **more)


def in_flight(server, count=1, model_id="gated", **body):
    """Start ``count`` calls in threads and return their futures once the engine has them."""
    threads = ThreadPoolExecutor(count)
    calls = [threads.submit(server.run, model_id, **body) for _ in range(count)]
    threads.shutdown(wait=False)
    wait_for(lambda: server.under_way(model_id) == count, 20)
    return calls


def refuses_connections(server):
    try:
        server.get("/livez")
    except ConnectionRefusedError:
        return True
    except (ConnectionResetError, http.client.RemoteDisconnected):
        pass  # it was in the kernel's hands when the listener closed
    return False


@pytest.mark.parametrize("workers", [1, 3])
def test_100_calls_at_once_are_all_answered_by_one_copy_of_the_model(gunicorn, workers):
    server = gunicorn([MINILM], CRANE_WORKERS=workers)
    gate = threading.Barrier(100)

    def call(index):
        gate.wait(30)
        return server.run("embedder", f"text number {index}")

    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(call, range(100)))
    assert {status for status, _ in answers} == {200}
    assert {len(body["output"]) for _, body in answers} == {384}
    assert len({tuple(body["output"]) for _, body in answers}) == 100
    assert max(body["metadata"]["batch_size"] for _, body in answers) > 1
    assert len(server.http_workers()) == workers
    assert len(server.processes("backend.engine.server")) == 1
    assert len(server.log_lines(message="embedder loaded")) == 1
    assert all(worker.memory_info().rss < 80e6 for worker in server.http_workers())


def test_sigterm_finishes_what_is_in_flight_and_refuses_what_is_new(with_gate, gate):
    server = with_gate(CRANE_WORKERS=2)
    calls = in_flight(server, 4, input="in flight")
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: refuses_connections(server))
    assert not any(call.done() for call in calls)
    gate.touch()
    assert [call.result()[1]["output"] for call in calls] == ["in flight"] * 4
    assert server.process.wait(15) == 0


def test_a_sigterm_to_every_process_still_finishes_what_is_in_flight(with_gate, gate):
    server = with_gate()
    [call] = in_flight(server, input="in flight")
    for process in server.processes():  # as a service manager ends a whole unit
        process.send_signal(signal.SIGTERM)
    wait_for(lambda: refuses_connections(server))
    gate.touch()
    assert call.result(10)[1]["output"] == "in flight"
    assert server.process.wait(15) == 0


ENDED_AT_ONCE = """
import os
import runpy
import signal
import time

globals().update(theirs := runpy.run_path({path!r}))


def post_fork(server, worker):
    theirs["post_fork"](server, worker)
    if worker.age > 1:
        os.kill(os.getppid(), signal.SIGTERM)
        until = time.monotonic() + 1
        while not signal.sigpending() and time.monotonic() < until:
            time.sleep(0.01)  # for the master to pass it on
"""


def test_a_worker_that_is_to_end_as_it_starts_ends(gunicorn, tmp_path):
    config = tmp_path / "ended.conf.py"
    config.write_text(ENDED_AT_ONCE.format(path=str(ROOT / "gunicorn.conf.py")))
    server = gunicorn(arguments=["--config", str(config)], CRANE_WORKERS=1)
    server.http_workers()[0].kill()
    assert server.process.wait(20) == 0


def test_a_killed_http_worker_frees_what_it_had_asked_for(gunicorn):
    server = gunicorn(CRANE_REQUEST_TIMEOUT="60s")
    [call] = in_flight(server, model_id="echo", options={"delay_ms": 50_000})
    server.http_workers()[0].kill()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        call.result(10)
    assert server.run(input="next", timeout_s=15)[1]["output"] == "next"


def test_a_ctrl_c_to_the_whole_group_leaves_nothing_behind(gunicorn):
    server = gunicorn()
    server.run()
    sockets = Path(server.engine().environ()["CRANE_ENGINE_SOCKET"]).parent
    assert sockets.is_dir()
    os.killpg(server.process.pid, signal.SIGINT)
    server.process.wait(15)
    server.stop()
    assert not sockets.exists()


def test_a_killed_engine_is_a_503_at_once_and_the_service_comes_back(gunicorn):
    server = gunicorn([ECHO, MINILM], CRANE_WORKERS=2)
    calls = in_flight(server, 4, "echo", options={"delay_ms": 50_000})
    engine = server.engine()
    engine.kill()
    for call in calls:
        status, body = call.result(10)
        assert (status, body["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    # Whoever comes while it starts waits a little instead of being refused.
    assert server.run(input="again", timeout_s=10)[1]["output"] == "again"
    assert server.engine().pid != engine.pid
    wait_for(lambda: server.get("/readyz")[0] == 200)


def test_when_the_master_is_killed_nothing_is_left(gunicorn):
    server = gunicorn(CRANE_WORKERS=2)
    server.run()
    processes = server.processes()
    assert len(processes) == 5  # master, supervisor, engine, two HTTP workers
    server.kill()
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"], ids=["one", "several"])
def test_when_the_supervisor_is_killed_another_one_takes_over(gunicorn, devices):
    server = gunicorn(CRANE_DEVICES=devices)
    server.run()
    for _ in range(2):
        supervisor, *_ = server.processes("backend.engine.supervisor")
        engines = server.processes("backend.engine.server")
        assert len(engines) == len(devices.split(","))
        supervisor.kill()
        assert not psutil.wait_procs([supervisor, *engines], timeout=20)[1]
        wait_for(lambda: server.get("/readyz")[0] == 200, timeout_s=30)
        wait_for(lambda: server.run(input="again")[0] == 200, timeout_s=30)
        assert len(server.processes("backend.engine.supervisor")) == 1
    # `server.stop` finds that nothing is left.


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"], ids=["one", "several"])
def test_while_engines_are_replaced_every_call_is_answered_and_costs_a_unit(gunicorn, devices):
    settings = {"CRANE_QUOTA": "on", "CRANE_TIERS": "free 100000/day", "CRANE_WORKERS": 2}
    server = gunicorn(CRANE_DEVICES=devices, **settings)
    before = server.processes("backend.engine.server")
    statuses, over = [], threading.Event()

    def call():
        while not over.is_set():
            statuses.append(server.run()[0])

    with ThreadPoolExecutor(4) as threads:
        callers = [threads.submit(call) for _ in range(4)]
        wait_for(lambda: len(statuses) > 20)
        server.processes("backend.engine.supervisor")[0].kill()
        assert not wait_for_end(before, 20)
        count = len(statuses)
        wait_for(lambda: len(statuses) > count + 20, 30)
        over.set()
        for caller in callers:
            caller.result(30)
    assert set(statuses) == {200}
    assert server.get("/crane/quota")[1]["limits"][0]["left"] == 100_000 - len(statuses)


def test_a_call_ends_though_the_supervisor_is_killed(with_gate, gate):
    server = with_gate()
    [call] = in_flight(server, input="in flight")
    path = Path(server.engine().environ()["CRANE_ENGINE_SOCKET"])
    engine = RemoteEngine(Config(engine_socket=path))
    server.processes("backend.engine.supervisor")[0].kill()
    wait_for(lambda: engine.look()["draining"])
    gate.touch()
    assert call.result(20)[1]["output"] == "in flight"
    wait_for(lambda: server.run(input="again")[1].get("output") == "again", timeout_s=30)


def test_an_engine_that_does_not_end_is_killed_by_the_next_one(tmp_path):
    lock = tmp_path / "engine.sock.lock"
    code = (
        "import sys, time; from pathlib import Path; from backend.engine import file_lock\n"
        "mine = file_lock.succeed(Path(sys.argv[1]), 0.1); print('mine', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, lock], cwd=ROOT, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"mine\n"
        with file_lock.succeed(lock, 0.1):
            assert lock.read_text() == str(os.getpid())
        assert first.wait(20) == -signal.SIGKILL


def test_nobody_waits_for_ever_for_an_engine_that_accepts_no_one(tmp_path):
    config = Config(data_dir=tmp_path, engine_socket=tmp_path / "engine.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(config.engine_sockets[0]))
        listener.listen(0)
        others = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for other in others:
            other.setblocking(False)
            with suppress(BlockingIOError):
                other.connect(str(config.engine_sockets[0]))
        with pytest.raises(ModelUnavailable, match="not running"):
            RemoteEngine(config, start_s=0.2).look()
        for other in others:
            other.close()


def test_who_has_too_many_files_open_finds_the_engine_away(tmp_path):
    config = Config(data_dir=tmp_path, engine_socket=tmp_path / "engine.sock")
    engine = RemoteEngine(config, start_s=0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(ModelUnavailable, match="cannot be reached"):
            engine.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_hup_changes_nothing_and_loses_nothing(with_gate, gate):
    server = with_gate()
    calls = in_flight(server, 2)
    before = {process.pid for process in server.processes()}
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "restart instead" in server.log())
    gate.touch()
    assert [call.result()[0] for call in calls] == [200, 200]
    assert server.run()[0] == 200
    assert {process.pid for process in server.processes()} == before


def test_livez_answers_while_every_model_and_every_call_is_busy(with_gate, gate):
    server = with_gate(CRANE_THREADS=8)
    calls = in_flight(server, 8)
    assert server.get("/livez")[0] == 200
    gate.touch()
    assert {call.result()[0] for call in calls} == {200}


def test_a_call_too_many_for_a_worker_is_told_so_and_livez_still_answers(with_gate, gate):
    server = with_gate(CRANE_THREADS=4)
    calls = in_flight(server, 4)
    refused = [server.run(input=i) for i in range(3)]
    assert {(status, body["error"]["code"]) for status, body in refused} == {(503, "OVERLOADED")}
    assert server.get("/livez")[0] == 200
    gate.touch()
    assert {call.result()[0] for call in calls} == {200}
    assert server.run()[0] == 200


def test_a_deep_data_folder_still_gets_a_socket(gunicorn, tmp_path):
    deep = tmp_path / ("deep" * 20) / ("deeper" * 10)
    server = gunicorn(CRANE_DATA_DIR=deep)
    assert server.run(input=1)[1]["output"] == 1


def test_two_services_may_share_a_data_folder(gunicorn, tmp_path):
    one = gunicorn([ECHO], CRANE_DATA_DIR=tmp_path / "shared")
    two = gunicorn([ECHO | {"id": "other"}], CRANE_DATA_DIR=tmp_path / "shared")
    assert one.run("echo", 1)[1]["output"] == 1
    assert two.run("other", 2)[1]["output"] == 2
    one.stop()
    assert two.run("other", 3)[1]["output"] == 3


def test_inline_under_gunicorn_answers_too(gunicorn):
    server = gunicorn(CRANE_ENGINE="inline")
    assert server.run(input="hi")[1]["output"] == "hi"
    assert server.processes("backend.engine") == []


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"CRANE_THRAEDS": 4}, "did you mean 'CRANE_THREADS'?"),
        ({"CRANE_MODELS": "/nowhere/models.yaml"}, "/nowhere/models.yaml"),
    ],
)
def test_a_wrong_setting_stops_the_start_in_one_clear_message(gunicorn, settings, fault):
    with pytest.raises(AssertionError) as stopped:
        gunicorn(**settings)
    assert fault in str(stopped.value)
    assert "Traceback" not in str(stopped.value)


def test_answers_never_cross_between_workers_threads_and_abandoned_calls(gunicorn):
    """2,000 calls with marked inputs over 3 HTTP workers, one in eight abandoned half-way."""
    server = gunicorn(CRANE_WORKERS=3, CRANE_REQUEST_TIMEOUT="2s")
    rng = random.Random(7)
    plans = [(index, rng.random() < 0.125, rng.choice([0, 0, 0, 1, 3])) for index in range(2000)]

    def call(plan):
        index, abandoned, delay_ms = plan
        mark = {"mark": index, "pad": "x" * (index % 700)}
        body = {"model_id": "echo", "input": mark, "options": {"delay_ms": delay_ms}}
        data = json.dumps(body).encode()
        if abandoned:
            head = "POST /crane/run HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(data)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head.encode() + data)
            return None
        request_id = {"X-Request-ID": f"call-{index}"}
        status, answer = server.post(body, **request_id)
        return status, answer["output"] == mark, answer["metadata"]["request_id"] == f"call-{index}"

    with ThreadPoolExecutor(48) as threads:
        results = [result for result in threads.map(call, plans) if result is not None]
    assert len(results) > 1600
    assert set(results) == {(200, True, True)}


def test_a_late_answer_is_nobodys(gunicorn):
    """A caller's deadline passes; the same connection's next call gets its own answer."""
    server = gunicorn(CRANE_REQUEST_TIMEOUT="500ms", CRANE_THREADS=1)
    for index in range(5):
        slow = server.run(input=f"slow {index}", options={"delay_ms": 700})
        assert (slow[0], slow[1]["error"]["code"]) == (504, "TIMEOUT_ERROR")
        status, answer = server.run(input=f"quick {index}")
        assert (status, answer["output"]) == (200, f"quick {index}")


def test_an_answer_that_comes_while_the_engine_is_asked_is_not_lost(gunicorn):
    names = "abcdefgh"
    server = gunicorn([ECHO | {"id": name} for name in names], CRANE_LOAD_WAIT="100ms")
    for name in names:
        wait_for(lambda name=name: server.run(name)[0] == 200)  # which a load may take longer than

    def calls(name):
        delays = [97, 98, 99, 100] * 5
        return {server.run(name, options={"delay_ms": delay})[0] for delay in delays}

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(calls, names)) == [{200}] * 8


def test_who_sends_half_a_message_or_reads_no_answer_holds_up_nobody(gunicorn):
    server = gunicorn()
    assert server.run()[0] == 200
    path = server.engine().environ()["CRANE_ENGINE_SOCKET"] + "0"
    call = Call(
        request_id="deaf",
        model_id="echo",
        inputs=["much " * 2_000_000],
        options={"delay_ms": 0},
        seeds=None,
        timeout_s=60,
    )
    with socket.socket(socket.AF_UNIX) as half, socket.socket(socket.AF_UNIX) as deaf:
        for end in (half, deaf):
            end.connect(path)
        half.sendall(bytes((1, 0, 0, 0, 1, *bytes(6), 1, 0)) + b"half")
        deaf.settimeout(20)
        [message] = wire.pack(call.to_wire())
        deaf.sendall(bytes((1, 0, 0, 0, 1)) + len(message).to_bytes(8) + message)
        time.sleep(0.3)  # for its answer to be there, of which the socket takes a part
        for _ in range(20):
            started = time.monotonic()
            assert server.run()[0] == 200
            assert time.monotonic() - started < 1


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_each_http_worker_keeps_to_a_core_and_the_engine_has_all(gunicorn):
    server = gunicorn(CRANE_WORKERS=2)

    def cores():
        return sorted(core for one in server.http_workers() for core in one.cpu_affinity())

    first, second = cores()
    assert first != second
    assert set(server.engine().cpu_affinity()) == CORES
    server.http_workers()[0].kill()
    deadline = time.monotonic() + 10
    while cores() != [first, second]:  # another one takes the core that is free now
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has this policy")
def test_no_thread_of_the_service_interrupts_another_as_it_wakes(gunicorn):
    server = gunicorn(CRANE_WORKERS=2)
    server.run(ECHO["id"])
    threads = [
        thread.id for one in (*server.http_workers(), server.engine()) for thread in one.threads()
    ]
    assert len(threads) > 6
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}


def test_a_worker_with_the_models_in_it_has_all_cores(gunicorn):
    [worker] = gunicorn(CRANE_ENGINE="inline").http_workers()
    assert set(worker.cpu_affinity()) == CORES


def test_media_are_read_on_all_cores_and_the_thread_returns_to_its_own(monkeypatch):
    monkeypatch.setattr(cores, "_all", None)
    seen = []

    def read():
        cores.stay_on(min(CORES))
        data = base64.b64decode(base64_of(picture(4, 4)))
        for fails in (False, True):

            def claim(pixels, fails=fails):
                seen.append(os.sched_getaffinity(0))
                assert not fails

            with suppress(AssertionError):
                images.decode_image(data, mode="RGB", mime_type=None, claim=claim)
            seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=read)  # whose affinity ends with it
    thread.start()
    thread.join()
    assert seen == [CORES, {min(CORES)}] * 2


@pytest.mark.parametrize("module", [images, audio, video])
@pytest.mark.parametrize("what", ["decode", "encode"])
def test_whatever_is_decoded_or_encoded_has_all_cores(module, what):
    name = module.__name__.rpartition(".")[2].removesuffix("s")
    assert getattr(module, f"{what}_{name}").__wrapped__
