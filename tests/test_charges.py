"""What a call costs its caller, whatever becomes of it: through the caller's door."""

from __future__ import annotations

import json
import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backend.adapters.base import Prediction
from backend.adapters.echo import Echo
from backend.engine import client as engine_client
from backend.errors import InvalidRequest
from backend.media.parts import ImageField
from backend.quota.tiers import tiers
from backend.schemas import Integer, Number
from backend.tasks import TASKS
from backend.tasks.examples import PICTURE
from tests.conftest import ECHO, run
from tests.pictures import base64_of, picture
from tests.serving import ROOT, wait_for


@pytest.fixture
def metered(make_app):
    """An app that holds callers to a tier: ``metered("free 5/minute", [entry, …])``."""

    def make(text="free 100/minute", entries=(ECHO,), **settings):
        return make_app(entries, quota="on", tiers=tiers(text), **settings).test_client()

    return make


def left(client):
    return client.get("/crane/quota").json["limits"][0]["left"]


def refusals():
    """Calls that no model sees, each with its status."""
    sent = {
        "no-json": (b"{", "application/json", 400),
        "no-object": (b"[]", "application/json", 400),
        "no-input": (b'{"model_id": "echo"}', "application/json", 400),
        "no-such-model": (b'{"model_id": "nobody", "input": 1}', "application/json", 404),
        "option": (b'{"model_id": "echo", "input": 1, "options": {"x": 1}}', None, 400),
        "options": (b'{"model_id": "echo", "input": 1, "options": []}', None, 400),
        "empty-batch": (b'{"model_id": "echo", "input": []}', None, 400),
        "batch-too-large": (
            json.dumps({"model_id": "echo", "input": [1] * 300}).encode(),
            None,
            400,
        ),
        "too-large": (b" " * 200_000, None, 413),
        "no-type": (b"{}", "text/plain", 415),
        "broken-form": (b"--x", "multipart/form-data", 400),
    }
    return [pytest.param(*call, id=name) for name, call in sent.items()]


@pytest.mark.parametrize("cost", [1, 0, {"per_image": 3}], ids=["plain", "free", "by-image"])
@pytest.mark.parametrize(("body", "kind", "status"), refusals())
def test_a_call_that_no_model_sees_costs_a_unit_whatever_the_model_does(
    metered, body, kind, status, cost
):
    client = metered("free 5/minute", [{**ECHO, "cost": cost}], max_body=100_000)
    kind = kind or "application/json"
    answers = [client.post("/crane/run", data=body, content_type=kind) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [status] * 5 + [429]
    assert [int(answer.headers["X-RateLimit-Remaining"]) for answer in answers] == [
        4,
        3,
        2,
        1,
        0,
        0,
    ]
    assert client.get("/crane/quota").json["concurrency"]["running"] == 0


def test_so_does_a_bad_call_to_the_routes_of_openai(metered):
    client = metered("free 5/minute")
    answers = [client.post("/v1/embeddings", data=b"{") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [415] * 5 + [429]


def test_300_bad_calls_are_not_taken_from_one_caller(gunicorn):
    server = gunicorn(CRANE_QUOTA="on", CRANE_WORKERS=2, CRANE_TIERS="free 60/hour")
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: server.post([])[0], range(300)))
    assert (statuses.count(400), statuses.count(429)) == (60, 240)


