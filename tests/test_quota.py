"""Quotas through the caller's door: what is let in, what it costs, and what the headers say."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from backend.config import Config
from backend.quota.failover import CLOSE_WAIT_S
from backend.quota.sqlite import SqliteStore
from backend.quota.tiers import tiers
from tests import serving
from tests.conftest import ECHO, run
from tests.valkey import Valkey

FREE = tiers("free 5/minute concurrency=5")


@pytest.fixture
def metered(make_app):
    """An app that holds callers to a tier: ``metered("free 5/minute", [entry, …])``."""

    def make(text="free 5/minute", entries=(ECHO,), **settings):
        app = make_app(entries, quota="on", tiers=tiers(text), **settings)
        return app.test_client()

    return make


def left(answer):
    return int(answer.headers["X-RateLimit-Remaining"])


def test_a_fresh_service_gives_a_caller_sixty_calls_a_minute(make_app):
    client = make_app(quota="on").test_client()
    answers = [run(client) for _ in range(61)]
    assert [answer.status_code for answer in answers] == [200] * 60 + [429]


def test_every_metered_answer_says_how_the_caller_stands(metered):
    client = metered()
    answer = run(client)
    assert answer.headers["RateLimit-Policy"] == '"free";q=5;w=60'
    assert answer.headers["RateLimit"] == '"free";r=4;t=60'
    assert answer.headers["X-RateLimit-Limit"] == "5"
    assert answer.headers["X-RateLimit-Remaining"] == "4"
    assert answer.headers["X-RateLimit-Reset"] == "60"
    assert "Retry-After" not in answer.headers
    refused = run(client, options={"no_such": 1})
    assert (refused.status_code, left(refused)) == (400, 3)
    assert not [
        name for name, _ in client.get("/crane/models").headers if "ratelimit" in name.lower()
    ]


def test_of_two_limits_the_older_headers_tell_the_one_that_is_nearer(metered):
    client = metered("free 5/minute budget=7/day")
    answers = [run(client) for _ in range(2)]
    assert answers[0].headers["RateLimit-Policy"] == '"free";q=5;w=60, "free-budget";q=7;w=86400'
    assert answers[0].headers["RateLimit"] == '"free";r=4;t=60, "free-budget";r=6;t=86400'
    assert answers[0].headers["X-RateLimit-Limit"] == "5"
    client = metered("free 5/minute budget=3/day")
    assert run(client).headers["X-RateLimit-Limit"] == "3"


def test_a_refusal_says_which_limit_it_was_and_when_to_come_back(metered):
    client = metered("free 2/second")
    while (refused := run(client)).status_code == 200:
        pass
    assert refused.status_code == 429
    assert refused.json["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert refused.json["error"]["details"] == {"limit": "rate", "tier": "free"}
    message = refused.json["error"]["message"]
    assert message == "The rate of the tier 'free', 2 per second, is spent; try again in 1 s."
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers["RateLimit"] == '"free";r=0;t=1'
    time.sleep(1)
    assert run(client).status_code == 200


def test_the_budget_of_a_day_is_named(metered):
    client = metered("free 9/minute budget=2/day")
    refused = [run(client) for _ in range(3)][-1]
    assert refused.json["error"]["details"] == {"limit": "budget", "tier": "free"}
    assert refused.headers["Retry-After"] == "86400"
    assert "2 per day" in refused.json["error"]["message"]


def test_so_many_calls_run_at_once_and_a_place_is_free_when_one_has_ended(metered):
    client = metered("free 100/minute concurrency=2")
    held = [
        threading.Thread(target=run, args=(client,), kwargs={"options": {"delay_ms": 700}})
        for _ in range(2)
    ]
    for thread in held:
        thread.start()
    deadline = time.monotonic() + 5
    while client.get("/crane/quota").json["concurrency"]["running"] < 2:
        assert time.monotonic() < deadline
    refused = run(client)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json["error"]["code"] == "CONCURRENCY_LIMIT_EXCEEDED"
    assert refused.json["error"]["details"] == {"limit": "concurrency", "tier": "free"}
    assert left(refused) == 98
    for thread in held:
        thread.join()
    for _ in range(5):
        assert run(client).status_code == 200


@pytest.fixture
def running(tmp_path):
    """Says how many calls of a caller run, as another process finds it."""
    store = SqliteStore(tmp_path / "data" / "quota.db")
    yield lambda: store.look("address:127.0.0.1", Config().tiers["free"]).running
    store.close()


def test_a_call_has_ended_when_it_is_answered_where_its_caller_has_few_places(metered, running):
    clients = [metered("free 60/minute concurrency=32") for _ in range(2)]
    for client in clients * 2:
        assert run(client).status_code == 200
        assert running() == 0


def test_it_has_soon_after_where_its_caller_has_many(metered, running):
    clients = [metered("free 60/minute concurrency=33") for _ in range(2)]
    for client in clients * 2:
        assert run(client).status_code == 200
        wait_for(lambda: running() == 0)


def test_it_has_with_what_its_caller_does_next(metered, running, monkeypatch):
    monkeypatch.setattr("backend.quota.failover.END_WITHIN_S", 60)
    client = metered("free 60/minute concurrency=60")
    for _ in range(3):
        assert (run(client).status_code, running()) == (200, 1)
    assert client.get("/crane/quota").json["concurrency"]["running"] == running() == 0


@pytest.mark.parametrize("ends_within_s", [0.01, 60])
def test_what_has_not_ended_yet_ends_with_the_service(
    make_app, running, monkeypatch, ends_within_s
):
    monkeypatch.setattr("backend.quota.failover.END_WITHIN_S", ends_within_s)
    app = make_app(quota="on")
    assert run(app.test_client()).status_code == 200
    wait_for(lambda: running() == (ends_within_s == 60))
    started = time.monotonic()
    app.extensions["crane"].meter.close()
    assert running() == 0
    assert time.monotonic() - started < CLOSE_WAIT_S


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_a_caller_is_not_in_its_own_way(gunicorn, concurrency):
    tiers = f"free 100000/minute concurrency={concurrency}"
    server = gunicorn(CRANE_QUOTA="on", CRANE_TIERS=tiers, CRANE_WORKERS=2)

    def calls(_):
        return {server.run()[0] for _ in range(100)}

    with ThreadPoolExecutor(concurrency) as threads:
        assert list(threads.map(calls, range(concurrency))) == [{200}] * concurrency


def test_a_caller_is_told_its_tier_its_limits_and_what_is_left(metered):
    client = metered("free 5/minute concurrency=4 budget=9/day")
    run(client)
    quota = client.get("/crane/quota").json
    resets = [limit.pop("reset_s") for limit in quota["limits"]]
    assert quota == {
        "tier": "free",
        "key_id": None,
        "models": None,
        "metered": True,
        "limits": [
            {"name": "rate", "units": 5, "window_s": 60, "left": 4},
            {"name": "budget", "units": 9, "window_s": 86_400, "left": 8},
        ],
        "concurrency": {"limit": 4, "running": 0},
    }
    assert 58 < resets[0] <= 60
    assert 86_398 < resets[1] <= 86_400


def test_without_quotas_nothing_is_counted(make_app, tmp_path):
    client = make_app(quota="off", tiers=FREE).test_client()
    answers = [run(client) for _ in range(10)]
    assert {answer.status_code for answer in answers} == {200}
    assert "RateLimit" not in answers[0].headers
    assert client.get("/crane/quota").json["metered"] is False
    assert "quota" not in client.get("/readyz").json
    assert not (tmp_path / "data" / "quota.db").exists()


def test_addresses_are_callers_of_their_own(metered):
    client = metered(auth="off")
    for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:0:1::1"):
        answer = client.post(
            "/crane/run",
            json={"model_id": "echo", "input": 1},
            environ_base={"REMOTE_ADDR": address},
        )
        assert left(answer) == 4
    same = {"192.0.2.1": 3, "::ffff:192.0.2.1": 2, "2001:db8::ffff:1": 3, "2001:db8:0:1:2::3": 3}
    for address, remaining in same.items():
        answer = client.post(
            "/crane/run",
            json={"model_id": "echo", "input": 1},
            environ_base={"REMOTE_ADDR": address},
        )
        assert left(answer) == remaining, address


@pytest.mark.parametrize(
    ("proxies", "forwarded", "caller"),
    [
        (0, "192.0.2.7", "127.0.0.1"),
        (1, "192.0.2.7", "192.0.2.7"),
        (1, "192.0.2.66, 192.0.2.7", "192.0.2.7"),
        (2, "192.0.2.66, 192.0.2.7, 192.0.2.8", "192.0.2.7"),
        (2, "192.0.2.7", "127.0.0.1"),
        (1, "no address <script>", "unknown"),
    ],
)
def test_a_forwarded_address_counts_only_from_proxies_that_are_trusted(
    metered, proxies, forwarded, caller
):
    client = metered(trusted_proxies=proxies, auth="off")
    client.post(
        "/crane/run",
        json={"model_id": "echo", "input": 1},
        headers={"X-Forwarded-For": forwarded},
    )
    meter = client.application.extensions["crane"].meter
    standing = meter.look(f"address:{caller}", tiers("free 5/minute")["free"])
    assert standing.left == (4000,)


def test_every_refusal_is_counted(metered):
    client = metered("free 2/minute")

    def counted():
        shown = r'crane_quota_refusals_total{limit="rate",tier="free"} (\S+)'
        return sum(map(float, re.findall(shown, client.get("/metrics").text)))

    before = counted()
    for _ in range(5):
        run(client)
    assert counted() - before == 3


# With real workers, and a real Redis.


def test_four_workers_let_in_exactly_what_the_rate_says(gunicorn):
    server = gunicorn(CRANE_WORKERS=4, CRANE_QUOTA="on")
    at_once = threading.Barrier(200)

    def call(number):
        at_once.wait(30)
        return server.run()[0]

    with ThreadPoolExecutor(200) as threads:
        statuses = list(threads.map(call, range(200)))
    assert (statuses.count(200), statuses.count(429)) == (60, 140)


@pytest.fixture
def valkey():
    server = Valkey().start()
    yield server
    server.remove()


def test_four_workers_let_in_exactly_what_the_rate_says_on_redis(gunicorn, valkey):
    server = gunicorn(CRANE_WORKERS=4, CRANE_QUOTA="on", CRANE_REDIS_URL=valkey.url)
    with ThreadPoolExecutor(50) as threads:
        statuses = list(threads.map(lambda _: server.run()[0], range(200)))
    assert (statuses.count(200), statuses.count(429)) == (60, 140)
    assert len(valkey.client().keys("crane:quota:*")) == 1


wait_for = partial(serving.wait_for, every_s=0.05)


def test_a_killed_workers_leases_end_by_themselves(gunicorn):
    server = gunicorn(
        CRANE_QUOTA="on", CRANE_TIERS="free 1000/minute concurrency=3", CRANE_REQUEST_TIMEOUT="2s"
    )
    calls = ThreadPoolExecutor(3)

    def held():
        with contextlib.suppress(OSError):  # its worker is killed
            server.run(options={"delay_ms": 60_000})

    began = time.monotonic()
    for _ in range(3):
        calls.submit(held)

    def running():
        return server.get("/crane/quota")[1]["concurrency"]["running"]

    wait_for(lambda: running() == 3)
    [worker] = server.http_workers()
    worker.kill()
    killed = time.monotonic()
    calls.shutdown()
    wait_for(lambda: len(server.http_workers()) == 1 and server.get("/livez")[0] == 200)
    assert running() == 3
    assert server.run()[1]["error"]["code"] == "CONCURRENCY_LIMIT_EXCEEDED"
    wait_for(lambda: running() == 0, timeout_s=25)
    # A body may take 2 s to come, and then its call 2 s; no lease ends before its call.
    assert time.monotonic() - began > 2 * 2 + 15
    assert time.monotonic() - killed < 2 * 2 + 15 + 2
    assert server.run()[0] == 200
