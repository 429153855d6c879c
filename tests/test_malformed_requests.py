"""What is no sound HTTP request is refused as such, over a real socket, and holds up nobody."""

from __future__ import annotations

import json
import socket

import pytest

from tests.conftest import ECHO, write_models
from tests.serving import Gunicorn

BODY = b'{"model_id": "echo", "input": "hi"}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
FORM = b"multipart/form-data; boundary=XX"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    server = Gunicorn(write_models(folder, [ECHO]), folder / "data", {"CRANE_MAX_BODY": "100KB"})
    yield server.wait_until_ready()
    server.stop()


def exchange(server, data, *, end=False, timeout_s=20):
    """All that comes back until the server closes; ``end`` closes our sending half before."""
    with socket.create_connection(("127.0.0.1", server.port), timeout_s) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def post(*headers, body=BODY, path=b"/crane/run", kind=b"application/json"):
    """A request that asks for its connection's end."""
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: [::1]", b"Connection: close"]
    lines += [b"Content-Type: " + kind] if kind else []
    return b"\r\n".join([*lines, b"".join(headers)]) + b"\r\n" + body


def form(*parts, end=b"--XX--\r\n", kind=FORM):
    body = b"".join(b"--XX\r\n" + part + b"\r\n" for part in parts) + end
    return post(b"Content-Length: %d\r\n" % len(body), body=body, kind=kind)


def part(disposition, value=b"echo", *more):
    return b"\r\n".join([b"Content-Disposition: " + disposition, *more, b"", value])


