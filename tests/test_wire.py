"""What an HTTP worker and an engine send each other: whatever it is, both go on serving."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import msgpack
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.channel import VERSION, Channel
from backend.config import Config
from backend.engine import wire
from backend.engine.calls import Answer, Call, Event
from backend.engine.remote import RemoteEngine
from backend.errors import CraneError, InternalError, ModelUnavailable, Overloaded, PayloadTooLarge
from backend.media import Media
from backend.messages import BESIDE, BadMessage, pack, unpack
from tests.conftest import ECHO, write_models
from tests.serving import ROOT, wait_for

SMALL = {"CRANE_MAX_PIXELS": "100000", "CRANE_MAX_AUDIO": "1s", "CRANE_MAX_BODY": "1MiB"}


@contextmanager
def reaching(config):
    remote = RemoteEngine(config, start_s=30)
    yield remote
    if channel := getattr(remote._local, "channel", None):
        channel.close()


def answers(remote):
    with suppress(ModelUnavailable):
        return remote.look()


@contextmanager
def engine_process(folder, **env):
    """A real engine with ``echo``: its process, and the settings that reach it."""
    env |= {
        "CRANE_MODELS": str(write_models(folder, [ECHO])),
        "CRANE_ENGINE": "process",
        "CRANE_ENGINE_SOCKET": str(folder / "engine.sock"),
        "CRANE_DEVICES": "cpu",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    with subprocess.Popen(
        [sys.executable, "-m", "backend.engine.server", "0"],
        cwd=ROOT,
        env=others | env,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        config = Config.from_env(env)
        with reaching(config) as remote:
            try:
                wait_for(lambda: answers(remote), 60)
                yield process, config, remote
            finally:
                process.stdin.close()
                process.wait(30)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    with engine_process(folder, CRANE_MAX_OUTPUT="4GiB") as (_, _, remote):
        yield remote


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """An engine whose settings allow little, for what is sent to it by hand."""
    with engine_process(tmp_path_factory.mktemp("hostile"), **SMALL) as running:
        yield running


def call(*inputs, **changed):
    return Call(
        **{
            "request_id": "r",
            "model_id": "echo",
            "inputs": list(inputs),
            "options": {"delay_ms": 0},
            "seeds": None,
            "timeout_s": 60.0,
        }
        | changed
    )


def still_serves(remote, process):
    """On the same connection as ever."""
    channel = getattr(remote._local, "channel", None)
    assert remote.run(call("still there")).outputs == ["still there"]
    assert channel in (None, remote._local.channel)
    assert process.poll() is None


# What settings allow goes through, both ways.


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param([{"samples": np.zeros(1650 * 16_000, np.float32)}], id="28 min of sound"),
        pytest.param([np.zeros((38, 720, 1280, 3), np.uint8)], id="38 frames of 720p"),
        pytest.param([np.full(2_000_000, i, np.float64) for i in range(8)], id="eight together"),
        pytest.param(["x" * 110_000_000], id="one text"),
    ],
)
def test_a_message_above_100_mib_goes_both_ways(engine, inputs):
    outputs = engine.run(call(*inputs)).outputs
    assert len(outputs) == len(inputs)
    for output, sent in zip(outputs, inputs, strict=True):
        if isinstance(sent, dict):
            output, sent = output["samples"], sent["samples"]
        assert np.array_equal(output, sent)


def test_as_many_inputs_as_a_call_may_have_go_both_ways(engine):
    pictures = [np.full((160, 160, 3), i % 256, np.uint8) for i in range(1000)]
    outputs = engine.run(call(*pictures)).outputs
    assert all(map(np.array_equal, outputs, pictures))


def test_what_is_above_the_bound_is_refused_and_the_connection_stays(hostile):
    process, config, remote = hostile
    with pytest.raises(PayloadTooLarge, match="Send fewer inputs"):
        remote.run(call("x" * config.max_message))
    with pytest.raises(PayloadTooLarge, match="CRANE_MAX_OUTPUT"):
        remote.run(call("x" * config.max_output))
    still_serves(remote, process)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, 2.5, "ü", True, None, {"b": []}]},
        np.arange(10, dtype=np.int64),
        np.zeros(0, np.float32),
        np.array(3.5),
        np.asfortranarray(np.arange(600_000, dtype=np.float16).reshape(200, 3000)),
        np.arange(100_000, dtype=np.uint8)[::2],
        np.zeros((BESIDE, 0, 3), np.uint8),
        Media("image/png", b"small"),
        Media("video/mp4", bytes(BESIDE)),
        [np.ones(BESIDE, bool), {"of": Media("a/b", b"x" * BESIDE)}, np.ones(3, np.uint8)],
    ],
    ids=repr,
)
def test_values_come_back_as_they_were(value):
    def same(one, other):
        if isinstance(one, np.ndarray):
            return one.dtype == other.dtype and np.array_equal(one, other)
        if isinstance(one, list):
            return len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        return one == other

    parts = pack(value)
    assert same(value, unpack(parts))
    assert all(len(part) >= BESIDE for part in parts[1:])


@pytest.mark.parametrize("value", [object(), np.array([object()]), np.array(["text"]), {1, 2}])
def test_what_does_not_travel_is_said_at_once(value):
    with pytest.raises(TypeError, match="does not travel"):
        pack([value])


# Hostile messages.

_GOOD = call("x").to_wire()
_EXT = msgpack.ExtType


def array(dtype, shape, data, part=0):
    return _EXT(1, msgpack.packb((part, dtype, shape)) + data)


def frame(*parts, version=VERSION):
    lengths = b"".join(struct.pack(">Q", len(part)) for part in parts)
    return struct.pack(">BI", version, len(parts)) + lengths + b"".join(parts)


def packed(value):
    return msgpack.packb(value)


WRONG = {
    "a call of one field": packed({"request_id": "r"}),
    "a field too many": packed({**_GOOD, "more": 1}),
    "a field too few": packed({k: v for k, v in _GOOD.items() if k != "caller"}),
    **{
        f"{name} of a wrong type": packed({**_GOOD, name: (1,) if name == "caller" else b"\xff"})
        for name in _GOOD
    },
    "no inputs": packed({**_GOOD, "inputs": []}),
    "inputs that run never": packed({**_GOOD, "repeat": 0}),
    "inputs that run without end": packed({**_GOOD, "repeat": 2**40}),
    "a seed for each input of several runs": packed({**_GOOD, "seeds": [1], "repeat": 2}),
    "seeds for others": packed({**_GOOD, "seeds": [1, 2]}),
    "a seed that is a text": packed({**_GOOD, "seeds": ["1"]}),
    "an endless timeout": packed({**_GOOD, "timeout_s": float("inf")}),
    "no time at all": packed({**_GOOD, "timeout_s": float("nan")}),
    "a boolean for a number": packed({**_GOOD, "timeout_s": True}),
    "options with numbers for names": packed({**_GOOD, "options": {1: 2}}),
    "an unknown order": packed(["reboot", "echo"]),
    "an order too short": packed(["load"]),
    "an order of numbers": packed([1, 2]),
    "a number": packed(7),
    "nothing": b"",
    "two values": packed(None) + packed(None),
    "deep nesting": b"\x91" * 100_000 + b"\xc0",
    "nesting of maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "an absurd list": b"\xdd\xff\xff\xff\xff",
    "an absurd map": b"\xdf\xff\xff\xff\xff",
    "an absurd text": b"\xdb\xff\xff\xff\xff",
    "an absurd extension": b"\xc9\xff\xff\xff\xff\x01",
    "a map with a list for a name": b"\x81\x90\xc0",
    "text that is no UTF-8": b"\xa2\xff\xfe",
    "an unknown extension": packed(_EXT(77, packed((0,)))),
    "a time": b"\xd6\xff\0\0\0\0",
    "an extension without a head": packed(_EXT(1, b"")),
    "an extension with a long head": packed(_EXT(1, b"\xdb\x00\xff\xff\xff" + b"x" * 70_000)),
    "an array of pointers": packed(array("|O", [1], b"\x10" * 8)),
    "an array of records": packed(array("V8", [1], b"\x10" * 8)),
    "an array of no type": packed(array("?!", [1], b"\0")),
    "an array longer than it is": packed(array("<f8", [1000], b"\0" * 8)),
    "an array of a negative shape": packed(array("<f4", [-1, -2], b"\0" * 8)),
    "an array of an absurd shape": packed(array("<f4", [2**40, 2**40, 0], b"")),
    "an array with a shape of texts": packed(array("<f4", ["1"], b"\0" * 4)),
    "an array of 64 dimensions": packed(array("<f4", [1] * 64, b"\0" * 4)),
    "an array of a part that is not there": packed(array("<f4", [1], b"", part=5)),
    "an array of a negative part": packed(array("<f4", [1], b"", part=-1)),
    "a file without a type": packed(_EXT(2, packed((0,)) + b"x")),
}


@pytest.mark.parametrize("wrong", [name for name in WRONG if "array" in name or "exten" in name])
def test_no_array_and_no_file_is_believed(wrong):
    with pytest.raises(BadMessage):
        unpack([WRONG[wrong]])
    with pytest.raises(BadMessage):
        unpack([b"\x91" + WRONG[wrong], bytes(BESIDE)])


def ends(config, data, *, half=False):
    """Send bytes; return once the engine has closed the connection, or has had them all."""
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(20)
        end.connect(str(config.engine_sockets[0]))
        try:
            end.sendall(data)
            if half:
                end.shutdown(socket.SHUT_WR)
            return end.recv(1)
        except OSError:  # it closed before it had read everything
            return b""


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_message_closes_its_connection_and_no_other(hostile, wrong):
    process, config, remote = hostile
    assert ends(config, frame(WRONG[wrong])) == b""
    still_serves(remote, process)


@pytest.mark.parametrize("wrong", WRONG)
def test_an_http_worker_takes_no_wrong_message_for_an_answer(wrong):
    with pytest.raises(BadMessage):
        wire.unpack_answer("r", [WRONG[wrong]])
    with pytest.raises(BadMessage):
        wire.unpack_status([WRONG[wrong]])


@pytest.mark.parametrize(
    "message",
    [
        {"id": "other", "answer": None},
        {"id": "r"},
        {"id": "r", "answer": None, "event": None},
        {"id": "r", "answer": {"outputs": []}},
        {"id": "r", "event": "delta"},
        {"id": "r", "event": ["delta", {}, 1]},
        {"id": "r", "error": {"code": "TIMEOUT_ERROR"}},
        {"id": "r", "error": None},
        {
            "id": "r",
            "error": {
                "code": "INVALID_API_KEY",
                "message": "x",
                "details": {},
                "retry_after_s": None,
            },
        },
    ],
    ids=repr,
)
def test_an_answer_of_another_shape_is_refused(message):
    with pytest.raises(BadMessage):
        wire.unpack_answer("r", pack(message))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        Event("delta", {"index": 0, "text": "x"}),
        Answer(
            outputs=[1],
            usage=[{}],
            facts=[{}],
            applied=[{}],
            revision=None,
            device="cpu",
            dtype="none",
            batch_size=1,
            timings_ms={"queue": 0.1},
        ),
    ],
    ids=repr,
)
def test_an_answer_travels_whole(answer):
    assert wire.unpack_answer("r", wire.pack_answer("r", answer)) == answer


@pytest.mark.parametrize("error", [Overloaded("full", retry_after_s=2), InternalError()], ids=repr)
def test_an_error_travels_whole(error):
    told = wire.unpack_answer("r", wire.pack_answer("r", error))
    assert isinstance(told, CraneError)
    assert (type(told), told.message) == (type(error), error.message)
    assert told.retry_after_s == error.retry_after_s


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame(packed(_GOOD), version=VERSION + 1), id="a version to come"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP"),
        pytest.param(struct.pack(">BIQ", VERSION, 1, 2**63), id="an absurd length"),
        pytest.param(struct.pack(">BI", VERSION, 2**32 - 1), id="an absurd count"),
        pytest.param(frame(packed(_GOOD)) * 2, id="two calls at once"),
    ],
)
def test_a_wrong_head_closes_its_connection_and_no_other(hostile, data):
    process, config, remote = hostile
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(20)
        end.connect(str(config.engine_sockets[0]))
        end.sendall(data)
        while end.recv(65536):  # until it is closed
            pass
    still_serves(remote, process)


def test_any_message_that_is_cut_short_is_only_forgotten(hostile):
    process, config, remote = hostile
    whole = frame(packed(_GOOD), bytes(200_000))
    for size in (1, 4, 5, 12, 13, 21, 22, 60, len(whole) - 200_000, len(whole) - 1):
        assert ends(config, whole[:size], half=True) == b""
    still_serves(remote, process)


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(_EXT, st.integers(0, 127), st.binary(max_size=40)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)
_calls = st.dictionaries(st.sampled_from(sorted(_GOOD)), _values, max_size=3).map(
    lambda changed: packed({**_GOOD, **changed})
)


@given(
    body=_calls | _values.map(packed) | st.binary(max_size=200),
    others=st.lists(st.binary(max_size=40), max_size=2),
    flip=st.none() | st.integers(0, 2**20),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_message_ends_the_engine_or_its_other_connections(hostile, body, others, flip):
    process, config, remote = hostile
    data = bytearray(frame(body, *others))
    if flip is not None:
        data[flip % len(data)] ^= 1 << flip % 8
    ends(config, bytes(data), half=True)
    assert process.poll() is None
    still_serves(remote, process)


def test_promises_cost_the_engine_no_memory(hostile):
    process, config, remote = hostile
    before = psutil.Process(process.pid).memory_info().rss
    promised = config.max_message
    half = [socket.socket(socket.AF_UNIX) for _ in range(50)]
    for end in half:
        end.connect(str(config.engine_sockets[0]))
        end.sendall(struct.pack(">BIQ", VERSION, 1, promised) + bytes(1000))
    still_serves(remote, process)
    grown = psutil.Process(process.pid).memory_info().rss - before
    for end in half:
        end.close()
    assert grown < 2**26 < 50 * promised


@pytest.mark.parametrize("answer", [frame(b"\x07"), b"GET / HTTP/1.1\r\n\r\n", frame(b"")])
@pytest.mark.parametrize("ask", ["run", "look", "control"])
def test_an_http_worker_outlives_an_engine_that_talks_nonsense(tmp_path, answer, ask):
    path = tmp_path / "engine.sock"
    config = Config(engine="process", engine_socket=path, devices=("cpu",))

    def talk():
        end, _ = listener.accept()
        with end:
            end.recv(65536)
            end.sendall(answer)
            end.recv(1)  # until the other side has had enough

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(config.engine_sockets[0]))
        listener.listen()
        thread = threading.Thread(target=talk)
        thread.start()
        with reaching(config) as remote:
            ways = {
                "run": lambda: remote.run(call("x")),
                "look": remote.look,
                "control": lambda: remote.control("load", "echo"),
            }
            with pytest.raises(ModelUnavailable, match="could not be read"):
                ways[ask]()
        thread.join(20)
        assert not thread.is_alive()


def test_a_channel_is_not_read_on_after_what_was_no_message():
    one, other = socket.socketpair()
    with one, other:
        one.sendall(frame(b"\xc0") + b"\xff" * 20)
        channel = Channel(other, max_bytes=1000)
        with pytest.raises(BadMessage):
            channel.receive()


def test_a_call_whose_usage_is_asked_for_is_given_up(tmp_path):
    """Or it may begin after it was told to have used nothing, and so be free."""
    with engine_process(tmp_path) as (_, _, remote):

        def running():
            return remote.look()["models"]["echo"]["running"]

        ticket = remote._submit(call(1, options={"delay_ms": 60_000}))
        wait_for(running, 30)
        assert remote._used(ticket) == {}
        wait_for(lambda: not running(), 30)
