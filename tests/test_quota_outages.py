"""Stores of quotas that are slow, away or broken, with real ones of each kind."""

from __future__ import annotations

import json
import resource
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest

from backend import logs
from backend.held_bodies import SMALL
from backend.quota.decisions import Call
from backend.quota.failover import END_WITHIN_S, Failover, QuotaAway, WatchedStore
from backend.quota.memory import MemoryStore
from backend.quota.redis import ANSWER_TIMEOUT_S
from backend.quota.tiers import UNIT, tiers
from tests import serving
from tests.conftest import ECHO, run
from tests.valkey import Valkey

ADDRESS = "address:127.0.0.1"


@pytest.fixture
def metered(make_app):
    """An app that holds callers to a tier: ``metered("free 5/minute", [entry, …])``."""

    def make(text="free 20/minute", entries=(ECHO,), **settings):
        settings = {"quota": "on", "tiers": tiers(text), "workers": 1} | settings
        return make_app(entries, **settings).test_client()

    return make


@pytest.fixture
def valkey():
    server = Valkey().start()
    yield server
    server.remove()


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
        # An answer is waited for, but once.
        assert longest < usual + ANSWER_TIMEOUT_S * (2 if way == "stalled" else 1)
        wait_for(away)
        valkey.start() if way == "killed" else valkey.go_on()
        statuses, longest = load.for_seconds(2)
        assert statuses == {200}
        assert longest < usual + ANSWER_TIMEOUT_S
    wait_for(lambda: not any(away() for _ in range(10)))
    lost = server.log_lines(logger="crane.quota", level="ERROR")
    back = server.log_lines(logger="crane.quota", level="WARNING")
    assert 1 <= len(lost) <= 2  # one of each worker, at most
    assert len(back) == len(lost)
    assert "unix:" not in server.log()  # nothing of the URL
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
    known = client.get("/readyz")
    assert known.json["quota"] == {"store": "redis", "away": True, "decided_by": policy}
    assert known.status_code == (503 if policy == "deny" else 200)
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


# The host's own file.


