"""Messages between processes: whole, in order, and nobody waits."""

from __future__ import annotations

import random
import socket

import pytest

from backend.engine.channel import READ, Channel


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    channels = Channel(one), Channel(other)
    yield channels
    for channel in channels:
        channel.close()


def test_messages_of_every_size_come_whole_and_in_order(ends):
    one, other = ends
    draw = random.Random(1)
    sizes = [0, 1, 3, 4, 5, READ - 5, READ - 4, READ - 3, READ, 3 * READ, 5_000_000]
    sizes += [draw.randrange(200_000) for _ in range(60)]
    sent = [draw.randbytes(size) for size in sizes]
    got = []
    for message in sent:
        one.send(message)
        if draw.random() < 0.5:
            got += other.receive()
    while len(got) < len(sent):
        one.flush()
        got += other.receive()
    assert got == sent
    assert one.flush() is True


def test_what_the_other_end_does_not_take_is_kept_and_nobody_waits(ends):
    one, other = ends
    assert one.send(b"small") is True
    assert one.send(bytes(5_000_000)) is False
    assert one.send(b"last") is False
    assert list(other.receive()) == [b"small"]
    got = []
    while len(got) < 2:
        one.flush()
        got += other.receive()
    assert got == [bytes(5_000_000), b"last"]
    assert list(other.receive()) == []


def test_any_number_of_messages_may_wait(ends):
    one, other = ends
    one.send(bytes(1_000_000))
    for number in range(3000):
        one.send(b"%d" % number)
    got = []
    while len(got) < 3001:
        got += other.receive()
        one.flush()
    assert got[1:] == [b"%d" % number for number in range(3000)]


def test_an_end_that_is_closed_is_told(ends):
    one, other = ends
    one.send(b"whole")
    assert list(other.receive()) == [b"whole"]
    one._end.send(b"\0\0\0\5ha")  # and no more of it
    assert list(other.receive()) == []
    one.close()
    assert one.closed
    with pytest.raises(EOFError):
        list(other.receive())
    with pytest.raises(OSError, match="Broken pipe"):
        other.send(b"nobody")
