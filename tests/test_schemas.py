"""Schemas that take long to compile: they are refused, and hold up nobody but their callers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psutil
import pytest

from backend import create_app
from backend.adapters import compiler, grammar
from backend.adapters.compiler import LENGTH, Abandoned, Compiler, SchemaRefused
from backend.config import Config
from backend.errors import InternalError, Overloaded
from tests.checkpoints import checkpoint
from tests.conftest import run, write_models
from tests.serving import ROOT, wait_for, wait_for_end
from tests.test_grammar import form, grammars, start

__all__ = ["checkpoint", "grammars"]

PATTERNS = [{"type": "string", "pattern": f".*{chr(97 + i)}.*{chr(97 + i)}"} for i in range(26)]
# Each took 6 s to hours, and up to all of the memory.
HOSTILE = {
    "patterns": {"allOf": PATTERNS},
    "multiple": {"type": "integer", "multipleOf": 9_999_991},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": one} for one in (97, 89, 83)]},
    "within": {"type": "array", "items": {"anyOf": [{"type": "null"}, {"allOf": PATTERNS[:20]}]}},
}


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    folder = checkpoint("thinker")
    entries = [
        {"id": "shared-chat", "type": "chat", "hf_model": folder},
        {"id": "shared-text", "type": "text-generation", "hf_model": folder},
    ]
    models = write_models(tmp_path_factory.mktemp("schemas"), entries)
    app = create_app(
        Config(models=models, data_dir=models.parent / "data", dtype="float32", quota="off")
    )
    yield app.test_client()
    app.extensions["crane"].engine.close()


@pytest.fixture
def own(monkeypatch):
    """A compiler of this test's own, whose processes end with it."""
    mine = Compiler()
    monkeypatch.setattr(compiler, "submit", mine.submit)
    monkeypatch.setattr(compiler, "MAX_PROCESSES", 1)  # so that a test knows which it is
    yield mine
    monkeypatch.setattr(compiler, "IDLE_S", 0.01)
    with mine._lock:
        mine._lock.notify_all()
    wait_for(lambda: not mine._threads and not processes())


def as_format(schema):
    """A call whose text is kept to a schema."""
    options = {"response_format": {"type": "json_schema", "schema": schema}, "max_tokens": 100}
    return {"model_id": "shared-text", "input": "once", "options": options}


def as_tool(schema):
    """A call that has to call a tool, which has an argument of a schema."""
    parameters = {"type": "object", "properties": {"one": schema}, "required": ["one"]}
    return {
        "model_id": "shared-chat",
        "input": {
            "messages": [{"role": "user", "content": "Call it."}],
            "tools": [{"type": "function", "function": {"name": "it", "parameters": parameters}}],
            "tool_choice": "required",
        },
        "options": {"max_tokens": 100},
    }


