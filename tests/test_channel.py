"""Messages between processes: whole, in order, nobody waits, and nothing that comes is believed."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress

import numpy as np
import psutil
import pytest

from backend.channel import MAX_PARTS, READ, VERSION, Channel, MessageTooLarge
from backend.messages import BadMessage

MAX_BYTES = 20_000_000


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    channels = Channel(one, max_bytes=MAX_BYTES), Channel(other, max_bytes=MAX_BYTES)
    yield channels
    for channel in channels:
        channel.close()


def received(channel):
    return [[bytes(part) for part in message] for message in channel.receive()]


def head(*lengths, version=VERSION, count=None):
    count = len(lengths) if count is None else count
    return struct.pack(">BI", version, count) + b"".join(struct.pack(">Q", n) for n in lengths)


def test_messages_of_every_size_come_whole_and_in_order(ends):
    one, other = ends
    draw = random.Random(1)
    sizes = [[0], [1], [3, 4], [5], [READ - 14], [READ - 13], [READ - 12], [READ, 0, READ + 1]]
    sizes += [[3 * READ], [5_000_000, 1, 5_000_000]]
    sizes += [[draw.randrange(200_000) for _ in range(draw.choice([1, 1, 3]))] for _ in range(60)]
    sent = [[draw.randbytes(size) for size in message] for message in sizes]
    got = []
    for message in sent:
        one.send(message)
        if draw.random() < 0.5:
            got += received(other)
    while len(got) < len(sent):
        one.flush()
        got += received(other)
    assert got == sent
    assert one.flush() is True


def test_what_the_other_end_does_not_take_is_kept_and_nobody_waits(ends):
    one, other = ends
    assert one.send([b"small"]) is True
    assert one.send([bytes(5_000_000)]) is False
    assert one.send([b"last"]) is False
    assert received(other) == [[b"small"]]
    got = []
    while len(got) < 2:
        one.flush()
        got += received(other)
    assert got == [[bytes(5_000_000)], [b"last"]]
    assert received(other) == []


def test_any_number_of_messages_may_wait(ends):
    one, other = ends
    one.send([bytes(1_000_000)])
    for number in range(3000):
        one.send([b"%d" % number])
    got = []
    while len(got) < 3001:
        got += received(other)
        one.flush()
    assert got[1:] == [[b"%d" % number] for number in range(3000)]


def test_an_end_that_is_closed_is_told(ends):
    one, other = ends
    one.send([b"whole"])
    assert received(other) == [[b"whole"]]
    one._end.send(head(5) + b"ha")  # and no more of it
    assert received(other) == []
    one.close()
    assert one.closed
    with pytest.raises(EOFError):
        received(other)
    with pytest.raises(OSError, match="Broken pipe"):
        other.send([b"nobody"])


def test_a_message_above_the_bound_is_not_sent_at_all(ends):
    one, other = ends
    for message in ([bytes(MAX_BYTES + 1)], [b""] * (MAX_PARTS + 1)):
        with pytest.raises(MessageTooLarge):
            one.send(message)
    assert one.send([b"the next"]) is True
    assert received(other) == [[b"the next"]]


@pytest.mark.parametrize("size", [0, 1, 100, 101, 5000])
def test_what_is_above_the_bound_of_who_receives_it_is_refused(size):
    one, other = socket.socketpair()
    with one, other:
        sends, receives = Channel(one, max_bytes=10_000), Channel(other, max_bytes=100)
        sends.send([b"x" * size])
        if size <= 100:
            assert received(receives) == [[b"x" * size]]
        else:
            with pytest.raises(BadMessage, match="100 is the most"):
                receives.receive()


def test_an_end_that_reads_nothing_is_given_up_before_memory_is(ends):
    one, other = ends
    while one._out_bytes <= MAX_BYTES:
        one.send([bytes(1_000_000)])
    with pytest.raises(OSError, match="does not read"):
        one.send([bytes(1_000_000)])
    sent = list(iter(lambda: other._end.recv(READ), b""))  # and then its end
    assert sum(map(len, sent)) < MAX_BYTES


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(head(5, version=0), id="another version"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
        pytest.param(head(count=0), id="no parts"),
        pytest.param(head(count=MAX_PARTS + 1), id="too many parts"),
        pytest.param(head(MAX_BYTES + 1), id="too long"),
        pytest.param(head(2**64 - 1), id="absurdly long"),
        pytest.param(head(MAX_BYTES, 1), id="too long together"),
    ],
)
def test_a_head_that_is_none_is_refused(ends, wrong):
    one, other = ends
    one._end.sendall(wrong)
    with pytest.raises(BadMessage):
        other.receive()


def test_memory_is_taken_as_bytes_come_and_not_as_they_are_promised():
    one, other = socket.socketpair()
    with one, other:
        channel = Channel(other, max_bytes=2**40)
        one.sendall(head(2**36) + b"x" * 1000)
        before = psutil.Process().memory_info().rss
        with suppress(MemoryError):  # which is as good
            assert received(channel) == []
        assert psutil.Process().memory_info().rss - before < 2**26


def test_a_large_part_arrives_where_an_array_can_stay(ends):
    one, other = ends
    sent = np.arange(1_000_000, dtype=np.uint32)
    one.send([b"", sent.data.cast("B")])
    messages = []
    while not messages:
        one.flush()
        messages = other.receive()
    [[_, part]] = messages
    assert np.array_equal(np.frombuffer(part, np.uint32), sent)
