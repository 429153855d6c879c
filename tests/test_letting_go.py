"""Callers who leave before their answer, with real sockets: what they asked for stops."""

from __future__ import annotations

import json
import re
import socket
import time

import pytest

from backend.channel import Channel
from backend.config import Config
from backend.engine.remote import RemoteEngine, Ticket
from tests.checkpoints import checkpoint, sentence
from tests.conftest import ECHO, write_models
from tests.serving import Gunicorn, wait_for

__all__ = ["checkpoint"]

PROMPT = sentence(5, 1)
ENDLESS = {"max_tokens": 32768, "min_tokens": 32768}  # T5 has no window; it takes minutes
HELD = {"delay_ms": 60_000}
PRICE = 7
# A token takes 3 ms here; the rest is for a machine that has other things to do.
AT_ONCE_S = 2


@pytest.fixture(scope="module", params=["process", "inline"])
def server(request, checkpoint, tmp_path_factory):
    """Crane with its engine in a process of its own, and with one inside the HTTP worker."""
    folder = tmp_path_factory.mktemp(f"leaving-{request.param}")
    writer = {"id": "t5", "type": "text2text-generation", "hf_model": checkpoint("t5")}
    models = write_models(folder, [ECHO, writer | {"cost": PRICE}])
    settings = {"CRANE_ENGINE": request.param, "CRANE_WORKERS": 1, "CRANE_QUOTA": "on"}
    settings["CRANE_TIERS"] = "free 1000000/day concurrency=200"
    server = Gunicorn(models, folder / "data", settings).wait_until_ready()
    assert server.run("t5", PROMPT, options={"max_tokens": 1})[0] == 200
    assert server.run("echo")[0] == 200
    yield server
    server.stop()


class Caller:
    """A connection on which requests are sent without waiting for their answers."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self._answers = self.socket.makefile("rb")

    def send(self, *bodies):
        """POST /crane/run for each body, all of them at once."""
        requests = b""
        for body in bodies:
            data = json.dumps(body).encode()
            head = "POST /crane/run HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
            requests += f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        self.socket.sendall(requests)
        return self

    def read(self):
        """The status and the JSON of the next answer."""
        status = int(self._answers.readline().split()[1])
        while (line := self._answers.readline().lower()) != b"\r\n":
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return status, json.loads(self._answers.read(length))

    def leave(self):
        self._answers.close()
        self.socket.close()


def call(server, model_id="echo", input="hello", **options):
    return Caller(server).send({"model_id": model_id, "input": input, "options": options})


def running(server, model_id):
    """How many inputs the model's present batch has."""
    batch = server.get(f"/crane/models/{model_id}")[1]["running"]
    return batch["inputs"] if batch else 0


def queued(server, model_id):
    return server.get(f"/crane/models/{model_id}")[1]["queue"]


def stopped(server, model_id):
    """How many inputs were stopped ever: those queued, those running."""
    page = server.request("GET", "/metrics")[2].decode()

    def count(where):
        line = rf'^crane_cancelled_total{{model="{model_id}",where="{where}"}} (\S+)$'
        return sum(int(float(found)) for found in re.findall(line, page, re.MULTILINE))

    return count("queued"), count("running")


def quota(server):
    """The calls that count as running, and the units that are left."""
    answer = server.get("/crane/quota")[1]
    return answer["concurrency"]["running"], answer["limits"][0]["left"]


def since(before, now):
    return tuple(new - old for old, new in zip(before, now, strict=True))


def test_who_leaves_frees_the_model_and_the_place_and_pays_what_was_reserved(server):
    before, left = stopped(server, "t5"), quota(server)[1]
    caller = call(server, "t5", PROMPT, **ENDLESS)
    wait_for(lambda: running(server, "t5"))
    assert quota(server)[0] == 1
    caller.leave()
    wait_for(lambda: not running(server, "t5"), AT_ONCE_S)
    wait_for(lambda: quota(server)[0] == 0, AT_ONCE_S)
    assert quota(server) == (0, left - PRICE)
    wait_for(lambda: since(before, stopped(server, "t5")) == (0, 1))
    [line] = server.log_lines(message="request", status=499)[-1:]
    assert (line["error"], line["model_id"]) == ("CLIENT_CLOSED_REQUEST", "t5")
    assert line["duration_ms"] < 10_000


def test_a_connection_that_is_reset_is_one_that_is_closed(server):
    caller = call(server, "t5", PROMPT, **ENDLESS)
    wait_for(lambda: running(server, "t5"))
    linger = b"\1\0\0\0\0\0\0\0"  # on, for 0 s: closing sends a reset
    caller.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    caller.leave()
    wait_for(lambda: not running(server, "t5"), AT_ONCE_S)
    wait_for(lambda: quota(server)[0] == 0, AT_ONCE_S)


def test_100_callers_who_leave_amid_generation_leave_the_model_idle(server):
    before, left = stopped(server, "t5"), quota(server)[1]
    callers = [call(server, "t5", PROMPT, **ENDLESS)]
    wait_for(lambda: running(server, "t5") == 1)
    callers += [call(server, "t5", f"{PROMPT} {i}", **ENDLESS) for i in range(99)]
    wait_for(lambda: queued(server, "t5") == 99, 20)
    callers[0].leave()
    wait_for(lambda: running(server, "t5") == 32)  # the next batch
    for caller in callers[1:]:
        caller.leave()
    wait_for(lambda: not running(server, "t5") and not queued(server, "t5"))
    wait_for(lambda: sum(since(before, stopped(server, "t5"))) == 100)
    wait_for(lambda: quota(server)[0] == 0, AT_ONCE_S)
    # Those that never ran have paid a unit; who left last may have begun for a moment.
    assert left - 100 * PRICE <= quota(server)[1] <= left - 33 * PRICE - 67
    assert server.run("t5", PROMPT, options={"max_tokens": 3}, timeout_s=10)[0] == 200