def processes():
    """The processes of this one that try schemas out."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it ends meanwhile
            if (
                "backend.schema_process" in child.cmdline()
                and child.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(child)
    return found


@pytest.mark.parametrize(
    ("as_call", "name"), [(as_tool, "patterns"), *((as_format, name) for name in HOSTILE)]
)
def test_a_schema_that_takes_too_long_is_refused_with_its_limit(
    client, own, as_call, name, monkeypatch
):
    answer = run(client, **as_call(HOSTILE[name]))
    assert answer.status_code == 400, answer.json
    [(field, fault)] = answer.json["error"]["details"].items()
    assert field == ("input.tool_choice" if as_call is as_tool else "options.response_format")
    assert "takes more than" in fault
    assert "use fewer or simpler patterns" in fault
    # It is remembered, so no process tries it out again.
    monkeypatch.setattr(compiler._Process, "check", None)
    assert run(client, **as_call(HOSTILE[name])).json["error"]["details"] == {field: fault}


def test_who_waits_for_a_schema_holds_up_nobody_else(client, own):
    plain = {"model_id": "shared-text", "input": "once", "options": {"max_tokens": 3}}
    kept = as_format({"const": "first"})
    assert run(client, **kept).status_code == 200
    [process] = processes()
    process.suspend()
    try:
        with ThreadPoolExecutor(4) as threads:
            new = [threads.submit(run, client, **as_format({"const": n})) for n in range(3)]
            wait_for(lambda: client.get("/crane/models/shared-text").json["queue"] == 3)
            for call in (plain, kept, {**plain, "options": {"num_beams": 2, "max_tokens": 3}}):
                assert run(client, **call).status_code == 200
            assert not any(one.done() for one in new)
            client.application.extensions["crane"].engine.control("unload", "shared-text")
            assert run(client, **plain).status_code == 200
            process.resume()
            answers = [one.result() for one in new]
    finally:
        process.resume()
    assert [json.loads(one.json["output"]) for one in answers] == [0, 1, 2]


def test_a_process_that_was_killed_is_replaced(client, own):
    for place in range(3):
        assert run(client, **as_format({"const": f"killed {place}"})).status_code == 200
        for process in processes():
            process.kill()
            process.wait()


def test_one_callers_schemas_are_compiled_one_at_a_time(own, monkeypatch):
    monkeypatch.setattr(compiler, "MAX_PROCESSES", 2)
    gate, begun = threading.Event(), threading.Event()

    def slow(size):
        begun.set()
        assert gate.wait(20)

    def submit(caller, build, wanted=True):
        return own.submit('{"type": "null"}', build, caller=caller, wanted=lambda: wanted)

    first = submit("many", slow)
    assert begun.wait(20)
    others = [submit("many", lambda size: "late") for _ in range(3)]
    gone = submit("many", lambda size: "in vain", wanted=False)
    assert submit("few", lambda size: "at once").result(20) == "at once"
    assert not any(one.done() for one in (first, *others, gone))
    gate.set()
    assert [one.result(20) for one in others] == ["late"] * 3
    with pytest.raises(Abandoned):
        gone.result(20)


def test_two_callers_who_come_at_once_have_a_process_each(own, monkeypatch):
    monkeypatch.setattr(compiler, "MAX_PROCESSES", 2)
    gate = threading.Event()

    def submit(caller, build):
        return own.submit('{"type": "null"}', build, caller=caller, wanted=lambda: True)

    submit("many", str).result(20)
    wait_for(lambda: own._idle == 1)
    with own._lock:  # both before the thread that waits has woken up
        held = submit("many", lambda size: gate.wait(20))
        other = submit("few", lambda size: "at once")
    try:
        assert other.result(20) == "at once"
    finally:
        gate.set()
    assert held.result(20)


def test_what_a_schema_came_to_is_remembered_of_those_that_were_used_last(own, monkeypatch):
    monkeypatch.setattr(compiler, "MAX_KNOWN", 2)
    checked, check = [], compiler._Process.check
    monkeypatch.setattr(
        compiler._Process, "check", lambda self, one: checked.append(one) or check(self, one)
    )
    for name in "abacab":
        schema = json.dumps({"const": name})
        own.submit(schema, str, caller="", wanted=lambda: True).result(20)
    assert [json.loads(one)["const"] for one in checked] == ["a", "b", "c", "b"]


def test_a_process_knows_nothing_of_the_services_settings(own, monkeypatch):
    monkeypatch.setenv("CRANE_DATABASE_URL", "a secret")
    own.submit('{"type": "null"}', str, caller="", wanted=lambda: True).result(20)
    [process] = processes()
    assert [name for name in process.environ() if name.startswith("CRANE_")] == []


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (SchemaRefused("no"), SchemaRefused),
        (Overloaded("no"), Overloaded),
        (SystemExit(), InternalError),
    ],
)
def test_whatever_happens_as_a_schema_is_compiled_its_caller_has_an_answer(own, error, seen):
    def build(size):
        raise error

    for _ in range(2):
        with pytest.raises(seen):
            own.submit('{"type": "null"}', build, caller="", wanted=lambda: True).result(20)


LIMITED = """
from backend import schema_process
schema_process.{limit}
schema_process.main()
"""


@pytest.mark.parametrize(
    ("limit", "schema", "codes", "answers"),
    [
        ("MEMORY = 2**24", HOSTILE["multiples"], {-signal.SIGABRT, 0}, ("", "MiB of memory")),
        ("CPU_S = 0.05", HOSTILE["multiples"], {-signal.SIGPROF}, ("",)),
        ("WALL_S = 0.05", HOSTILE["multiples"], {-signal.SIGALRM}, ("",)),
        ("MAX_KEPT = -1", {"type": "null"}, {0}, ("MiB of memory",)),
    ],
)
def test_a_process_ends_at_its_limits_of_memory_and_time(limit, schema, codes, answers):
    with started(LIMITED.format(limit=limit)) as (process, link):
        answer = asked(link, schema)
    assert process.wait(20) in codes
    assert any(one in answer if one else not answer for one in answers)


def test_a_process_that_has_kept_too_much_ends_once_it_has_answered():
    with started(LIMITED.format(limit="MAX_LEFT = -1")) as (process, link):
        assert asked(link, {"type": "null"}).endswith(LENGTH.pack(0).decode())  # no fault
        assert process.wait(20) == 0


@contextmanager
def started(code):
    """A process of its own, and this end of its socket."""
    mine, its = socket.socketpair()
    with mine, its:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=its.fileno(),
            stdout=its.fileno(),
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        its.close()
        mine.settimeout(30)
        yield process, mine


def asked(link, schema):
    data = json.dumps(schema).encode()
    link.sendall(LENGTH.pack(len(data)) + data)
    return link.recv(4096).decode("latin-1")


DIES = """
import os, signal, sys, time
from backend.adapters import compiler
compiler.submit(sys.argv[1], str, caller="", wanted=lambda: True)
while sys.stdin.readline():
    pass