NAME = b'form-data; name="model_id"'
MALFORMED = {
    # The request line and the head.
    "http 0.9": b"GET /livez\r\n",
    "no version": b"GET /livez \r\nHost: x\r\n\r\n",
    "a future version": b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "http 2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "lines that end in lf": b"GET /livez HTTP/1.1\nHost: x\n\n",
    "a nul in the path": b"GET /li\0vez HTTP/1.1\r\nHost: x\r\n\r\n",
    "a nul in a header": b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: a\0b\r\n\r\n",
    "a header without a colon": b"GET /livez HTTP/1.1\r\nHost x\r\n\r\n",
    "a header with a space": b"GET /livez HTTP/1.1\r\nX A: b\r\n\r\n",
    "a folded header": b"GET /livez HTTP/1.1\r\nX-A: b\r\n c\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "a long line": b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "an endless line": b"GET /" + b"a" * 100_000,
    "an endless head": b"GET /livez HTTP/1.1\r\n" + b"X-A: b\r\n" * 10_000,
    "a large header": b"GET /livez HTTP/1.1\r\nX-A: " + b"b" * 9_000 + b"\r\n\r\n",
    "many headers": b"GET /livez HTTP/1.1\r\n" + b"X-A: b\r\n" * 200 + b"\r\n",
    "another expectation": post(LENGTH, b"Expect: magic\r\n"),
    "a target of nobody": b"GET livez HTTP/1.1\r\nHost: x\r\n\r\n",
    # Lengths.
    "a negative length": post(b"Content-Length: -1\r\n"),
    "a length of no digits": post(b"Content-Length: 1e3\r\n"),
    "a length of other digits": post("Content-Length: ٣\r\n".encode()),
    "two lengths": post(LENGTH, LENGTH),
    "a length and chunks": post(LENGTH, CHUNKED, body=b"0\r\n\r\n"),
    "another coding": post(b"Transfer-Encoding: gzip\r\n"),
    "an unknown coding": post(b"Transfer-Encoding: cow, chunked\r\n"),
    "chunks twice": post(b"Transfer-Encoding: chunked, chunked\r\n"),
    "chunks in http 1.0": post(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "no body": post(b"Content-Length: 0\r\n", body=b""),
    "a body above the limit": post(b"Content-Length: 100001\r\n", body=b""),
    "an absurd length": post(b"Content-Length: " + b"9" * 30 + b"\r\n", body=b""),
    # Chunks.
    "a chunk size of no digits": post(CHUNKED, body=b"zz\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a negative chunk size": post(CHUNKED, body=b"-5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "an empty chunk size": post(CHUNKED, body=b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "an endless chunk size": post(CHUNKED, body=b"1" * 50_000),
    "a bad chunk extension": post(CHUNKED, body=b"5;\x01\r\nhello\r\n0\r\n\r\n"),
    "chunks of a byte": post(
        CHUNKED, body=b"1\r\n \r\n" * 5_000 + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    ),
    "a chunk that is too long": post(CHUNKED, body=b"3\r\nhello\r\n0\r\n\r\n"),
    "a bad trailer": post(CHUNKED, body=b"%x\r\n%s\r\n0\r\nX A\r\n\r\n" % (len(BODY), BODY)),
    "a forbidden trailer": post(
        CHUNKED, body=b"%x\r\n%s\r\n0\r\nHost: y\r\n\r\n" % (len(BODY), BODY)
    ),
    "chunks above the limit": post(CHUNKED, body=b"186a1\r\n" + b"a" * 100_001 + b"\r\n0\r\n\r\n"),
    # Forms.
    "no boundary": post(LENGTH, kind=b"multipart/form-data"),
    "an empty boundary": form(part(NAME), kind=b'multipart/form-data; boundary=""'),
    "another boundary": form(part(NAME), kind=b"multipart/form-data; boundary=YY"),
    "a boundary of other characters": form(
        part(NAME), kind="multipart/form-data; boundary=é\u00a0".encode("latin-1")
    ),
    "an endless boundary": form(part(NAME), kind=FORM + b"X" * 5_000),
    "no last boundary": form(part(NAME), end=b""),
    "no parts": form(),
    "a part without a name": form(part(b"form-data")),
    "an empty name": form(part(b'form-data; name=""')),
    "a part that is no form's": form(part(b"attachment")),
    "a part without a disposition": form(b"X-A: b\r\n\r\necho"),
    "a part without headers": form(b"\r\necho"),
    "a part that is one line": form(b"echo"),
    "a file without a name of its part": form(part(b'form-data; filename="a.png"')),
    "a file name of other bytes": form(part(b'form-data; name="a"; filename="\xff\xfe"')),
    "a file name with a nul": form(part(b'form-data; name="a"; filename="a\0b"')),
    "a bad encoded file name": form(part(b"form-data; name=a; filename*=cow''%FF%00")),
    "a name of other bytes": form(part(b'form-data; name="\xff\xfe"')),
    "a bad encoded name": form(part(b"form-data; name*=utf-8''%FF")),
    "a part's unknown charset": form(part(NAME, b"e", b"Content-Type: text/plain; charset=cow")),
    "a part of bad utf-8": form(part(NAME, b"\xff\xfe")),
    "a part's header without a colon": form(part(NAME, b"echo", b"X-A")),
    "a part's own length": form(part(NAME, b"echo", b"Content-Length: -1")),
    "a bad encoding of a part": form(part(NAME, b"e", b"Content-Transfer-Encoding: cow")),
    "options as a file of other bytes": form(
        part(NAME), part(b'form-data; name="options"; filename="o"', b"\xff")
    ),
    "too many parts": form(*[part(b'form-data; name="input.a%d"' % n) for n in range(101)]),
    "a part with a large header": form(part(NAME, b"echo", b"X-A: " + b"b" * 90_000)),
    # Bodies.
    "bad utf-8": post(b"Content-Length: 2\r\n", body=b"\xff\xfe"),
    "a nul": post(b"Content-Length: 1\r\n", body=b"\0"),
    "a content type of other bytes": post(LENGTH, kind=b"\xff/\xfe; charset=\xfd"),
    "no content type": post(LENGTH, kind=b""),
    # Paths and methods.
    "an empty segment": post(LENGTH, path=b"/crane//run"),
    "a slash at the end": post(LENGTH, path=b"/crane/run/"),
    "another host's path": post(LENGTH, path=b"http://evil.example//crane//run"),
    "bad utf-8 in the path": post(LENGTH, path=b"/crane/%ff"),
    "a nul in the path, encoded": post(LENGTH, path=b"/crane/models/%00"),
    "connect": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "trace": b"TRACE /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "an unknown method": b"BREW /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a bad query": post(LENGTH, path=b"/crane/nope?a=%ff&b[]=%"),
}
CUT_SHORT = {
    "a head": b"POST /crane/run HTTP/1.1\r\nHost: [::1]\r\n",
    "a body": post(b"Content-Length: 100\r\n"),
    "a large body": post(b"Content-Length: 90000\r\n"),
    "a chunk": post(CHUNKED, body=b"40\r\n" + BODY),
    "a chunk size": post(CHUNKED, body=b"4"),
    "the last chunk": post(CHUNKED, body=b"%x\r\n%s\r\n" % (len(BODY), BODY)),
    "the trailers": post(CHUNKED, body=b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)),
    "a form": form(part(NAME)).replace(b"Content-Length: ", b"Content-Length: 9"),
}


def refused(answer):
    """The status of the one answer that there is; it is in the service's own shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    status = int(lines[0].split()[1])
    assert not [line for line in lines if line.lower().startswith(b"location")]
    assert b"X-Content-Type-Options: nosniff" in lines
    error = json.loads(body)["error"]
    assert error["code"] != "INTERNAL_ERROR"
    assert error["message"]
    return status


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_a_4xx_in_our_shape(server, request_):
    assert 400 <= refused(exchange(server, request_)) < 500


@pytest.mark.parametrize("request_", CUT_SHORT.values(), ids=CUT_SHORT)
def test_a_request_that_is_cut_short_is_a_400(server, request_):
    assert refused(exchange(server, request_, end=True)) == 400


@pytest.mark.parametrize(
    "body",
    [
        b"186a1\r\n",
        b"f" * 16 + b"\r\n" + BODY,
        b"f" * 8_000 + b"\r\n",
        b"1\r\n{\r\n186a0\r\n",
    ],
)
@pytest.mark.parametrize("kind", [b"application/json", FORM])
def test_a_chunk_above_the_limit_is_refused_before_it_comes(server, body, kind):
    request = post(CHUNKED, body=body, kind=kind).replace(b"Connection: close\r\n", b"")
    assert refused(exchange(server, request)) == 413


@pytest.mark.parametrize(
    "request_", [post(CHUNKED, body=b"zz\r\n"), post(b"Content-Length: 9\r\n")]
)
def test_openais_clients_are_refused_in_their_own_shape(server, request_):
    answer = exchange(server, request_.replace(b"/crane/run", b"/v1/embeddings"), end=True)
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) >= {"type", "param"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/crane/run", {"POST", "OPTIONS"}),
        ("DELETE", "/crane/models", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/livez", {"GET", "HEAD", "OPTIONS"}),
        ("PUT", "/v1/embeddings", {"POST", "OPTIONS"}),
    ],
)
def test_a_405_says_what_is_allowed(server, method, path, allowed):
    status, headers, _ = server.request(method, path)
    assert (status, set(headers["Allow"].split(", "))) == (405, allowed)


@pytest.mark.parametrize(
    ("first", "answers"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200]),
        (b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200]),
        (b"OPTIONS /livez HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200]),
        (b"\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n", [200, 200]),
        (post(LENGTH).replace(b"Connection: close\r\n", b""), [200, 200]),
        (post(LENGTH, path=b"/nope").replace(b"Connection: close\r\n", b""), [404, 200]),
        (post(LENGTH, path=b"//crane/run").replace(b"Connection: close\r\n", b""), [200, 200]),
        # An upgrade that nobody takes is passed over.
        (
            b"GET /livez HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: a\r\n\r\n",
            [200, 200],
        ),
        # What comes after a body that was refused unread, or after a fault, is never a request.
        (post(CHUNKED, body=b"zz\r\n").replace(b"Connection: close\r\n", b""), [400]),
        (post(CHUNKED, path=b"/nope", body=b"").replace(b"Connection: close\r\n", b""), [404]),
        (post(b"Content-Length: 99999\r\n", path=b"/nope", body=b""), [404]),
        (b"GET /livez HTTP/1.0\r\n\r\n", [200]),
    ],
)
def test_requests_one_behind_the_other_are_answered_each_or_not_at_all(server, first, answers):
    last = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = exchange(server, first + last)
    statuses = [int(piece[:3]) for piece in answer.split(b"HTTP/1.1 ")[1:]]
    statuses += [int(piece[:3]) for piece in answer.split(b"HTTP/1.0 ")[1:]]
    assert statuses == answers


def test_no_fault_of_a_request_is_ours(server):
    """The last of this module: what the others sent has left nothing in the log."""
    assert server.get("/livez")[0] == 200
    assert "Traceback" not in server.log()
    assert server.log_lines(level="ERROR") == []
