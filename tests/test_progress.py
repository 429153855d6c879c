"""How far a load is, as those who wait for it are told."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
from transformers import core_model_loading

from backend.adapters import progress
from backend.adapters.echo import Echo
from backend.adapters.progress import LoadWatch
from tests import serving
from tests.checkpoints import large_llama
from tests.conftest import run
from tests.hub import Hub

MB = 1_000_000


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(progress, "LOOK_S", 0.005)


wait_for = partial(serving.wait_for, timeout_s=20)


# Fetching


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint of 35 MB: the Hub's library writes what it fetches by 10 MB."""
    folder = tmp_path_factory.mktemp("of") / "llama"
    large_llama(folder, layers=2)
    return folder


@pytest.fixture
def hub(llama):
    hub = Hub(llama)
    yield hub
    hub.close()


def test_who_waits_for_a_download_is_told_how_far_it_is(gunicorn, hub, llama, tmp_path):
    hub.hold_at = 25 * MB
    entry = {"id": "m", "type": "text-generation", "hf_model": "of/llama"}
    server = gunicorn([entry], CRANE_LOAD_WAIT="0.3s", **hub.environment(tmp_path / "cache"))
    total = (llama / "model.safetensors").stat().st_size

    def told():
        status, headers, body = server.request(
            "POST",
            "/crane/run",
            b'{"model_id": "m", "input": "the"}',
            {"Content-Type": "application/json"},
        )
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (503, "MODEL_LOADING")
        shown = error["details"]["progress"]
        return shown and shown["done_bytes"] > 20 * MB and (error, shown, headers)

    error, shown, headers = wait_for(told, timeout_s=60)
    assert (shown["stage"], shown["total_bytes"]) == ("download", total)
    assert shown["done_bytes"] < 25 * MB
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert "m is still loading after 0.3 s (21 MB of 35.2 MB downloaded); " in error["message"]
    assert f"try again in {headers['Retry-After']} s." in error["message"]
    meanwhile = server.get("/crane/models/m")[1]
    assert (meanwhile["state"], meanwhile["progress"]["stage"]) == ("loading", "download")
    hub.go_on.set()
    wait_for(lambda: server.get("/crane/models/m")[1]["state"] == "ready", timeout_s=60)
    assert server.get("/crane/models/m")[1]["progress"] is None
    assert server.run("m", "the river", options={"max_tokens": 2})[0] == 200


# Reading


def test_weights_that_are_read_are_counted_as_they_come(
    make_app, llama, tmp_path_factory, monkeypatch
):
    read = core_model_loading._materialize_copy

    def read_as_from_a_slow_disk(*arguments):
        time.sleep(4 * progress.LOOK_S)
        return read(*arguments)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", read_as_from_a_slow_disk)
    folder = tmp_path_factory.mktemp("of") / "larger"
    large_llama(folder, layers=7)
    small, large = (
        # Numbers of another width must be copied.
        {"id": place.name, "type": "text-generation", "hf_model": str(place), "dtype": "bfloat16"}
        for place in (llama, folder)
    )
    client = make_app([small, large]).test_client()
    assert run(client, "llama", "the").status_code == 200  # imports what it needs
    seen = []
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(run, client, "larger", "the", options={"max_tokens": 1})
        while not answer.done():
            if shown := client.get("/crane/models/larger").json["progress"]:
                seen.append(shown)
            time.sleep(0.005)
    assert answer.result().status_code == 200
    total = (folder / "model.safetensors").stat().st_size
    assert {(one["stage"], one["total_bytes"]) for one in seen} == {("load", total)}
    done = [one["done_bytes"] for one in seen]
    assert done == sorted(done)
    assert len(set(done)) > 5
    assert 0.5 * total < done[-1] <= total


# Telling