"""


def test_a_process_ends_with_its_parent_also_while_it_is_at_work():
    schema = json.dumps(HOSTILE["patterns"])
    parent = subprocess.Popen([sys.executable, "-c", DIES, schema], stdin=subprocess.PIPE, cwd=ROOT)
    try:
        wait_for(lambda: psutil.Process(parent.pid).children())
        [child] = psutil.Process(parent.pid).children()
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdin.close()
    assert not wait_for_end([child], timeout_s=20)


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_document_whose_grammar_takes_too_long_is_ended_the_shortest_way(
    grammars, monkeypatch, tokens
):
    monkeypatch.setattr(grammar, "TOKEN_ALLOWANCE_S", 0)
    monkeypatch.setattr(grammar, "ALLOWANCE_S", 0 if not tokens else 60)
    schema = {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 3}
    constraint, ids = start(grammars[0], form(schema), 500), []
    import torch

    draw = torch.Generator().manual_seed(1)
    while not constraint.done:
        if len(ids) == tokens:
            constraint._allowance_s = 0
        scores = torch.randn(len(grammars[1]) + 5, generator=draw)
        constraint.mask(scores)
        ids.append(constraint.take(int(scores.argmax())))
    assert constraint.cut_short
    document = json.loads(grammars[1].decode(ids, skip_special_tokens=True))
    assert len(document) >= 3
    assert set(document) <= {"a", "b", "c"}


def test_a_document_that_was_ended_for_its_grammar_says_so(client, monkeypatch):
    monkeypatch.setattr(grammar, "ALLOWANCE_S", -60)
    answer = run(
        client, **as_format({"type": "array", "items": {"type": "integer"}, "minItems": 2})
    )
    assert answer.status_code == 200, answer.json
    assert len(json.loads(answer.json["output"])) == 2
    assert answer.json["metadata"]["finish_reason"] == "length"
