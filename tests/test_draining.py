"""Engines that end while calls come: those calls are done elsewhere, once each."""

from __future__ import annotations

import math
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace

import pytest

from backend.adapters.echo import Echo
from backend.channel import Channel
from backend.config import Config
from backend.engine import placement, server, wire
from backend.engine.calls import Answer, Call
from backend.engine.remote import EngineEnding, RemoteEngine
from backend.engine.several import SeveralEngines, reach
from backend.errors import InternalError, ModelUnavailable
from backend.registry import Registry
from tests.conftest import ECHO, write_models
from tests.serving import wait_for
from tests.test_wire import engine_process


def call(model_id, value, **more):
    about = {"options": {"delay_ms": 0}, "seeds": None, "timeout_s": 30} | more
    return Call(request_id=value, model_id=model_id, inputs=[value], **about)


class Engines:
    """Engines in threads of this process, and what ran on which of them."""

    def __init__(self, config, registry):
        self.config, self.registry = config, registry
        self.ran = Counter()
        self.hangs, self.held = threading.Event(), threading.Event()
        self.running, self.ended = {}, []
        self.servers = [server.Server(config, index) for index in range(len(config.devices))]
        for index in range(len(self.servers)):
            self.start(index)

    def start(self, index):
        self.running[index] = threading.Thread(target=self._serve, args=(self.servers[index],))
        self.running[index].start()

    def _serve(self, one):
        one.serve()
        one._engine.close(0.1)
        shut(one)

    def replace(self, index):
        """Wait for the end of an engine, and start the one that follows."""
        self.running[index].join(20)
        self.ended.append(self.servers[index])
        self.config.engine_sockets[index].unlink()
        self.servers[index] = server.Server(self.config, index)
        self.start(index)

    def hang(self, index):
        """Have a model hang as it loads, so that its engine is to be replaced."""
        self.servers[index]._engine.control("load", "hangs")
        wait_for(lambda: self.servers[index]._draining)

    def close(self):
        self.hangs.set()
        self.held.set()
        for one in self.servers:
            with suppress(OSError):  # it has ended already
                one._break(at_once=True)
        for thread in self.running.values():
            thread.join(20)
        for one in [*self.ended, *self.servers]:
            one._engine.close()
            one._wake.close()


def shut(one):
    """Close an engine's sockets, as the end of its process does."""
    for channel in one._jobs:
        channel.close()
    for end in (one._listener, one._woken, one._selector):
        end.close()


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """What the clients' threads connect to engines is closed in the end."""
    made = []

    def connect(engine, really=RemoteEngine._reach):
        made.append(really(engine))
        return made[-1]

    monkeypatch.setattr(RemoteEngine, "_reach", connect)
    yield
    for channel in made:
        channel.close()


@pytest.fixture
def engines(tmp_path, add_task, monkeypatch):
    """Engines with the models ``a``, ``b`` and one that hangs; no client looks at them unasked."""
    monkeypatch.setattr(placement, "LOOK_EVERY_S", math.inf)
    made = []

    class Counted(Echo):
        def load(self):
            super().load()
            if self.spec.id == "hangs":
                assert made[0].hangs.wait(30)

        def predict(self, batch):
            made[0].ran.update(batch.inputs)
            if "held" in batch.inputs:
                assert made[0].held.wait(30)
            return super().predict(batch)

    def make(devices):
        entries = [add_task("counted", Counted) | {"id": name} for name in ("a", "b", "hangs")]
        config = Config(
            models=write_models(tmp_path, entries),
            engine="process",
            engine_socket=tmp_path / "x",
            devices=("cpu",) * devices,
            load_timeout_s=0.2,
            hang_timeout_s=0.2,
        )
        made.append(Engines(config, Registry.load(config.models)))
        return made[0]

    yield make
    for one in made:
        one.close()


def test_calls_for_an_engine_that_drains_are_done_by_another_one_at_once(engines):
    both = engines(2)
    client = SeveralEngines(both.config, both.registry)
    for name in "ab":  # one on each engine
        client.run(call(name, name))
    with ThreadPoolExecutor(9) as threads:
        held = threads.submit(client.run, call("a", "held"))
        wait_for(lambda: both.ran["held"])
        both.hang(0)
        values = [str(number) for number in range(40)]
        answers = list(threads.map(lambda value: client.run(call("a", value)), values))
        assert [answer.outputs for answer in answers] == [[value] for value in values]
        told = client.status()["engines"]
        assert [engine["draining"] for engine in told] == [True, False]  # all the while
        both.held.set()
        assert held.result(20).outputs == ["held"]  # which had begun
    assert both.ran == Counter(["a", "b", "held", *values])