@pytest.fixture
def slow(add_task, tmp_path):
    """The entry of a model that loads at a gate from a file of the Hub's, and its adapter."""
    gate = threading.Event()
    file = tmp_path / "blobs" / "a1"
    file.parent.mkdir()

    class Slow(Echo):
        loads_alone = True
        weight_files = {file: 1000}

        def load(self):
            assert gate.wait(20)
            super().load()

    Slow.gate, Slow.file = gate, file
    yield add_task("slow", Slow), Slow
    gate.set()


def write(file, size, name=".0f.incomplete"):
    file.with_name(file.name + name).write_bytes(bytes(size))


def shown(client, model_id="slow"):
    return client.get(f"/crane/models/{model_id}").json["progress"]


@pytest.mark.parametrize(
    ("done", "retry_after"), [pytest.param(1, "60", id="slow"), pytest.param(999, "1", id="fast")]
)
def test_the_time_to_come_back_is_that_of_the_rest_within_bounds(make_app, slow, done, retry_after):
    entry, model = slow
    client = make_app([entry], load_wait_s=0.3).test_client()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(run, client, "slow")
        wait_for(lambda: shown(client))
        assert shown(client)["left_s"] is None
        write(model.file, done)
        refused = answer.result()
    details = refused.json["error"]["details"]
    left_s = details["progress"].pop("left_s")
    assert details == {
        "state": "loading",
        "progress": {"stage": "download", "done_bytes": done, "total_bytes": 1000},
    }
    assert (left_s > 60) == (done == 1)
    assert refused.headers["Retry-After"] == retry_after
    assert f"try again in {retry_after} s." in refused.json["error"]["message"]


def test_where_nothing_is_known_of_a_load_nothing_is_told(make_app, slow):
    entry, model = slow
    model.weight_files = {}
    client = make_app([entry], load_wait_s=0.2).test_client()
    refused = run(client, "slow")
    error = refused.json["error"]
    assert error["details"] == {"state": "loading", "progress": None}
    assert (
        "still loading after 0.2 s; it goes on loading, so try again in 10 s." in error["message"]
    )
    assert refused.headers["Retry-After"] == "10"
    model.gate.set()


def test_a_load_goes_on_where_its_progress_cannot_be_told(make_app, slow, monkeypatch):
    def fail():
        raise OSError("no such system")

    monkeypatch.setattr(progress, "_mapped", fail)
    entry, model = slow
    client = make_app([entry], load_wait_s=0.2).test_client()
    assert run(client, "slow").json["error"]["details"]["progress"]["stage"] == "download"
    model.file.write_bytes(bytes(1000))
    wait_for(lambda: shown(client) is None)
    assert run(client, "slow").json["error"]["details"]["progress"] is None
    model.gate.set()
    wait_for(lambda: run(client, "slow").status_code == 200)


def test_a_load_that_waits_for_another_says_for_which_and_one_that_is_over_has_no_progress(
    make_app, slow, add_task
):
    entry, model = slow

    class Next(model):
        pass

    client = make_app([entry, add_task("next", Next)], load_wait_s=0.5).test_client()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, client, "slow")
        wait_for(lambda: shown(client))
        second = threads.submit(run, client, "next")
        progress = {"stage": "wait", "waiting_for": "slow"}
        progress |= {"done_bytes": 0, "total_bytes": 1000, "left_s": None}
        wait_for(lambda: shown(client, "next") == progress)
        error = second.result().json["error"]
        assert (error["code"], error["details"]["progress"]) == ("MODEL_LOADING", progress)
        assert "still loading after 0.5 s (waiting for the load of slow); " in error["message"]
        model.gate.set()
        assert first.result().json["error"]["code"] == "MODEL_LOADING"
    for name in ("slow", "next"):
        wait_for(lambda name=name: run(client, name).status_code == 200)
    assert shown(client) is None


# Counting


@pytest.fixture
def blobs(tmp_path):
    """Names in a cache's folder: ``blobs("a", "b")``."""
    return lambda *names: [tmp_path / name for name in names]


