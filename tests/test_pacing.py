"""What costs no quota comes later to a caller that takes much of it, and at once to all others."""

from __future__ import annotations

import json
import select
import time

import pytest

from backend.pacing import BURST_S, MAX_CALLERS, MAX_DELAY_S, SHARE, Pacing
from tests.conftest import ECHO
from tests.test_slow_clients import OTHER, clients


def test_a_caller_has_a_share_of_a_cores_time_and_some_at_once():
    pacing, began = Pacing(), time.monotonic()
    assert pacing.delay("a", BURST_S / 2) == 0
    assert pacing.delay("a", BURST_S / 2) < 1e-6
    delay_s = pacing.delay("a", SHARE)  # what it may have in a second
    assert delay_s == pytest.approx(1, abs=time.monotonic() - began + 1e-3)
    assert pacing.delay("b", SHARE) == 0


def test_a_delay_has_an_end_whatever_was_taken():
    pacing = Pacing()
    assert pacing.delay("a", 1000) == MAX_DELAY_S
    assert pacing.delay("a", 0) <= MAX_DELAY_S


def test_so_many_callers_are_remembered():
    pacing = Pacing()
    for number in range(MAX_CALLERS + 10):
        pacing.delay(str(number), 1000)
    assert len(pacing._even_at) == MAX_CALLERS
    assert pacing.delay("0", 0) == 0
    assert pacing.delay(str(MAX_CALLERS), 0) > 0


def head(method, path, body=b""):
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: [::1]",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


CALL = json.dumps({"model_id": "echo", "input": 1}).encode()
FREE = {
    "a list": head("GET", "/crane/models"),
    "its quota": head("GET", "/crane/quota"),
    "what is not there": head("GET", "/nope"),
    "a spent quota": head("POST", "/crane/run", CALL),
}


def read(client):
    data = bytearray()
    while not data.endswith(b"}"):
        chunk = client.recv(65536)
        assert chunk
        data += chunk


@pytest.mark.parametrize("asked", FREE.values(), ids=FREE)
def test_who_asks_for_much_that_is_free_waits_and_nobody_else_does(gunicorn, asked):
    server = gunicorn([ECHO], CRANE_QUOTA="on", CRANE_TIERS="free 5/minute")
    overtaken = 0
    with clients(server, 100, address=OTHER) as greedy:
        while overtaken < 2:  # in a row: else it is chance; pytest's own limit ends it
            for client in greedy:
                client.sendall(asked)
            others = 0
            while len(select.select(greedy, [], [], 0)[0]) < 50:
                assert server.get("/crane/models/echo")[0] == 200
                others += 1
            # Else each of the hundred has as much of the time as this one.
            overtaken = overtaken + 1 if others > 10 else 0
            for client in greedy:
                read(client)
