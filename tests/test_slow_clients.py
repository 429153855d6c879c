"""Clients that send or read slowly, or never, or in hundreds: no thread waits for them."""

from __future__ import annotations

import json
import re
import resource
import select
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress

import pytest

from backend.server.sockets import ClientSocket, Pace
from tests.conftest import ECHO, write_models
from tests.serving import Gunicorn, wait_for

HEAD = b"POST /crane/run HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
HALF_HEAD = HEAD[:40]
HALF_BODY = HEAD + b"Content-Length: 1000\r\n\r\n{"
LARGE_BODY = HEAD + b"Content-Length: 10000000\r\n\r\n{"
INVITED = LARGE_BODY.replace(b"Content-Length", b"Expect: 100-continue\r\nContent-Length")[:-1]
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
UNREFUSED_CHUNKS = HEAD.replace(b"/crane/run", b"/nope") + b"Transfer-Encoding: chunked\r\n\r\n1"
SMALL_BODY = b'{"model_id": "echo", "input": 1}'
LAST_ECHO = HEAD + b"Connection: close\r\nContent-Length: 32\r\n\r\n" + SMALL_BODY
OTHER = "127.0.0.2"  # an address that the tests' other requests do not come from
QUICK = {"CRANE_HEAD_TIMEOUT": "400ms", "CRANE_CLIENT_TIMEOUT": "400ms", "CRANE_MIN_RATE": "1MB"}


