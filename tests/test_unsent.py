"""What clients leave unread, of streams too, takes so much memory of a worker and no more."""

from __future__ import annotations

import gc
import socket
from contextlib import ExitStack

import pytest

from backend.server.sockets import ClientSocket, Pace, Unsent
from tests.serving import wait_for
from tests.test_slow_clients import OTHER, clients, connect, dropped, echo


@pytest.mark.parametrize("stream", [False, True])
def test_unread_responses_take_so_much_memory_and_no_more(gunicorn, stream):
    server = gunicorn(CRANE_MAX_UNSENT="10MB", CRANE_CLIENT_TIMEOUT="10m")
    with clients(server, 5, echo(6_000_000, stream=stream)):
        wait_for(lambda: dropped(server, "crowded") == 4, timeout_s=60)
        # Of the threads that waited for a client, one does.
        ended = {"message": "request", "error": "CLIENT_CLOSED_REQUEST"}
        wait_for(lambda: len(server.log_lines(**ended)) == (4 if stream else 0))
        assert server.run()[0] == 200
        assert dropped(server, "crowded") == 4


@pytest.mark.parametrize("stream_size", [5_000_000, 9_000_000])
def test_a_stream_and_another_response_count_together_and_the_larger_goes(gunicorn, stream_size):
    server = gunicorn(CRANE_MAX_UNSENT="10MB", CRANE_CLIENT_TIMEOUT="10m")
    stream = echo(stream_size, stream=True)
    with connect(server, stream) as streaming, connect(server, echo(7_000_000), OTHER) as other:
        wait_for(lambda: dropped(server, "crowded") == 1)
        kept, gone = (streaming, other) if stream_size < 7_000_000 else (other, streaming)
        assert sum(map(len, iter(lambda: gone.recv(65536), b""))) < 7_000_000
        end = b"0\r\n\r\n" if kept is streaming else b"}}"
        answer = bytearray()
        while not answer.endswith(end):
            answer += kept.recv(65536)
        assert len(answer) > 5_000_000
    assert dropped(server, "crowded") == 1


def test_a_response_counts_whole_until_its_last_byte_is_taken():
    drops = []
    unsent = Unsent(12_000_000, lambda: drops.append(1))
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:

        def respond():
            """A response of which a third is not taken."""
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # what the kernel keeps
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            sock = stack.enter_context(ClientSocket(accepted, Pace(30, 1), "", unsent))
            sock.sendall(bytes(6_000_000))
            left = 4_000_000
            while left > 0 and not sock.is_dropped:
                left -= len(client.recv(left))
                sock.flush()
            return sock, client

        (first, _), (second, reader) = respond(), respond()
        assert 0 < first.unsent <= 2_000_000
        assert first.held == second.held == 6_000_000
        assert not drops
        respond()
        assert len(drops) == 1
        with pytest.raises(BrokenPipeError):  # the oldest of equals
            first.flush()
        while second.unsent:
            assert reader.recv(65536)
            second.flush()
        assert second.held == 0
        respond()
        assert len(drops) == 1


@pytest.fixture
def unread():
    """Makes a worker's sockets, each with a response that nobody reads; ``unread.drops`` counts."""
    drops = []
    with ExitStack() as stack:

        def make(max_bytes, *responses):
            unsent = Unsent(max_bytes, lambda: drops.append(1))
            for address, size in responses:
                accepted, there = socket.socketpair()
                stack.enter_context(there)
                sock = stack.enter_context(ClientSocket(accepted, Pace(30, 1), address, unsent))
                sock.sendall(bytes(size))
                yield sock

        make.drops = drops
        yield make


def test_the_largest_of_the_address_that_holds_most_is_dropped(unread):
    sizes = [("a", 3_000_000), ("b", 5_000_000), ("a", 4_000_000), ("c", 1_000_000)]
    socks = list(unread(12_000_000, *sizes))
    assert [sock.is_dropped for sock in socks] == [False, False, True, False]
    socks[2]._count()  # as its thread may, that has not seen its end
    assert len(unread.drops) == 1


def test_the_only_one_is_not_dropped_and_who_has_closed_counts_no_more(unread):
    for sock in unread(1_000_000, ("a", 5_000_000), ("b", 5_000_000)):
        assert sock.held == 5_000_000
        sock.close()
    assert not unread.drops


def test_what_a_client_takes_at_once_takes_no_lock():
    accepted, there = socket.socketpair()
    unsent = Unsent(0, lambda: None)
    with there, unsent._lock, ClientSocket(accepted, Pace(30, 1), "", unsent) as sock:
        sock.sendall(b"all of it")
        assert there.recv(100) == b"all of it"


def test_a_stream_keeps_neither_its_input_nor_its_output_once_that_is_written(make_app):
    body = b'{"model_id": "echo", "input": {"any": [0.8125, 1]}, "stream": true}'
    client = make_app().test_client()
    response = client.post("/crane/run", data=body, content_type="application/json")

    def found():
        gc.collect()  # what the engine in this process has
        lists = [one for one in gc.get_objects() if type(one) is list and len(one) == 2]
        return sum(type(one[0]) is float and one[0] == 0.8125 for one in lists)

    for text in response.response:
        if text.startswith(b"event: output"):
            assert b"[0.8125,1]" in text
            assert found() == 0
            break
    else:
        pytest.fail("there was no output")
    assert b"event: done" in b"".join(response.response)