def send_head(port, length):
    """A request of which only the head is sent; its connection."""
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.sendall(
        b"POST /crane/run HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )
    return connection


def status_of(connection):
    """The first bytes of an answer; what was not sent of the request never will be."""
    with connection:
        return connection.recv(12)


def test_no_byte_of_a_body_is_waited_for_whose_caller_is_over_its_quota(gunicorn):
    server = gunicorn(CRANE_QUOTA="on", CRANE_TIERS="free 1/hour")
    assert server.run()[0] == 200
    assert status_of(send_head(server.port, 30_000_000)) == b"HTTP/1.1 429"
    assert server.run()[1]["error"]["code"] == "RATE_LIMIT_EXCEEDED"


def test_bodies_are_read_within_the_calls_that_a_caller_may_have_at_once(gunicorn):
    server = gunicorn(CRANE_QUOTA="on", CRANE_TIERS="free 1000/hour concurrency=2")
    body = json.dumps({"model_id": "echo", "input": "x" * 100_000}).encode()
    slow = [send_head(server.port, len(body)) for _ in range(2)]

    def running():
        return server.get("/crane/quota")[1]["concurrency"]["running"]

    wait_for(lambda: running() == 2)
    assert server.run()[1]["error"]["code"] == "CONCURRENCY_LIMIT_EXCEEDED"
    assert status_of(send_head(server.port, 30_000_000)) == b"HTTP/1.1 429"
    for connection in slow:
        connection.sendall(body)
        assert status_of(connection) == b"HTTP/1.1 200"
    wait_for(lambda: running() == 0)
    assert server.run()[0] == 200


# What is reserved, and what a good call costs in the end.

LARGE = base64_of(picture(2800, 1400))  # 5,000 times 28 x 28 pixels


def made(input_, options):
    return {
        "images": options["num_images"],
        "output_tokens": options["max_tokens"],
        "audio_seconds": options["duration"],
        "video_seconds": options["duration"],
    }


@pytest.fixture
def counter(add_task):
    """A model that says it used what its options ask for."""

    class Counting(type(TASKS["echo"].options())):
        num_images = Integer(low=1, high=100, load_default=1)
        max_tokens = Integer(low=1, high=100_000, load_default=500)
        duration = Number(low=0, high=1000, load_default=60)
        used_tokens = Integer(low=0, high=100_000, load_default=0)
        seconds = Number(low=0, high=100_000, load_default=0)

    class Counter(Echo):
        def predict(self, batch):
            options = batch.options
            usage = {"images": options["num_images"], "output_tokens": options["used_tokens"]}
            usage |= dict.fromkeys(("audio_seconds", "video_seconds"), options["seconds"])
            return [Prediction(said.output, usage) for said in super().predict(batch)]

    return add_task("counter", Counter, Counting, makes=made)


@pytest.mark.parametrize(
    ("cost", "options", "inputs", "units"),
    [
        pytest.param(7, {}, 1, 7, id="number"),
        pytest.param(0, {}, 1, 0, id="free"),
        pytest.param(2, {}, 3, 6, id="a-number-is-for-each-input"),
        pytest.param({"per_input": 2}, {}, 3, 6, id="each-input"),
        pytest.param({"per_input": 2}, {"num_images": 3}, 2, 12, id="each-of-several-outputs"),
        pytest.param({"per_request": 2}, {"num_images": 3}, 3, 2, id="each-request"),
        pytest.param({"per_image": 2}, {"num_images": 3}, 1, 6, id="images"),
        pytest.param({"per_image": 2}, {}, 4, 8, id="images-of-a-batch"),
        pytest.param({"per_image": 0.1}, {"num_images": 3}, 1, 0.3, id="no-more-than-the-sum"),
        pytest.param({"per_1k_tokens": 4}, {"used_tokens": 250}, 1, 1, id="tokens"),
        pytest.param({"per_1k_tokens": 0.1}, {"used_tokens": 1}, 1, 0.001, id="rounded-up"),
        pytest.param({"per_audio_minute": 6}, {"seconds": 30}, 1, 3, id="audio"),
        pytest.param({"per_audio_minute": 6}, {"seconds": 300}, 1, 30, id="more-than-reserved"),
        pytest.param({"per_video_second": 0.5}, {"seconds": 30}, 2, 30, id="video"),
        pytest.param(
            {"per_request": 1, "per_image": 2, "per_1k_tokens": 8},
            {"num_images": 2, "used_tokens": 125},
            1,
            6,
            id="sum",
        ),
    ],
)
def test_a_call_costs_what_its_models_entry_says(metered, counter, cost, options, inputs, units):
    client = metered(entries=[{**counter, "cost": cost}])
    answer = run(client, "counter", ["hi"] * inputs if inputs > 1 else "hi", options=options)
    assert answer.status_code == 200, answer.json
    assert left(client) == pytest.approx(100 - units)
    assert int(answer.headers["X-RateLimit-Remaining"]) == math.floor(100 - units)


def test_a_batch_costs_by_its_inputs_where_an_entry_says_nothing(metered):
    client = metered("free 300/minute")
    assert run(client, input=["hi"] * 256).status_code == 200
    assert left(client) == 300 - 256


@pytest.mark.parametrize("stream", [False, True])
def test_a_batch_larger_than_what_is_left_is_refused_before_it_is_run(metered, stream, capsys):
    client = metered("free 60/minute")
    run(client, input=["hi"] * 20)
    refused = run(client, input=["hi"] * 41, stream=stream)
    assert (refused.status_code, left(client)) == (429, 39)
    error = refused.json["error"]
    assert error["code"] == "RATE_LIMIT_EXCEEDED"
    assert error["details"] == {"limit": "rate", "tier": "free", "cost": 41}
    wait = refused.headers["Retry-After"]
    assert error["message"] == (
        "This call costs up to 41 units, and 40 are left of the rate of the tier 'free', 60 per "
        f"minute: ask for less at once, or try again in {wait} s."
    )
    assert run(client, input=["hi"] * 39, stream=stream).status_code == 200
    assert left(client) == 0


def test_what_a_call_may_come_to_is_held_while_it_runs(metered, counter):
    client = metered(entries=[{**counter, "cost": {"per_1k_tokens": 10, "per_image": 5}}])
    # Nine times 10, less than 1 for its input, and twice 5: all there is, but for a unit.
    options = {"max_tokens": 8900, "num_images": 2, "delay_ms": 800}
    thread = threading.Thread(target=run, args=(client, "counter"), kwargs={"options": options})
    thread.start()
    wait_for(lambda: left(client) < 1)
    refused = run(client, "counter", options={"max_tokens": 1})
    assert refused.json["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    thread.join()
    assert left(client) == 90


@pytest.mark.parametrize(
    ("cost", "inputs", "options", "units"),
    [
        ({"per_request": 101}, 2, {}, 101),
        ({"per_input": 60}, 2, {}, 120),
        ({"per_input": 30}, 2, {"num_images": 2}, 120),
        ({"per_image": 30}, 4, {}, 120),
        ({"per_image": 30}, 2, {"num_images": 2}, 120),
        ({"per_1k_tokens": 1000}, 3, {"max_tokens": 100}, 354),
        ({"per_audio_minute": 60}, 2, {}, 120),
        ({"per_audio_minute": 60}, 1, {"duration": 120}, 120),
        ({"per_audio_minute": 30, "per_request": 105}, 1, {"duration": 30}, 120),
        ({"per_video_second": 2}, 1, {}, 120),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_reserved_is_the_most_that_a_call_may_come_to(
    metered, counter, cost, inputs, options, units, stream
):
    client = metered(entries=[{**counter, "cost": cost}])
    inputs = ["hi"] * inputs if inputs > 1 else "hi"
    refused = run(client, "counter", inputs, options=options, stream=stream)
    assert refused.status_code == 403
    assert f"costs up to {units} units" in refused.json["error"]["message"]
    assert left(client) == 99


@pytest.mark.parametrize(
    ("task", "input_", "options", "price", "units"),
    [
        pytest.param("embeddings", "x" * 96 + "🦩", {}, ("1k_tokens", 1000), 116, id="bytes"),
        pytest.param(
            "rerank",
            {"query": "x" * 10, "documents": ["é" * 10, "x" * 90]},
            {},
            ("1k_tokens", 1000),
            2 * (10 + 10 + 10 + 90) + 4 * 16,
            id="the-text-that-has-most-bytes-a-character",
        ),
        pytest.param(
            "image-text-to-text",
            {"messages": [{"role": "user", "content": [{"type": "image", "image": LARGE}]}]},
            {"max_tokens": 1},
            ("1k_tokens", 1000),
            5000 + 1 + 37 + 5 * 16,
            id="pixels",
        ),
        pytest.param("text-to-speech", "ho", {}, ("audio_minute", 60), 16.5, id="speech"),
        pytest.param("text-to-video", "ho", {}, ("video_second", 1), 10, id="video"),
        pytest.param("text-to-video", "ho", {"fps": 1}, ("video_second", 1), 161, id="slow-video"),
    ],
)
def test_what_only_a_model_knows_is_guessed(metered, task, input_, options, price, units):
    unit, cost = price
    entry = {"id": "it", "type": task, "hf_model": "org/it", "cost": {f"per_{unit}": cost}}
    refused = run(metered("free 1/hour", [entry]), "it", input_, options=options)
    assert refused.status_code == 403, refused.json
    assert f"costs up to {units} units" in refused.json["error"]["message"]


def test_the_models_own_defaults_are_reserved_where_nothing_is_asked_for(metered, counter):
    entry = {**counter, "cost": {"per_1k_tokens": 10}, "options": {"max_tokens": 20_000}}
    refused = run(metered(entries=[entry]), "counter")
    assert (refused.status_code, refused.json["error"]["code"]) == (403, "FORBIDDEN")
    assert "up to 200.21 units" in refused.json["error"]["message"]


def test_who_has_nothing_left_is_refused_though_nothing_is_known_of_the_cost(metered):
    client = metered(
        "free 1/minute", [ECHO, {**ECHO, "id": "by-tokens", "cost": {"per_1k_tokens": 1}}]
    )
    assert run(client, "by-tokens").status_code == 200
    assert run(client).status_code == 200
    assert run(client, "by-tokens").status_code == 429


@pytest.mark.parametrize("wrong", ["many", -5, 1e308, True, None, [1]])
def test_what_is_reserved_is_not_led_astray_by_wrong_options(metered, counter, wrong):
    client = metered(entries=[{**counter, "cost": {"per_1k_tokens": 1, "per_request": 1}}])
    assert run(client, "counter", options={"max_tokens": wrong}).status_code == 400
    assert left(client) == 99


def test_who_has_overdrawn_waits_until_it_is_paid(metered, counter):
    client = metered("free 10/minute", [{**counter, "cost": {"per_audio_minute": 3}}, ECHO])
    assert run(client, "counter", options={"seconds": 600}).status_code == 200
    assert run(client).status_code == 429


# Calls that fail: those that no model has begun cost a unit, the others what was reserved.


class Breaks(Echo):
    def predict(self, batch):
        raise RuntimeError("of our own making")


class DoesNotLoad(Echo):
    def load(self):
        raise RuntimeError("of our own making")


class RefusesTheLast(Echo):
    """Runs all inputs but the last of each call, each of them for two pictures."""

    usage = {"images": 2}

    def predict(self, batch):
        said = [Prediction(one.output, self.usage) for one in super().predict(batch)]
        return [*said[:-1], InvalidRequest.of({"input": "is too long"})]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("adapter", "inputs", "status", "units"),
    [
        pytest.param(Breaks, 3, 500, 9, id="broke-while-it-ran"),
        pytest.param(DoesNotLoad, 3, 503, 1, id="never-ran"),
        pytest.param(Echo, 3, 504, 9, id="ran-out-of-time"),
        pytest.param(RefusesTheLast, 3, 400, 7, id="some-of-it-ran"),
        pytest.param(RefusesTheLast, 1, 400, 3, id="refused-by-the-model"),
    ],
)
def test_what_began_to_run_is_paid_for_whatever_its_status(
    metered, add_task, adapter, inputs, status, units, stream
):
    entry = add_task("fails", adapter)
    entry["cost"] = {"per_input": 3} if adapter is not RefusesTheLast else {"per_image": 1}
    if adapter is RefusesTheLast:
        entry["cost"]["per_request"] = 3
    client = metered(entries=[ECHO, entry], request_timeout_s=0.5)
    options = {"delay_ms": 5000} if adapter is Echo else {}
    answer = run(client, "fails", ["hi"] * inputs, options=options, stream=stream)
    assert answer.status_code == status or (stream and b"event: error" in answer.data)
    assert left(client) == 100 - units
    assert client.get("/crane/quota").json["concurrency"]["running"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_model_refuses_costs_a_unit_at_least(metered, add_task, stream):
    client = metered(entries=[{**add_task("fails", RefusesTheLast), "cost": {"per_image": 3}}])
    run(client, "fails", stream=stream)
    assert left(client) == 99


@pytest.mark.parametrize("stream", [False, True])
def test_media_are_paid_for_where_a_model_refuses_one_of_a_batch(metered, add_task, stream):
    """Also of a task whose adapter counts nothing itself: what was sent counts."""
    refuses = type("Refuses", (RefusesTheLast,), {"usage": {}})
    entry = {**add_task("fails", refuses, input=ImageField()), "cost": {"per_image": 2}}
    client = metered(entries=[entry])
    answer = run(client, "fails", [PICTURE] * 3, stream=stream)
    assert answer.status_code == 400 or (stream and b"event: error" in answer.data)
    assert left(client) == 100 - 3 * 2


@pytest.mark.parametrize("stream", [False, True])
def test_what_waited_for_others_until_its_time_was_over_costs_a_unit(metered, add_task, stream):
    begun, answered = threading.Event(), threading.Event()

    class Stays(Echo):
        """Runs until the one behind it has its answer, though its own caller's time is over."""

        def predict(self, batch):
            begun.set()
            assert answered.wait(30)
            return super().predict(batch)

    entry = {**add_task("stays", Stays), "cost": 5, "max_batch_size": 1}
    client = metered(entries=[entry], request_timeout_s=1)
    held = threading.Thread(target=run, args=(client, "stays"))
    held.start()
    assert begun.wait(10)
    answer = run(client, "stays", stream=stream)
    answered.set()
    assert answer.status_code == 504
    held.join()
    assert left(client) == 100 - 5 - 1


def test_a_failure_nobody_foresaw_costs_what_was_used(metered, monkeypatch):
    client = metered(entries=[{**ECHO, "cost": {"per_request": 3}}])
    monkeypatch.setattr("backend.models.common", lambda *args, **kwargs: 1 / 0)
    assert (run(client).status_code, left(client)) == (500, 97)


@pytest.mark.parametrize("begins", [False, True])
def test_a_stream_that_nobody_reads_is_settled(metered, begins, monkeypatch):
    client = metered(entries=[{**ECHO, "cost": {"per_request": 3}}])
    monkeypatch.setattr(engine_client, "IDLE_S", 0.02)
    body = {"model_id": "echo", "input": 1, "options": {"delay_ms": 60_000}, "stream": True}
    answer = client.post("/crane/run", json=body)
    if begins:
        next(answer.response)
    assert client.get("/crane/quota").json["concurrency"]["running"] == 1
    answer.close()
    assert (left(client), client.get("/crane/quota").json["concurrency"]["running"]) == (97, 0)


def test_a_stream_that_is_left_before_its_model_is_free_costs_a_unit(metered, monkeypatch):
    client = metered(entries=[{**ECHO, "cost": 3, "max_batch_size": 1}])
    monkeypatch.setattr(engine_client, "IDLE_S", 0.02)
    body = {"model_id": "echo", "input": 1, "options": {"delay_ms": 60_000}, "stream": True}
    served = client.post("/crane/run", json=body)
    assert b"event: start" in next(served.response)
    waiting = client.post("/crane/run", json=body)
    assert left(client) == 94
    waiting.close()
    assert left(client) == 100 - 3 - 1
    served.close()
    assert left(client) == 100 - 3 - 1


def test_a_stream_is_settled_before_its_output_is_sent(metered):
    """Its caller may take minutes to read that, longer than its lease lasts."""
    client = metered(entries=[{**ECHO, "cost": {"per_1k_tokens": 1000}}])
    answer = client.post("/crane/run", json={"model_id": "echo", "input": 1, "stream": True})
    assert any(b"event: output" in part for part in answer.response)
    assert client.get("/crane/quota").json["concurrency"]["running"] == 0
    assert left(client) == 100
    answer.close()


OVERUSES = """
import time
from dataclasses import replace
from backend.adapters import ADAPTERS
from backend.adapters.base import Prediction
from backend.adapters.echo import Echo
from backend.tasks import TASKS

class Overuses(Echo):
    def predict(self, batch):
        while batch.inputs == ["stay"] and not batch.abandoned():
            time.sleep(0.01)
        return [Prediction(one.output, {"images": 5}) for one in super().predict(batch)]

TASKS["overuses"] = replace(
    TASKS["echo"], name="overuses", makes=lambda input_, options: {"images": 1}
)
ADAPTERS["overuses"] = Overuses
"""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", ["process", "inline"])
def test_who_leaves_pays_what_was_used_where_less_was_reserved(gunicorn, tmp_path, engine, stream):
    (tmp_path / "sitecustomize.py").write_text(OVERUSES)
    entry = {"id": "it", "type": "overuses", "max_batch_size": 1, "cost": {"per_image": 1}}
    server = gunicorn(
        [entry],
        CRANE_ENGINE=engine,
        CRANE_QUOTA="on",
        CRANE_TIERS="free 100/hour",
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )
    body = json.dumps({"model_id": "it", "input": ["go", "go", "stay"], "stream": stream}).encode()

    def is_at_the_last():
        model = server.get("/crane/models/it")[1]
        return model["running"] and not model["queue"]

    def quota():
        answer = server.get("/crane/quota")[1]
        return answer["concurrency"]["running"], answer["limits"][0]["left"]

    with send_head(server.port, len(body)) as caller:
        caller.sendall(body)
        wait_for(is_at_the_last)
        assert quota() == (1, 97)
    wait_for(lambda: quota()[0] == 0)
    assert quota() == (0, 90)


@pytest.mark.parametrize("engine", ["process", "inline"])
def test_who_leaves_while_others_are_served_pays_a_unit_and_who_was_served_all(gunicorn, engine):
    echo = {**ECHO, "cost": 5, "max_batch_size": 1}
    server = gunicorn([echo], CRANE_ENGINE=engine, CRANE_QUOTA="on", CRANE_TIERS="free 100/hour")

    def quota():
        answer = server.get("/crane/quota")[1]
        return answer["concurrency"]["running"], answer["limits"][0]["left"]

    def state():
        model = server.get("/crane/models/echo")[1]
        return bool(model["running"]), model["queue"]

    def call():
        body = json.dumps({"model_id": "echo", "input": 1, "options": {"delay_ms": 60_000}})
        connection = send_head(server.port, len(body))
        connection.sendall(body.encode())
        return connection

    served = call()
    wait_for(lambda: state() == (True, 0))
    waiting = call()
    wait_for(lambda: state() == (True, 1))
    assert quota() == (2, 90)
    waiting.close()
    wait_for(lambda: quota() == (1, 94))
    served.close()
    wait_for(lambda: quota() == (0, 94))
