"""Quotas through the caller's door: what is let in, what it costs, and what the headers say."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from backend.adapters.base import Prediction
from backend.adapters.echo import Echo
from backend.config import Config
from backend.quota.sqlite import SqliteStore
from backend.quota.tiers import tiers
from backend.schemas import Integer
from backend.tasks import TASKS
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
    assert (refused.status_code, left(refused)) == (400, 4)
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


def running(store):
    return store.look("address:127.0.0.1", Config().tiers["free"]).running


def test_leases_end_soon_after_their_answers_whoever_calls_next(metered, tmp_path):
    clients = [metered() for _ in range(2)]
    store = SqliteStore(tmp_path / "data" / "quota.db")
    for client in clients * 2:
        assert run(client).status_code == 200
        wait_for(lambda: running(store) == 0)
    store.close()


def test_what_has_not_ended_yet_ends_with_the_service(make_app, tmp_path, monkeypatch):
    app = make_app(quota="on")
    monkeypatch.setattr("backend.meter.END_WITHIN_S", 1)
    assert run(app.test_client()).status_code == 200
    store = SqliteStore(tmp_path / "data" / "quota.db")
    assert running(store) == 1
    app.extensions["crane"].meter.close()
    assert running(store) == 0
    store.close()


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_a_caller_is_not_in_its_own_way(gunicorn, concurrency):
    tiers = f"free 100000/minute concurrency={concurrency}"
    server = gunicorn(CRANE_QUOTA="on", CRANE_TIERS=tiers, CRANE_WORKERS=2)

    def calls(_):
        return {server.run()[0] for _ in range(100)}

    with ThreadPoolExecutor(concurrency) as threads:
        assert list(threads.map(calls, range(concurrency))) == [{200}] * concurrency


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"{", id="no-json"),
        pytest.param(b"[]", id="no-object"),
        pytest.param(b'{"model_id": "echo"}', id="no-input"),
        pytest.param(b'{"model_id": "nobody", "input": 1}', id="no-such-model"),
        pytest.param(b'{"model_id": "echo", "input": 1, "options": {"x": 1}}', id="option"),
        pytest.param(b'{"model_id": "echo", "input": 1, "options": []}', id="options"),
        pytest.param(b'{"model_id": "echo", "input": []}', id="empty-batch"),
    ],
)
def test_a_malformed_call_costs_nothing(metered, body):
    client = metered()
    for _ in range(10):
        answer = client.post("/crane/run", data=body, content_type="application/json")
        assert answer.status_code in (400, 404)
    assert client.get("/crane/quota").json["limits"][0]["left"] == 5
    assert left(run(client)) == 4


class Breaks(Echo):
    def predict(self, batch):
        raise RuntimeError("of our own making")


class DoesNotLoad(Echo):
    def load(self):
        raise RuntimeError("of our own making")


@pytest.mark.parametrize(("adapter", "status"), [(Breaks, 500), (DoesNotLoad, 503), (Echo, 504)])
def test_a_call_that_fails_by_our_fault_is_given_back(metered, add_task, adapter, status):
    entry = add_task("fails", adapter)
    client = metered(entries=[ECHO, entry], request_timeout_s=0.5)
    options = {"delay_ms": 5000} if adapter is Echo else {}
    for _ in range(7):
        answer = run(client, "fails", options=options)
        assert answer.status_code == status
        assert left(answer) == 5
    quota = client.get("/crane/quota").json
    assert quota["concurrency"]["running"] == 0


def test_a_failure_nobody_foresaw_is_given_back_too(metered, monkeypatch):
    client = metered()
    monkeypatch.setattr("backend.models.facts", lambda *args, **kwargs: 1 / 0)
    answer = run(client)
    assert (answer.status_code, left(answer)) == (500, 5)


@pytest.fixture
def counter(add_task):
    """A model that says it used what its options ask for."""

    class Counting(type(TASKS["echo"].options())):
        num_images = Integer(low=1, high=100, load_default=1)
        max_tokens = Integer(low=1, high=100_000, load_default=500)
        used_tokens = Integer(low=0, high=100_000, load_default=0)
        seconds = Integer(low=0, high=100_000, load_default=0)
        duration = Integer(low=1, high=1000, load_default=None, allow_none=True)

    class Counter(Echo):
        def predict(self, batch):
            options = batch.options
            usage = {"images": options["num_images"], "audio_seconds": options["seconds"]}
            usage |= {"input_tokens": 0, "output_tokens": options["used_tokens"]}
            return [Prediction(said.output, usage) for said in super().predict(batch)]

    return add_task("counter", Counter, Counting)


@pytest.mark.parametrize(
    ("cost", "options", "inputs", "units"),
    [
        pytest.param(7, {}, 1, 7, id="number"),
        pytest.param(0, {}, 1, 0, id="free"),
        pytest.param(2, {}, 3, 2, id="a-batch-is-one-request"),
        pytest.param({"per_image": 2}, {"num_images": 3}, 1, 6, id="pictures"),
        pytest.param({"per_image": 2}, {}, 4, 8, id="pictures-of-a-batch"),
        pytest.param({"per_1k_tokens": 4}, {"used_tokens": 250}, 1, 1, id="tokens"),
        pytest.param({"per_1k_tokens": 0.1}, {"used_tokens": 1}, 1, 0.001, id="rounded-up"),
        pytest.param({"per_audio_minute": 6}, {"seconds": 30}, 1, 3, id="sound"),
        pytest.param({"per_audio_minute": 6}, {"seconds": 300}, 1, 30, id="more-than-reserved"),
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
    client = metered("free 100/minute", [{**counter, "cost": cost}])
    answer = run(client, "counter", ["hi"] * inputs if inputs > 1 else "hi", options=options)
    assert answer.status_code == 200, answer.json
    remaining = client.get("/crane/quota").json["limits"][0]["left"]
    assert remaining == pytest.approx(100 - units)
    assert left(answer) == math.floor(100 - units)


def test_what_a_call_may_come_to_is_held_while_it_runs(metered, counter):
    entry = {**counter, "cost": {"per_1k_tokens": 10, "per_image": 5}}
    client = metered("free 100/minute", [entry])
    # Nine times 10 and twice 5: all there is.
    options = {"max_tokens": 9000, "num_images": 2, "delay_ms": 800}
    thread = threading.Thread(target=run, args=(client, "counter"), kwargs={"options": options})
    thread.start()
    deadline = time.monotonic() + 5
    while client.get("/crane/quota").json["limits"][0]["left"] > 0:
        assert time.monotonic() < deadline
    refused = run(client, "counter", options={"max_tokens": 1})
    assert refused.json["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    thread.join()
    assert client.get("/crane/quota").json["limits"][0]["left"] == 90


def test_the_models_own_defaults_are_held_where_nothing_is_asked_for(metered, counter):
    entry = {**counter, "cost": {"per_1k_tokens": 10}, "options": {"max_tokens": 20_000}}
    refused = run(metered("free 100/minute", [entry]), "counter")
    assert (refused.status_code, refused.json["error"]["code"]) == (403, "FORBIDDEN")
    assert "up to 200 units" in refused.json["error"]["message"]


@pytest.mark.parametrize(
    ("cost", "inputs", "options", "units"),
    [
        ({"per_image": 30}, 4, {}, 120),
        ({"per_image": 30}, 2, {"num_images": 2}, 120),
        ({"per_1k_tokens": 100}, 3, {"max_tokens": 400}, 120),
        ({"per_audio_minute": 60}, 2, {}, 120),
        ({"per_audio_minute": 60}, 1, {"duration": 120}, 120),
        ({"per_audio_minute": 30, "per_request": 105}, 1, {"duration": 30}, 120),
    ],
)
def test_what_is_held_is_the_most_that_a_call_may_come_to(
    metered, counter, cost, inputs, options, units
):
    client = metered("free 100/minute", [{**counter, "cost": cost}])
    refused = run(client, "counter", ["hi"] * inputs if inputs > 1 else "hi", options=options)
    assert refused.status_code == 403
    assert f"costs up to {units} units" in refused.json["error"]["message"]
    assert client.get("/crane/quota").json["limits"][0]["left"] == 100


def test_who_has_nothing_left_is_refused_though_nothing_is_known_of_the_cost(metered):
    client = metered(
        "free 1/minute", [ECHO, {**ECHO, "id": "by-tokens", "cost": {"per_1k_tokens": 1}}]
    )
    assert run(client, "by-tokens").status_code == 200
    assert run(client).status_code == 200
    assert run(client, "by-tokens").status_code == 429


@pytest.mark.parametrize("wrong", ["many", -5, 1e308, True, None, [1]])
def test_what_is_held_is_not_led_astray_by_wrong_options(metered, counter, wrong):
    entry = {**counter, "cost": {"per_1k_tokens": 1, "per_request": 1}}
    client = metered("free 100/minute", [entry])
    answer = run(client, "counter", options={"max_tokens": wrong})
    assert answer.status_code == 400
    assert client.get("/crane/quota").json["limits"][0]["left"] == 100


def test_who_has_overdrawn_waits_until_it_is_paid(metered, counter):
    entry = {**counter, "cost": {"per_audio_minute": 3}}
    client = metered("free 10/minute", [entry, ECHO])
    assert run(client, "counter", options={"seconds": 600}).status_code == 200
    assert run(client).status_code == 429


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


class Load:
    """Callers that never stop, until told; what they were answered, and how long each took."""

    def __init__(self, server, callers=8):
        self.answers = []
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(server,)) for _ in range(callers)
        ]

    def _call(self, server):
        while not self._done.is_set():
            started = time.monotonic()
            status, _ = server.run()
            self.answers.append((started, status, time.monotonic() - started))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *args):
        self._done.set()
        for thread in self._threads:
            thread.join(60)

    def for_seconds(self, seconds):
        """The statuses and the longest time of the calls that begin in the next seconds."""
        begin = time.monotonic()
        time.sleep(seconds)
        calls = [answer for answer in self.answers if answer[0] >= begin]
        return {status for _, status, _ in calls}, max(took for _, _, took in calls)


wait_for = partial(serving.wait_for, every_s=0.05)


WIDE = "free 1000000/second concurrency=1000"


@pytest.mark.parametrize("way", ["killed", "stalled"])
def test_redis_may_go_and_come_back_and_no_call_fails_or_waits(gunicorn, valkey, way):
    server = gunicorn(
        CRANE_WORKERS=2, CRANE_QUOTA="on", CRANE_REDIS_URL=valkey.url, CRANE_TIERS=WIDE
    )

    def away():
        return server.get("/readyz")[1]["quota"]["away"]

    with Load(server) as load:
        statuses, usual = load.for_seconds(1)
        assert statuses == {200}
        valkey.kill() if way == "killed" else valkey.stall()
        statuses, longest = load.for_seconds(2)
        assert statuses == {200}
        assert longest < usual + 0.5
        wait_for(away)
        valkey.start() if way == "killed" else valkey.go_on()
        statuses, longest = load.for_seconds(2)
        assert statuses == {200}
        assert longest < usual + 0.5
    wait_for(lambda: not any(away() for _ in range(10)))
    lost = server.log_lines(logger="crane.quota", level="ERROR")
    back = server.log_lines(logger="crane.quota", level="WARNING")
    assert 1 <= len(lost) <= 2  # one of each worker, at most
    assert len(back) == len(lost)
    assert "socket" not in server.log()  # nothing of the URL
    _, _, page = server.request("GET", "/metrics")
    assert 'crane_quota_away_decisions_total{policy="local"}' in page.decode()


def test_limits_are_held_while_redis_is_away_and_after(gunicorn, valkey):
    server = gunicorn(CRANE_WORKERS=2, CRANE_QUOTA="on", CRANE_REDIS_URL=valkey.url)
    assert [server.run()[0] for _ in range(61)].count(200) == 60
    valkey.kill()
    # This host knows nothing of what was spent there.
    assert [server.run()[0] for _ in range(100)].count(200) == 60
    valkey.start()

    def away(_):
        return server.get("/readyz")[1]["quota"]["away"]

    # One after another, all may be answered by the same worker, which is back before the other.
    with ThreadPoolExecutor(16) as pool:
        wait_for(lambda: not any(pool.map(away, range(64))))
    assert [server.run()[0] for _ in range(61)].count(200) == 60
    valkey.client().flushall()
    valkey.client().script_flush()
    assert [server.run()[0] for _ in range(61)].count(200) == 60


@pytest.mark.parametrize(("policy", "statuses"), [("allow", {200}), ("deny", {503})])
def test_what_happens_without_redis_is_a_setting(metered, policy, statuses, capsys):
    client = metered(
        "free 2/minute", redis_url="unix:///nowhere/redis.sock", quota_on_outage=policy
    )
    answers = [run(client) for _ in range(5)]
    assert {answer.status_code for answer in answers} == statuses
    assert client.get("/readyz").json["quota"] == {"store": "redis", "away": True}
    assert "nowhere" not in capsys.readouterr().err
    if policy == "deny":
        assert answers[0].json["error"]["code"] == "QUOTA_UNAVAILABLE"
        assert answers[0].headers["Retry-After"] == "1"
        assert client.get("/crane/models").status_code == 200


@pytest.mark.parametrize("policy", ["local", "allow", "deny"])
def test_a_call_that_was_let_in_is_answered_though_redis_went_away(metered, valkey, policy):
    settings = {"redis_url": valkey.url, "quota_on_outage": policy}
    client = metered("free 9/minute", **settings)
    answers = []

    def call():
        answers.append(run(client, options={"delay_ms": 800}).status_code)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: client.get("/crane/quota").json["concurrency"]["running"] == 1)
    valkey.kill()
    thread.join()
    assert answers == [200]


def test_a_file_that_cannot_be_written_does_not_fail_calls(metered, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quota.db").write_bytes(
        b"not a database, and long enough to be read as one" * 40
    )
    client = metered("free 2/minute")
    assert {run(client).status_code for _ in range(5)} == {200}
    assert capsys.readouterr().err.count("quotas cannot be kept in") == 1


def test_a_killed_workers_leases_end_by_themselves(gunicorn):
    server = gunicorn(
        CRANE_QUOTA="on", CRANE_TIERS="free 1000/minute concurrency=3", CRANE_REQUEST_TIMEOUT="2s"
    )
    calls = ThreadPoolExecutor(3)

    def held():
        with contextlib.suppress(OSError):  # its worker is killed
            server.run(options={"delay_ms": 60_000})

    for _ in range(3):
        calls.submit(held)

    def running():
        return server.get("/crane/quota")[1]["concurrency"]["running"]

    wait_for(lambda: running() == 3)
    [worker] = server.http_workers()
    worker.kill()
    started = time.monotonic()
    calls.shutdown()
    wait_for(lambda: len(server.http_workers()) == 1 and server.get("/livez")[0] == 200)
    assert running() == 3
    assert server.run()[1]["error"]["code"] == "CONCURRENCY_LIMIT_EXCEEDED"
    wait_for(lambda: running() == 0, timeout_s=25)
    assert time.monotonic() - started < 2 + 15 + 2
    assert server.run()[0] == 200
