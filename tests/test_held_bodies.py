"""What callers' bodies take of an HTTP worker's memory is bounded, and no caller takes it all."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from tests.serving import wait_for
from tests.test_slow_clients import HEAD, OTHER, connect

LARGE = "x" * 900_000
LARGE_HEAD = HEAD + b"Content-Length: 800000\r\n\r\n"
WRONG = b"{" * 800_000
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def long_call(input_, **more):
    body = {"model_id": "echo", "input": input_, "options": {"delay_ms": 60_000}, **more}
    return json.dumps(body).encode()


def with_length(body):
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def in_chunks(body):
    return CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def status_of(client):
    return int(client.recv(65536).split()[1])


def wait_until_running(server):
    wait_for(lambda: server.get("/crane/models/echo")[1]["running"], timeout_s=30)


@pytest.fixture
def server(gunicorn):
    return gunicorn(CRANE_MAX_BODIES="1.8MB")


@pytest.mark.parametrize(("sent", "stream"), [(with_length, False), (in_chunks, True)])
def test_one_callers_bodies_hold_half_of_what_there_is(server, sent, stream):
    with connect(server, sent(long_call(LARGE, stream=stream)), OTHER) as first:
        wait_until_running(server)
        with connect(server, LARGE_HEAD, OTHER) as second:  # of which nothing has to come
            assert status_of(second) == 503
        with connect(server, LARGE_HEAD + WRONG) as another:
            assert status_of(another) == 400
        with connect(server, with_length(b"{"), OTHER) as third:
            assert status_of(third) == 400
        first.close()

        def is_let_in():
            with connect(server, LARGE_HEAD + WRONG, OTHER) as fourth:
                return status_of(fourth) == 400

        wait_for(is_let_in, timeout_s=20)


def test_callers_together_hold_what_there_is_and_each_of_them_one_body_at_first(server):
    with connect(server, with_length(long_call([LARGE, LARGE])), OTHER):
        wait_until_running(server)
        with connect(server, LARGE_HEAD) as another:
            assert status_of(another) == 503
        with connect(server, with_length(b"{")) as small:
            assert status_of(small) == 400


def test_of_chunks_counts_what_came(server):
    with connect(server, in_chunks(long_call("x" * 70_000)), OTHER) as first, ExitStack() as stack:
        wait_until_running(server)
        stack.enter_context(connect(server, with_length(long_call("x" * 810_000)), OTHER))
        wait_for(lambda: server.get("/crane/models/echo")[1]["queue"], timeout_s=30)
        first.close()
        wait_for(lambda: server.log_lines(error="CLIENT_CLOSED_REQUEST"), timeout_s=30)
        with connect(server, LARGE_HEAD, OTHER) as third:  # the second one's is still held
            assert status_of(third) == 503