def test_no_more_is_told_than_all_nor_less_than_before(blobs):
    (file,) = blobs("a")
    with LoadWatch({file: 1000}) as watch:
        for size, done in ((400, 400), (300, 400), (5000, 1000)):
            write(file, size)
            wait_for(lambda done=done: watch.progress and watch.progress["done_bytes"] == done)
            time.sleep(0.05)
            assert watch.progress["done_bytes"] == done
        assert watch.progress["stage"] == "download"


def test_no_file_counts_for_another(blobs):
    first, second = blobs("a", "b")
    write(first, 5000)
    with LoadWatch({first: 700, second: 300}) as watch:
        assert wait_for(lambda: watch.progress)["done_bytes"] == 700


def test_what_a_killed_process_left_does_not_count_beside_what_comes_now(blobs):
    (file,) = blobs("a")
    for number in range(20):  # a folder has no order
        write(file, 900, f".{number}.incomplete")
        os.utime(file.with_name(f"a.{number}.incomplete"), (1, 1))
    write(file, 100, ".new.incomplete")
    file.with_name("a.gone.incomplete").symlink_to("moved-meanwhile")
    with LoadWatch({file: 1000}) as watch:
        assert wait_for(lambda: watch.progress)["done_bytes"] == 100


def test_other_files_of_the_repository_do_not_count(blobs):
    file, other = blobs("a", "b")
    write(other, 900)
    with LoadWatch({file: 1000}) as watch:
        assert wait_for(lambda: watch.progress)["done_bytes"] == 0


def test_when_all_files_are_there_they_are_read(blobs):
    first, second = blobs("a", "b")
    first.write_bytes(bytes(700))
    with LoadWatch({first: 700, second: 300}) as watch:
        assert wait_for(lambda: watch.progress)["done_bytes"] == 700
        write(second, 200)
        wait_for(lambda: watch.progress["done_bytes"] == 900)
        assert watch.progress["stage"] == "download"
        second.with_name("b.0f.incomplete").rename(second)
        wait_for(lambda: watch.progress["stage"] == "load")
        assert watch.progress["total_bytes"] == 1000


def test_a_file_that_is_not_fetched_after_all_holds_nothing_up(blobs, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_S", 0.2)
    wanted, unwanted, other = blobs("a", "b", "c")
    write(other, 10)
    with LoadWatch({wanted: 700, unwanted: 300}) as watch:
        time.sleep(0.4)  # before the first file comes it may take as long as it will
        assert watch.progress["stage"] == "download"
        write(wanted, 700)
        wait_for(lambda: watch.progress["done_bytes"] == 700)
        time.sleep(0.4)  # a file that does not grow is still to come
        assert watch.progress["stage"] == "download"
        wanted.with_name("a.0f.incomplete").rename(wanted)
        wait_for(lambda: watch.progress["stage"] == "load")
        assert watch.progress["total_bytes"] == 700


def test_what_is_let_go_of_meanwhile_takes_nothing_back(blobs, monkeypatch):
    (file,) = blobs("a")
    file.write_bytes(bytes(1000))
    mapped = [5000, 5300, 200, 500]
    monkeypatch.setattr(progress, "_mapped", lambda: mapped.pop(0) if mapped[1:] else mapped[0])
    with LoadWatch({file: 1000}) as watch:
        wait_for(lambda: watch.progress and watch.progress["done_bytes"] == 600)
        time.sleep(0.05)
        assert watch.progress["done_bytes"] == 600
        mapped[:] = [9000]
        wait_for(lambda: watch.progress["done_bytes"] == 1000)


def test_the_rate_is_that_since_bytes_began_to_come(blobs, monkeypatch):
    (file,) = blobs("a")
    file.write_bytes(bytes(1000))
    mapped, clock = iter([0, 0, 0, 100]), iter([0, 10, 20, 30])
    monkeypatch.setattr(progress, "_mapped", lambda: next(mapped, 100))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock, 30)))
    with LoadWatch({file: 1000}) as watch:
        wait_for(lambda: watch.progress and watch.progress["done_bytes"] == 100)
        assert watch.progress["left_s"] == 90