def echo(size, *, stream=False):
    """A call whose response has so many bytes, and a little more."""
    input_ = ["x" * 500_000] * (size // 500_000)
    body = json.dumps({"model_id": "echo", "input": input_, "stream": stream}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def connect(server, data=b"", address="127.0.0.1"):
    """A client with a small window, so that what it does not read stays with the service."""
    client = socket.socket()
    client.bind((address, 0))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(50)
    client.connect(("127.0.0.1", server.port))
    with suppress(ConnectionError):  # a refused one is not heard to its end
        client.sendall(data)
    return client


@contextmanager
def clients(server, count, data=b"", address="127.0.0.1"):
    with ExitStack() as stack:
        yield [stack.enter_context(connect(server, data, address)) for _ in range(count)]


def dropped(server, reason):
    """How many connections were dropped for it."""
    page = server.request("GET", "/metrics")[2].decode()
    found = re.search(rf'crane_connections_dropped_total{{reason="{reason}"}} ([\d.]+)', page)
    return int(float(found[1])) if found else 0


def status_of(client):
    """The status of the response that is all there comes; None if there is none."""
    try:
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    except ConnectionResetError:
        return None
    return int(answer.split()[1]) if answer else None


@pytest.fixture(autouse=True)
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if enough < 2500:
        pytest.skip("needs 2,500 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def serve(folder, **settings):
    return Gunicorn(write_models(folder, [ECHO]), folder / "data", settings).wait_until_ready()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A server with little patience."""
    server = serve(tmp_path_factory.mktemp("quick"), **QUICK)
    yield server
    server.stop()


@pytest.fixture(scope="module", params=[10, 100_000], ids=["limited", "unlimited"])
def flooded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flooded")
    server = serve(folder, CRANE_THREADS=4, CRANE_MAX_CONNECTIONS=request.param)
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("count", "data"),
    [
        pytest.param(700, HALF_HEAD, id="700 half heads"),
        pytest.param(700, HALF_BODY, id="700 half bodies"),
        pytest.param(2000, b"", id="2,000 silent"),
        pytest.param(30, UNREFUSED_CHUNKS, id="bodies that nobody reads"),
        pytest.param(15, echo(10_000_000), id="unread responses"),
    ],
)
def test_no_flood_of_one_address_keeps_livez_or_others_calls(flooded, count, data):
    with clients(flooded, count, data):
        for _ in range(3):
            status, _, body = flooded.request("GET", "/livez", timeout_s=10)
            assert (status, body) == (200, b'{"status":"alive"}')
        # As soon as what was sent whole is answered, though nobody reads that.
        wait_for(lambda: flooded.run(timeout_s=10)[0] == 200, timeout_s=60)


def test_livez_is_answered_where_every_permit_is_taken_by_a_body(gunicorn):
    server = gunicorn(CRANE_THREADS=4)
    with clients(server, 2, INVITED) as held, clients(server, 2, INVITED, OTHER) as others:
        assert {client.recv(100) for client in [*held, *others]} == {CONTINUE}
        assert server.run()[0] == 503
        assert server.get("/livez")[0] == 200
    wait_for(lambda: server.run()[0] == 200)  # whose permits are free as they leave


def refused(clients):
    """Those who have got a 503."""
    answered = select.select(clients, [], [], 0)[0]
    answers = {client: client.recv(4096, socket.MSG_PEEK) for client in answered}
    found = [one for one, answer in answers.items() if answer.startswith(b"HTTP/1.1 503 ")]
    assert all(b"\r\nRetry-After: 1\r\n" in answers[one] for one in found)
    return found


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(LARGE_BODY, id="large"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1", id="chunked"),
        pytest.param(INVITED.replace(b"10000000", b"9"), id="small but invited"),
    ],
)
def test_bodies_that_one_caller_sends_slowly_leave_permits_to_others(gunicorn, data):
    server = gunicorn(CRANE_THREADS=4)
    with clients(server, 30, data) as flood:
        wait_for(lambda: len(refused(flood)) == 28)
        assert server.run()[0] == 200
        with clients(server, 3, data, OTHER) as others:
            wait_for(lambda: len(refused(others)) == 1)
    # And to its own, once they have left: one that is large, too.
    wait_for(lambda: server.run(input="x" * 1_000_000)[0] == 200)


def test_streams_that_a_caller_does_not_read_leave_permits_to_others(gunicorn):
    """Though they are settled, and so no calls at once of its tier any more."""
    server = gunicorn(
        CRANE_THREADS=32, CRANE_QUOTA="on", CRANE_TIERS="free 1000/minute concurrency=4"
    )
    body = json.dumps({"model_id": "echo", "input": ["x" * 500_000] * 12, "stream": True}).encode()
    stream = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as held:
        for _ in range(12):  # one after another, so that each is settled before the next
            client = held.enter_context(connect(server, stream))
            assert client.recv(20).startswith(b"HTTP/1.1 200")
            wait_for(lambda: server.get("/crane/quota")[1]["concurrency"]["running"] == 0)
        status, answer = server.run()
        assert (status, answer["error"]["code"]) == (429, "CONCURRENCY_LIMIT_EXCEEDED")
        other = held.enter_context(connect(server, LAST_ECHO, OTHER))
        assert status_of(other) == 200
    wait_for(lambda: server.run()[0] == 200)


def test_behind_trusted_proxies_callers_are_told_apart_by_what_those_say(gunicorn):
    server = gunicorn(CRANE_THREADS=4, CRANE_AUTH="off", CRANE_TRUSTED_PROXIES=1)

    def sent_for(address):
        return INVITED.replace(b"Host:", b"X-Forwarded-For: %s\r\nHost:" % address)

    with clients(server, 20, sent_for(b"192.0.2.1")) as flood:
        wait_for(lambda: len(refused(flood)) == 18)
        with clients(server, 2, sent_for(b"192.0.2.2")) as others:
            assert [client.recv(100) for client in others] == [CONTINUE] * 2


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"", None, id="nothing"),
        pytest.param(HALF_HEAD, 408, id="half a head"),
        pytest.param(HALF_BODY, 408, id="half a body"),
        pytest.param(LARGE_BODY, 408, id="half a large body"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1", 408, id="half a chunk"),
        pytest.param(
            HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n", 100, id="no body"
        ),
    ],
)
def test_who_sends_no_more_is_let_go(quick, sent, status):
    with connect(quick, sent) as client:
        assert status_of(client) == status


@pytest.mark.parametrize(
    "sent", [HALF_HEAD, HALF_BODY, LARGE_BODY, HEAD + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n"]
)
def test_a_byte_now_and_then_keeps_no_connection(quick, sent):
    with connect(quick, sent) as client:
        while not select.select([client], [], [], 0.1)[0]:
            client.sendall(b"x")  # until it is answered, or pytest's own limit ends it
        assert status_of(client) == 408


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reads", [0, 1])
def test_who_takes_too_little_of_a_response_is_let_go(quick, stream, reads):
    before = dropped(quick, "unsent")
    body = {"model_id": "echo", "input": "x" * 900_000, "stream": stream}
    body["input"] = [body["input"]] * 12  # more than the kernel keeps
    data = json.dumps(body).encode()
    with connect(quick, HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data) as client:

        def is_dropped():
            client.recv(reads)
            return dropped(quick, "unsent") > before

        wait_for(is_dropped, timeout_s=50, every_s=0.1)
        left = iter(lambda: client.recv(65536), b"")
        assert sum(map(len, left)) < 10_000_000


def test_a_stream_that_is_not_read_ends_its_work(gunicorn):
    """As its thread waits for the client, not the poller: there is more to come."""
    server = gunicorn(**QUICK, CRANE_THREADS=1)
    inputs = ["x" * 900_000] * 8
    body = json.dumps({"model_id": "echo", "input": inputs, "stream": True}).encode()
    with connect(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body):
        wait_for(lambda: server.log_lines(message="request", error="CLIENT_CLOSED_REQUEST"), 50)
        assert server.run()[0] == 200  # with the one permit there is


def test_a_slow_but_steady_reader_gets_all(gunicorn):
    """Though the kernel has megabytes for it, and so for seconds no room for more."""
    server = gunicorn(CRANE_CLIENT_TIMEOUT="1s", CRANE_MIN_RATE="1KB")
    with connect(server, echo(6_000_000)) as client:
        answer = bytearray()
        while b'"metadata"' not in answer[-2000:] or not answer.endswith(b"}"):
            chunk = client.recv(65536)
            assert chunk
            answer += chunk
            if len(answer) < 2_500_000:
                threading.Event().wait(0.003)
        assert len(answer) > 6_000_000
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
        assert status_of(client) == 200  # on the same connection


@pytest.mark.parametrize("size", [1, 70_000])
def test_the_head_of_a_response_comes_with_its_body(size):
    accepted, there = socket.socketpair()
    with ClientSocket(accepted, Pace(30, 1)) as here, there:
        there.setblocking(False)
        here.hold_head()
        here.send_now(b"100 continue, ")  # which no head is
        assert there.recv(100) == b"100 continue, "
        here.sendall(b"head, ")
        with pytest.raises(BlockingIOError):
            there.recv(1)
        here.sendall(bytes(size))
        assert there.recv(100_000, socket.MSG_WAITALL) == b"head, " + bytes(size)
        here.sendall(b"more")
        assert there.recv(100) == b"more"
        here.hold_head()
        here.sendall(b"head of nothing")
        here.send_head()
        assert there.recv(100) == b"head of nothing"
        here.sendall(b"another")
        assert there.recv(100) == b"another"


def test_an_address_has_so_many_connections_and_its_oldest_idle_one_makes_room(gunicorn):
    server = gunicorn(CRANE_MAX_CONNECTIONS=3)
    with clients(server, 3) as idle:
        assert server.run()[0] == 200
        assert idle[0].recv(1) == b""
        assert dropped(server, "crowded") >= 1


def test_connections_at_work_make_no_room(gunicorn):
    server = gunicorn(CRANE_MAX_CONNECTIONS=2)
    body = b'{"model_id": "echo", "input": 1, "options": {"delay_ms": 30000}}'
    call = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    probe = b"GET /livez HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n"

    with clients(server, 2, call, OTHER) as working:
        wait_for(lambda: server.under_way("echo") == 2, 20)
        with connect(server, call, OTHER) as third, connect(server, probe, OTHER) as fourth:
            assert status_of(third) == 503
            assert status_of(fourth) == 200
        assert select.select(working, [], [], 0)[0] == []


def test_behind_trusted_proxies_no_address_has_a_limit(gunicorn):
    server = gunicorn(CRANE_MAX_CONNECTIONS=2, CRANE_TRUSTED_PROXIES=1)
    with clients(server, 20) as idle:
        assert server.get("/livez")[0] == 200
        assert select.select(idle, [], [], 0)[0] == []


def test_a_worker_that_may_open_no_more_files_goes_on(gunicorn):
    # A call waits for a file to be free, for longer than any of the flood stays.
    server = gunicorn(CRANE_MAX_CONNECTIONS=100_000, CRANE_HEAD_TIMEOUT="2s")
    server.run()
    [worker] = server.http_workers()
    few = worker.num_fds() + 20
    worker.rlimit(resource.RLIMIT_NOFILE, (few, few))
    with clients(server, 100):
        assert server.get("/livez")[0] == 200
        assert [server.run()[0] for _ in range(40)] == [200] * 40  # of any of its threads
    assert server.http_workers() == [worker]


@pytest.mark.parametrize(
    ("path", "invited"), [("/crane/run", True), ("/nope", False), ("/crane/models", False)]
)
def test_a_body_is_invited_only_once_it_will_be_read(quick, path, invited):
    body = b'{"model_id": "echo", "input": 1}'
    head = HEAD.replace(b"/crane/run", path.encode()) + b"Expect: 100-continue\r\n"
    with connect(quick, head + b"Content-Length: %d\r\n\r\n" % len(body)) as client:
        first = client.recv(65536)
        assert first.startswith(b"HTTP/1.1 100 Continue\r\n\r\n") is invited
        if invited:
            client.sendall(body)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
        else:
            assert b"\r\nConnection: close\r\n" in first


def test_a_call_has_its_permit_before_its_body_is_read(gunicorn):
    server = gunicorn(CRANE_THREADS=1)
    with connect(server, INVITED) as first:
        assert first.recv(100) == CONTINUE
        with connect(server, LARGE_BODY) as second:
            assert b" 503 " in second.recv(65536)
        first.shutdown(socket.SHUT_WR)
        assert status_of(first) == 400
    assert server.run()[0] == 200


def test_what_a_refused_client_still_sends_is_taken_so_that_it_can_read_why(quick):
    with connect(quick, HEAD + b"Content-Length: 90000000\r\n\r\n") as client:
        assert b" 413 " in client.recv(65536)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.sendall(b"x" * 800_000)  # more than the kernel takes; raises after a reset


def test_livez_is_answered_where_every_thread_waits(gunicorn):
    server = gunicorn(CRANE_THREADS=1)  # and four more
    engine = server.engine()
    engine.suspend()  # so each look at it takes a while
    try:
        with clients(server, 12, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n") as waiting:
            assert server.get("/livez")[0] == 200
            # Behind them it would be the thirteenth of what five threads do.
            assert len(select.select(waiting, [], [], 0)[0]) < 8
    finally:
        engine.resume()