def test_a_queued_call_whose_caller_left_never_starts(server):
    before = stopped(server, "echo")
    held = call(server, **HELD)
    wait_for(lambda: running(server, "echo"))
    leaver = call(server, input=["never", "run"])
    wait_for(lambda: queued(server, "echo") == 2)
    leaver.leave()
    wait_for(lambda: quota(server)[0] == 1, AT_ONCE_S)
    held.leave()
    wait_for(lambda: not running(server, "echo"), AT_ONCE_S)
    wait_for(lambda: since(before, stopped(server, "echo")) == (2, 1))


def test_those_who_share_a_batch_with_a_leaver_get_what_they_get_alone(server):
    first, leaver, last = (sentence(5, seed) for seed in range(3))
    options = {"max_tokens": 300, "min_tokens": 300}
    alone = [server.run("t5", one, options=options)[1]["output"] for one in (first, last)]
    before = stopped(server, "t5")
    held = call(server, "t5", PROMPT, **ENDLESS)
    wait_for(lambda: running(server, "t5"))
    callers = [call(server, "t5", one, **options) for one in (first, leaver, last)]
    wait_for(lambda: queued(server, "t5") == 3)
    held.leave()
    wait_for(lambda: running(server, "t5") == 3)
    time.sleep(0.1)  # some tokens
    callers.pop(1).leave()
    answers = [caller.read() for caller in callers]
    for caller in callers:
        caller.leave()
    assert [status for status, _ in answers] == [200, 200]
    assert {body["metadata"]["batch_size"] for _, body in answers} == {3}
    assert [body["output"] for _, body in answers] == alone
    wait_for(lambda: since(before, stopped(server, "t5")) == (0, 2))


def test_a_request_sent_before_the_answer_to_the_one_before_is_answered_too(server):
    caller = Caller(server)
    delays = (1500, 0, 0)
    first, *more = (
        {"model_id": "echo", "input": i, "options": {"delay_ms": delay}}
        for i, delay in enumerate(delays)
    )
    caller.send(first)
    wait_for(lambda: running(server, "echo"))
    caller.send(*more)
    [worker] = server.http_workers()
    used = sum(worker.cpu_times()[:2])
    time.sleep(1)
    used = sum(worker.cpu_times()[:2]) - used
    answers = [caller.read() for _ in delays]
    assert [(status, body["output"]) for status, body in answers] == [(200, 0), (200, 1), (200, 2)]
    assert used < 0.3  # its bytes are there all the while, and nobody asks for them again and again
    caller.leave()


def test_who_closes_the_sending_half_is_told_so_and_counts_as_gone(server):
    caller = call(server, **HELD)
    wait_for(lambda: running(server, "echo"))
    caller.socket.shutdown(socket.SHUT_WR)
    status, body = caller.read()
    assert (status, body["error"]["code"]) == (499, "CLIENT_CLOSED_REQUEST")
    wait_for(lambda: not running(server, "echo"), AT_ONCE_S)
    caller.leave()


def test_who_leaves_while_the_model_loads_is_let_go_at_once(gunicorn, checkpoint):
    entry = {"id": "t5", "type": "text2text-generation", "hf_model": checkpoint("t5")}
    server = gunicorn([entry], CRANE_QUOTA="on", CRANE_THREADS=2)
    callers = [call(server, "t5", PROMPT, **ENDLESS) for _ in range(2)]
    wait_for(lambda: quota(server)[0] == 2)
    for caller in callers:
        caller.leave()
    wait_for(lambda: quota(server)[0] == 0, AT_ONCE_S)
    # There are two places, and both are free.
    assert server.run("t5", PROMPT, options={"max_tokens": 3}, timeout_s=60)[0] == 200
    assert stopped(server, "t5") == (2, 0)


def test_who_leaves_after_the_longest_wait_for_a_load_is_noticed_too(gunicorn):
    server = gunicorn(CRANE_LOAD_WAIT="100ms")
    caller = call(server, **HELD)
    wait_for(lambda: running(server, "echo"))
    time.sleep(0.3)
    caller.leave()
    wait_for(lambda: not running(server, "echo"), AT_ONCE_S)


def test_a_wait_that_has_no_time_left_ends(tmp_path):
    engine = RemoteEngine(Config(data_dir=tmp_path, engine_socket=tmp_path / "engine.sock"))
    here, there = socket.socketpair()
    with here, there:
        assert engine._wait(Ticket(Channel(here, max_bytes=1000), "call"), -1.0, None) is None


def test_what_a_deadline_stops_is_counted_too(gunicorn):
    server = gunicorn(CRANE_REQUEST_TIMEOUT="500ms")
    assert server.run(input=[1, 2, 3], options=HELD)[0] == 504
    wait_for(lambda: stopped(server, "echo") == (0, 3))


def test_what_the_engine_has_counted_is_not_lost_with_it(gunicorn):
    server = gunicorn()
    for count in (1, 2):
        caller = call(server, **HELD)
        wait_for(lambda: running(server, "echo"))
        caller.leave()
        wait_for(lambda count=count: stopped(server, "echo") == (0, count))
        server.engine().kill()
        wait_for(lambda: server.get("/readyz")[0] == 200)