@contextmanager
def locked(folder):
    """Another process holds the file, as a backup may, or a disk that does not answer."""
    other = sqlite3.connect(folder / "quota.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.close()


@contextmanager
def full(folder):
    """The file cannot grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (folder / "quota.db-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


POLICIES = [("local", {200, 429}), ("allow", {200}), ("deny", {503})]


@pytest.mark.parametrize("broken", [locked, full])
@pytest.mark.parametrize(("policy", "statuses"), POLICIES)
def test_a_file_that_cannot_be_written_is_an_outage_too(
    metered, tmp_path, broken, policy, statuses, capsys
):
    client = metered(quota_on_outage=policy)
    assert run(client).status_code == 200
    with broken(tmp_path / "data"):
        answers = [run(client) for _ in range(40)]
        assert {answer.status_code for answer in answers} == statuses
        if policy == "local":  # this process's own memory, which knows nothing of the call before
            assert [answer.status_code for answer in answers].count(200) == 20
        known = client.get("/readyz")
        decided_by = "memory" if policy == "local" else policy
        assert known.json["quota"] == {"store": "sqlite", "away": True, "decided_by": decided_by}
        assert (known.status_code, len(known.json["reasons"])) == (
            (503, 1) if policy == "deny" else (200, 0)
        )
    wait_for(lambda: not client.get("/readyz").json["quota"]["away"])
    assert run(client).headers["X-RateLimit-Remaining"] == "18"
    log = capsys.readouterr().err
    assert (log.count("cannot be kept in sqlite"), log.count("kept in sqlite again")) == (1, 1)


@pytest.mark.parametrize("kind", ["garbage", "folder"])
@pytest.mark.parametrize(("policy", "statuses"), POLICIES)
def test_so_is_one_that_is_no_database(metered, tmp_path, kind, policy, statuses):
    path = tmp_path / "data" / "quota.db"
    path.parent.mkdir()
    path.write_bytes(b"not a database, and long enough to be read as one" * 40)
    if kind == "folder":
        path.unlink()
        path.mkdir()
    client = metered(quota_on_outage=policy)
    assert {run(client).status_code for _ in range(40)} == statuses
    path.rmdir() if kind == "folder" else path.unlink()
    wait_for(lambda: not client.get("/readyz").json["quota"]["away"])
    assert run(client).headers["X-RateLimit-Remaining"] == "19"


def test_while_the_file_is_locked_all_workers_together_let_in_what_the_rate_says(gunicorn):
    server = gunicorn(CRANE_WORKERS=2, CRANE_QUOTA="on", CRANE_TIERS="free 20/minute")
    assert server.run()[0] == 200
    with locked(server.data_dir), ThreadPoolExecutor(16) as pool:
        started = time.monotonic()
        statuses = list(pool.map(lambda _: server.run()[0], range(100)))
        took = time.monotonic() - started
    # Each worker its half; but a worker that nobody calls lets nobody in.
    assert set(statuses) == {200, 429}
    assert 10 <= statuses.count(200) <= 20
    assert took < 5  # and not a busy time-out for each of them, one after another


# A server that is slow, and answers that are lost.


class Proxy:
    """A TCP port before a Valkey: its answers are ``delay_s`` late, and the next may be lost."""

    def __init__(self, valkey):
        self.delay_s = 0.0
        self.loses_next = False
        self._path = f"{valkey.folder}/socket"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                far = socket.socket(socket.AF_UNIX)
                self._sockets.append(far)
                far.connect(self._path)
            except OSError:
                return
            for pair in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source, sink, answers):
        try:
            while data := source.recv(65536):
                if answers:
                    time.sleep(self.delay_s)
                if answers and self.loses_next:
                    self.loses_next = False
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)  # which ends its thread's wait
        self._acceptor.join(30)
        for end in self._sockets:
            end.close()


@pytest.fixture
def proxy(valkey):
    server = Proxy(valkey)
    yield server
    server.close()


def test_a_slow_redis_is_no_outage(gunicorn, proxy):
    proxy.delay_s = 0.2
    settings = {"CRANE_WORKERS": 2, "CRANE_REDIS_URL": proxy.url}
    server = gunicorn(CRANE_QUOTA="on", CRANE_TIERS="free 100/hour", **settings)
    with ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(lambda _: server.run()[0], range(120)))
    assert (statuses.count(200), statuses.count(429)) == (100, 20)
    assert server.log_lines(logger="crane.quota", level="ERROR") == []


def test_a_redis_that_accepts_no_connection_is_away(metered):
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # until no more are queued, and others wait for ever
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        client = metered(redis_url=f"redis://127.0.0.1:{port}")
        started = time.monotonic()
        answer = run(client)
        assert time.monotonic() - started < 15  # a kernel goes on for minutes
        assert (answer.status_code, answer.headers["X-RateLimit-Remaining"]) == (200, "19")
        assert client.get("/readyz").json["quota"]["decided_by"] == "sqlite"


def test_what_a_late_answer_has_spent_is_given_back(metered, proxy, valkey):
    client = metered(redis_url=proxy.url)
    assert run(client).headers["X-RateLimit-Remaining"] == "19"
    proxy.delay_s = ANSWER_TIMEOUT_S + 0.2
    assert run(client).headers["X-RateLimit-Remaining"] == "19"  # of this host's own file
    assert client.get("/readyz").json["quota"] == {
        "store": "redis",
        "away": True,
        "decided_by": "sqlite",
    }
    proxy.delay_s = 0.0
    wait_for(lambda: not client.get("/readyz").json["quota"]["away"])
    quota = client.get("/crane/quota").json
    assert (quota["limits"][0]["left"], quota["concurrency"]["running"]) == (19, 0)


@pytest.mark.parametrize("lost", ["spend", "settle"])
def test_a_step_whose_answer_is_lost_is_not_done_twice(metered, proxy, lost):
    client = metered(redis_url=proxy.url)
    run(client)
    proxy.loses_next = lost == "spend"
    running = threading.Thread(target=run, args=(client,), kwargs={"options": {"delay_ms": 500}})
    running.start()
    wait_for(lambda: client.get("/crane/quota").json["concurrency"]["running"] == 1)
    proxy.loses_next = lost == "settle"
    running.join()
    quota = client.get("/crane/quota").json
    assert (quota["limits"][0]["left"], quota["concurrency"]["running"]) == (18, 0)
    assert not proxy.loses_next
    assert not client.get("/readyz").json["quota"]["away"]


@pytest.mark.parametrize(("cost", "left"), [(0, 20), (1, 19), (5, 15)])
def test_what_ends_while_redis_is_away_is_settled_when_it_is_back(metered, valkey, cost, left):
    client = metered(entries=[{**ECHO, "cost": cost}], redis_url=valkey.url)
    running = threading.Thread(target=run, args=(client,), kwargs={"options": {"delay_ms": 500}})
    running.start()
    # By then all that it may cost is reserved.
    wait_for(lambda: client.get("/crane/models/echo").json["running"])
    valkey.stall()
    running.join()
    valkey.go_on()
    wait_for(lambda: not client.get("/readyz").json["quota"]["away"])
    quota = client.get("/crane/quota").json
    assert (quota["limits"][0]["left"], quota["concurrency"]["running"]) == (left, 0)


class Odd(MemoryStore):
    """A store in which a call cannot be settled for a reason that nobody foresaw."""

    name = "odd"

    def settle(self, call, cost):
        if call.lease == "a":
            raise RuntimeError("unforeseen")
        return super().settle(call, cost)


def test_the_thread_that_ends_leases_outlives_whatever_it_finds(capsys):
    logs.set_up("INFO", "json")
    watched = WatchedStore(Odd())
    tier = tiers("free 5/minute")["free"]
    for lease in "abc":
        call = Call("someone", tier, lease, UNIT, 45_000)
        watched.spend(call)
        watched.end(call)
        time.sleep(2 * END_WITHIN_S)
    wait_for(lambda: watched.store.look("someone", tier).running == 1)
    assert "a lease could not be ended in odd" in capsys.readouterr().err
    watched.close()


# The thread that looks for a store that is away.


class Flaky(MemoryStore):
    """A store that fails at each step, until it is mended."""

    name = "flaky"
    errors = (ConnectionError,)

    def __init__(self, *found):
        super().__init__()
        self.found = list(found)
        self.broken = True

    def _step(self, subject, decide):
        if self.broken:
            raise ConnectionError
        return super()._step(subject, decide)

    def ping(self):
        if self.found:
            raise self.found.pop(0)
        self.broken = False


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "flaky watch"]


@pytest.mark.parametrize(
    "error", [ConnectionError(), RuntimeError("unforeseen"), MemoryError(), ValueError("odd")]
)
def test_whatever_is_found_the_store_is_looked_at_until_it_is_back(error, monkeypatch):
    monkeypatch.setattr("backend.quota.failover.PROBE_S", 0.01)
    changes = []
    watched = WatchedStore(Flaky(error, error, error), changes.append)
    call = Call("someone", tiers("free 5/minute")["free"], "a", UNIT, 1000)
    with pytest.raises(QuotaAway):
        watched.spend(call)
    wait_for(lambda: not watched.away)
    assert changes == [True, False]
    wait_for(lambda: not watchers())
    assert watched.spend(call).left == (4000,)
    watched.close()


def test_leases_that_were_to_end_in_a_store_that_is_away_end_when_it_is_back(monkeypatch):
    monkeypatch.setattr("backend.quota.failover.PROBE_S", 0.01)
    monkeypatch.setattr("backend.quota.failover.END_WITHIN_S", 60)
    store = Flaky(*[ConnectionError()] * 1000)
    store.broken = False
    watched = WatchedStore(store)
    tier = tiers("free 9/minute")["free"]
    first, second, third, fourth = (Call("someone", tier, lease, UNIT, 45_000) for lease in "abcd")
    watched.spend(first)
    watched.spend(second)
    watched.end(first)
    store.broken = True
    with pytest.raises(QuotaAway):  # as the store is found to be away
        watched.spend(third)
    watched.end(second)
    with pytest.raises(QuotaAway):  # without asking it
        watched.spend(fourth)
    store.found.clear()
    wait_for(lambda: not watched.away)
    assert (store.look("someone", tier).running, store.look("someone", tier).left) == (0, (7000,))
    watched.close()


def test_the_thread_that_looks_ends_with_the_service(monkeypatch):
    monkeypatch.setattr("backend.quota.failover.PROBE_S", 60)
    watched = WatchedStore(Flaky())
    with pytest.raises(QuotaAway):
        watched.look("someone", tiers("free 5/minute")["free"])
    assert len(watchers()) == 1
    watched.close()
    assert watchers() == []


# What is to be put right once a store is back.


class Away(MemoryStore):
    """A store whose steps fail, or whose answers are lost, for as long as it is told to."""

    name = "flaky"
    errors = (ConnectionError,)
    how = ""
    failures = 0  # of the steps to come, though it can be reached

    def _step(self, subject, decide):
        if self.failures or self.how == "fails":
            self.failures = max(0, self.failures - 1)
            raise ConnectionError
        decision = super()._step(subject, decide)
        if self.how == "loses":
            raise ConnectionError
        return decision

    def ping(self):
        if self.how:
            raise ConnectionError


FREE = tiers("free 9/minute")["free"]
HELD = Call("someone", FREE, "a", 2 * UNIT, 60_000)
STEPS = {
    "spend": (lambda store: store.spend(replace(HELD, lease="b")), (7000, 1)),
    "settle": (lambda store: store.settle(HELD, 6 * UNIT), (3000, 0)),
}


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize("how", ["fails", "loses", "is known to be away"])
@pytest.mark.parametrize("step", STEPS)
def test_whatever_became_of_a_step_it_is_put_right_once(step, how, failures, monkeypatch):
    """Who has no answer goes on elsewhere, and so holds nothing here; what has ended is paid."""
    monkeypatch.setattr("backend.quota.failover.PROBE_S", 0.01)
    store = Away()
    watched = WatchedStore(store)
    take, standing = STEPS[step]
    watched.spend(HELD)
    store.how = how
    if how not in ("fails", "loses"):
        store.how = "fails"
        with pytest.raises(QuotaAway):
            watched.look("someone", FREE)
    with pytest.raises(QuotaAway):
        take(watched)
    assert len(watchers()) == 1
    store.how, store.failures = "", failures
    wait_for(lambda: not watched.away)
    store.failures = 0  # where nothing was to be put right
    found = watched.look("someone", FREE)
    assert (*found.left, found.running) == standing
    watched.close()


@pytest.mark.parametrize("how", ["fails", "loses", "is known to be away"])
@pytest.mark.parametrize(("other", "left"), [("admits", 9000), ("refuses", 7000), ("fails", 7000)])
def test_a_call_that_no_other_store_lets_in_keeps_what_it_has_spent(how, other, left, monkeypatch):
    monkeypatch.setattr("backend.quota.failover.PROBE_S", 0.01)
    store, after = Away(), Away()
    stores = Failover([store, after])
    first, second = stores._watched
    first.spend(HELD)
    if other == "refuses":
        second.spend(replace(HELD, lease="other", cost=9 * UNIT))
    after.how = "fails" if other == "fails" else ""
    store.how = how
    if how not in ("fails", "loses"):
        store.how = "fails"
        with pytest.raises(QuotaAway):
            first.look("someone", FREE)
    with suppress(QuotaAway):
        decision, holder = stores.reserve(HELD, HELD.raised(5 * UNIT), first)
        assert (holder, decision.refused_by is None) == (second, other == "admits")
    store.how = after.how = ""
    wait_for(lambda: not first.away)
    found = first.look("someone", FREE)
    assert (*found.left, found.running) == (left, 0)
    stores.close()


@pytest.mark.parametrize(("policy", "left"), [("local", 20), ("allow", 19), ("deny", 19)])
def test_a_call_whose_reservation_meets_an_outage_is_paid_for_once(gunicorn, valkey, policy, left):
    """Its unit is spent before its body comes, and the server is stopped between the two."""
    settings = {"CRANE_REDIS_URL": valkey.url, "CRANE_QUOTA_ON_OUTAGE": policy}
    tier = {"CRANE_QUOTA": "on", "CRANE_TIERS": "free 20/day"}
    server = gunicorn([{**ECHO, "cost": 5}], CRANE_WORKERS=1, **tier, **settings)
    body = json.dumps({"model_id": "echo", "input": "x" * 2 * SMALL}).encode()
    head = "POST /crane/run HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    def quota():
        known = server.get("/crane/quota")[1]
        return known["limits"][0]["left"], known["concurrency"]["running"]

    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as caller:
        caller.sendall(head.encode())
        wait_for(lambda: quota() == (19, 1))
        valkey.stall()
        caller.sendall(body)
        status = int(caller.recv(65536).split()[1])
    assert status == (503 if policy == "deny" else 200)
    if policy == "local":
        assert quota() == (15, 0)  # of this host's own file
    valkey.go_on()
    wait_for(lambda: not server.get("/readyz")[1]["quota"]["away"])
    assert quota() == (left, 0)


def test_of_steps_that_fail_at_once_one_has_the_store_looked_at(monkeypatch):
    monkeypatch.setattr("backend.quota.failover.PROBE_S", 60)
    at_once = threading.Barrier(8)

    class FailsAtOnce(Flaky):
        def _step(self, subject, decide):
            at_once.wait(30)
            raise ConnectionError

    changes = []
    watched = WatchedStore(FailsAtOnce(), changes.append)

    def look(_):
        with pytest.raises(QuotaAway):
            watched.look("someone", FREE)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(8)))
    assert (len(watchers()), changes) == (1, [True])
    watched.close()