def test_no_model_is_loaded_on_an_engine_that_drains(engines):
    both = engines(2)
    client = SeveralEngines(both.config, both.registry)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.run, call("a", "held"))
        wait_for(lambda: both.ran["held"])
        both.hang(0)
        with pytest.raises(ModelUnavailable, match="replaced"):
            RemoteEngine(both.config, 0).control("prepare", "b")
        client.load("b")
        assert [copy["engine"] for copy in client.status()["models"]["b"]["copies"]] == [1]
        both.held.set()
        held.result(20)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_has_not_begun_when_an_engine_ends_is_done_by_another_one(
    engines, devices, monkeypatch
):
    monkeypatch.setattr(server, "DRAIN_S", 0.3)
    some = engines(devices)
    client = reach(some.config, some.registry)
    client.run(call("a", "a"))
    with ThreadPoolExecutor(9) as threads:
        held = threads.submit(client.run, call("a", "held"))
        wait_for(lambda: some.ran["held"])
        values = [str(number) for number in range(8)]
        queued = threads.map(lambda value: client.run(call("a", value)), values)
        wait_for(lambda: client.status()["models"]["a"]["queue"] == 8)
        some.hang(0)
        if devices == 1:
            some.replace(0)
        assert [answer.outputs for answer in queued] == [[value] for value in values]
        with pytest.raises(ModelUnavailable, match="stopped while it had your call"):
            held.result(20)
    assert some.ran == Counter(["a", "held", *values])


def test_a_call_waits_for_the_engine_that_follows_the_one_that_drains(engines):
    one = engines(1)
    client = RemoteEngine(one.config)
    with ThreadPoolExecutor(2) as threads:
        held = threads.submit(client.run, call("a", "held"))
        wait_for(lambda: one.ran["held"])
        one.hang(0)
        refused = one.servers[0]._refuse
        seen = threading.Event()
        one.servers[0]._refuse = lambda *about: (seen.set(), refused(*about))
        late = threads.submit(client.run, call("b", "late"))
        assert seen.wait(10)
        assert not late.done()
        one.held.set()
        assert held.result(20).outputs == ["held"]
        one.replace(0)
        assert late.result(20).outputs == ["late"]
    assert one.ran["late"] == 1


def test_a_call_on_its_way_to_an_engine_that_ends_is_not_lost(tmp_path):
    config = Config(
        models=write_models(tmp_path, [ECHO]), engine="process", engine_socket=tmp_path / "x"
    )
    one = server.Server(config, 0)
    client = RemoteEngine(config, start_s=0)
    barrier = threading.Barrier(3)  # so that each has a thread, and a connection, of its own

    def submit(name):
        barrier.wait(10)
        return client._submit(call("echo", name))

    with ThreadPoolExecutor(3) as threads:
        tickets = list(threads.map(submit, "abc"))
        one.close()
        assert one.serve() == 0
        for ticket in tickets:
            told = client._wait(ticket, 10, None)
            assert isinstance(told, EngineEnding)
            assert told.usage is None
    shut(one)
    one._wake.close()


def test_a_call_that_has_not_come_whole_is_not_begun(tmp_path):
    config = Config(engine="process", engine_socket=tmp_path / "x")
    here, there = socket.socketpair()
    with closing(Channel(here, max_bytes=2**30)) as channel:
        client = RemoteEngine(config)
        client._reach = lambda: channel
        ticket = client._submit(call("echo", "x" * 2**24))
        assert channel.has_unsent
        there.close()
        with pytest.raises(EngineEnding):
            client._wait(ticket, 10, None)


def test_an_engine_that_ends_sends_its_answers_whole(tmp_path):
    text = "x" * 50_000
    with engine_process(tmp_path) as (process, _, remote):
        ticket = remote._submit(call("echo", text, repeat=300))  # 15 MB, which no buffer takes
        wait_for(lambda: remote.look()["models"].get("echo", {}).get("idle_s") is not None)
        process.stdin.close()
        wait_for(lambda: remote.look()["draining"])
        answer = remote._wait(ticket, 20, None)
        assert isinstance(answer, Answer)
        assert answer.outputs == [text] * 300


def test_a_call_that_is_sent_again_keeps_its_deadline(engines):
    one = engines(1)
    client = RemoteEngine(one.config)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(client.run, call("a", "held"))
        wait_for(lambda: one.ran["held"])
        one.hang(0)
        with pytest.raises(EngineEnding):
            client.run(replace(call("b", "late"), timeout_s=0.3))
        one.held.set()
        held.result(20)


def test_what_an_engine_says_as_it_ends_is_for_one_call(tmp_path):
    message = wire.pack_answer("other", wire.Event(wire.ENDING, {}))
    with pytest.raises(wire.BadMessage):
        wire.unpack_answer("mine", message)


@pytest.mark.parametrize("method", ["submit", "control", "status"])
def test_a_fault_of_ours_costs_one_request(engines, monkeypatch, method):
    one = engines(1)
    client = RemoteEngine(one.config, start_s=0)
    requests = {
        "submit": (lambda: client.run(call("a", "x", timeout_s=5)), InternalError),
        "control": (lambda: client.control("load", "a"), InternalError),
        "status": (client.look, ModelUnavailable),  # its connection ends, and tells so
    }
    request, error = requests[method]
    with monkeypatch.context() as broken:
        broken.setattr(one.servers[0]._engine, method, lambda *asked, **how: 1 / 0)
        with pytest.raises(error):
            request()
    assert client.run(call("a", "y", timeout_s=5)).outputs == ["y"]
