"""What a caller's URL can reach: allowed public hosts over TLS, within a size and a time.

The server, its TLS and the sockets are real. Only the network's edge is bent: some names resolve
to addresses of our choice, public addresses lead to the test's server on this machine, and all
others to a listener that must never hear anything.
"""

from __future__ import annotations

import re
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import tracemalloc

import pytest
import trustme

from backend.media import Refused
from backend.media.fetch import fetch, media_hosts

PUBLIC, OTHER, SIXTH = "93.184.215.14", "93.184.215.15", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
NAMES = ["media.example.com", "cdn.example.com", "a.b.example.com", "elsewhere.example.net"]
ALLOWED = "media.example.com:PORT"
SITE = f"https://{ALLOWED}"
REAL_LOOKUP, REAL_CONNECT = socket.getaddrinfo, socket.create_connection


def ok(body=b"picture", *headers, status="200 OK", length=True):
    lines = [f"HTTP/1.1 {status}", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def to(location, status=302):
    return ok(b"", f"Location: {location}", "Set-Cookie: seen=1", status=f"{status} Found")


def drip(head, seconds=3.0):
    """Send ``head``, then a byte now and then, for longer than any test's deadline."""

    def speak(sock):
        sock.sendall(head)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.05)
            sock.sendall(b"1")

    return speak


class Server(socketserver.ThreadingTCPServer):
    """Answers each path with the bytes it was given, or lets a function speak; TLS or not."""

    daemon_threads = True

    def __init__(self, certificate=None):
        super().__init__(("127.0.0.1", 0), Conversation)
        self.port = self.server_address[1]
        self.answers, self.requests, self.names, self.heard = {}, [], [], 0
        self.tls = None
        if certificate:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(self.tls)
            self.tls.sni_callback = lambda _sock, name, _context: self.names.append(name)
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    def verify_request(self, request, client_address):
        self.heard += 1
        return True

    def handle_error(self, request, client_address):
        assert isinstance(sys.exc_info()[1], OSError)  # the other side left in the middle

    def close(self):
        self.shutdown()
        self.server_close()


class Conversation(socketserver.BaseRequestHandler):
    def handle(self):
        if not self.server.tls:
            self.server.answers["raw"](self.request)
            return
        with self.server.tls.wrap_socket(self.request, server_side=True) as sock:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                if not (piece := sock.recv(65536)):
                    return
                request += piece
            self.server.requests.append(request.decode())
            answer = self.server.answers[request.split()[1].decode()]
            if callable(answer):
                answer(sock)
            else:
                sock.sendall(answer)


class Edge:
    """The network as seen from here: what names lead to, and who stands behind an address."""

    def __init__(self, monkeypatch, server, private):
        self.names = {name: [PUBLIC] for name in NAMES}
        self.behind = {PUBLIC: server.port, OTHER: server.port, SIXTH: server.port}
        self.private = private
        self.asked, self.reached = [], []
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)
        monkeypatch.setattr(socket, "create_connection", self.create_connection)

    def getaddrinfo(self, host, port, *args, **kwargs):
        if host not in self.names:
            return REAL_LOOKUP(host, port, *args, **kwargs)
        self.asked.append(host)
        found = self.names[host]
        if callable(found):
            found = found()
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "secret.internal is not known")
        # Numeric, so that each has the family and the scope it would really have.
        return [one for address in found for one in REAL_LOOKUP(address, port, *args, **kwargs)]

    def create_connection(self, address, timeout):
        host, port = address
        if host in self.names:  # as the real one would, so that a connection by name is a lookup
            host = self.getaddrinfo(host, port)[0][4][0]
        self.reached.append((host, port))
        behind = self.behind.get(host, self.private.port)
        if callable(behind):
            behind = behind(timeout)
        return REAL_CONNECT(("127.0.0.1", behind), timeout)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority):
    return authority.issue_cert("media.example.com", "*.example.com", "a.b.example.com", PUBLIC)


@pytest.fixture
def server(certificate):
    server = Server(certificate)
    server.answers["/a.png"] = ok(b"picture", "Content-Type: Image/PNG; charset=x")
    yield server
    server.close()


@pytest.fixture(scope="module")
def private(certificate):
    """Stands for all that is not public; it would answer, if anybody came."""
    server = Server(certificate)
    server.answers["/a.png"] = server.answers["/"] = ok(b"secret")
    yield server
    server.close()


@pytest.fixture
def edge(monkeypatch, tmp_path, authority, server, private):
    """The bent edge; what a test leaves running or reaches in private fails it."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    yield Edge(monkeypatch, server, private)
    assert private.heard == 0
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("media ")]
    for thread in ours:
        thread.join(1)
    assert not [thread for thread in ours if thread.is_alive()]


@pytest.fixture
def get(edge, server):
    """Fetch a URL, in which PORT is the server's, from ``hosts`` at that port."""

    def get(url=f"{SITE}/a.png", *, hosts=("*",), max_bytes=1000, within_s=5.0):
        return fetch(
            url.replace("PORT", str(server.port)),
            hosts=tuple(f"{host}:{server.port}" for host in hosts),
            max_bytes=max_bytes,
            deadline=time.monotonic() + within_s,
        )

    return get


def refusal(get, *args, **kwargs):
    with pytest.raises(Refused) as caught:
        get(*args, **kwargs)
    return str(caught.value)


def test_an_allowed_url_gives_its_bytes_and_media_type(get, edge, server):
    assert get() == (b"picture", "image/png")
    assert edge.reached == [(PUBLIC, server.port)]
    assert server.names == ["media.example.com"]


def test_a_request_says_no_more_than_it_must(get, server, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    server.answers["/a.png"] = to("/b.png?size=1&x=%20#top")
    server.answers["/b.png?size=1&x=%20"] = ok()
    get(f"{SITE}/a.png#part")
    for path, request in zip(["/a.png", "/b.png?size=1&x=%20"], server.requests, strict=True):
        assert sorted(request.split("\r\n")) == [
            "",
            "",
            "Accept-Encoding: identity",
            "Connection: close",
            f"GET {path} HTTP/1.1",
            f"Host: media.example.com:{server.port}",
            "User-Agent: crane",
        ]


@pytest.mark.parametrize(
    ("header", "media_type"),
    [
        ("X: y", None),
        ("Content-Type: image/svg+xml", "image/svg+xml"),
        ("Content-Type: audio/x-wav ;a=b", "audio/x-wav"),
        ("Content-Type: <script>", None),
        ("Content-Type: caf\u00e9/x", None),
    ],
)
def test_the_media_type_is_one_or_none(get, server, header, media_type):
    server.answers["/a.png"] = ok(b"x", header)
    assert get() == (b"x", media_type)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://MEDIA.example.COM:PORT/a.png", "media.example.com"),
        ("HTTPS://media.example.com.:PORT/a.png", "media.example.com"),
        ("https://a.b.example.com:PORT/a.png", "*.example.com"),
        ("https://a.b.example.com:PORT/a.png", "*.b.example.com"),
        (f"https://{PUBLIC}:PORT/a.png", PUBLIC),
        ("https://media.example.com:PORT/a.png", "*"),
    ],
)
def test_a_host_is_allowed_by_its_name_its_parents_or_any(get, url, host):
    assert get(url, hosts=["other.example", host])[0] == b"picture"


def test_a_public_ipv6_address_is_a_host_too(get, edge, server, authority):
    authority.issue_cert(SIXTH).configure_cert(server.tls)
    assert get(f"https://[{SIXTH.upper()}]:PORT/a.png", hosts=[f"[{SIXTH}]"])[0] == b"picture"
    assert edge.reached == [(SIXTH, server.port)]
    assert f"Host: [{SIXTH}]:{server.port}" in server.requests[0]


def test_without_a_port_it_is_443(edge, server):
    answer = fetch(
        "https://media.example.com/a.png",
        hosts=("media.example.com",),
        max_bytes=9,
        deadline=time.monotonic() + 5,
    )
    assert answer[0] == b"picture"
    assert edge.reached == [(PUBLIC, 443)]
    assert "Host: media.example.com\r\n" in server.requests[0]


@pytest.mark.parametrize(
    "hosts",
    [
        ["other.example"],
        ["example.com"],
        ["*.media.example.com"],
        ["media.example"],
        ["edia.example.com"],
        ["*.b.example.com"],
        ["[::1]"],
    ],
)
def test_a_host_that_is_not_listed_is_named_and_the_list_is_not(get, edge, hosts):
    said = refusal(get, hosts=hosts)
    assert said.startswith("names media.example.com:")
    assert not any(host.strip("*") in said.replace("media.example.com", "") for host in hosts)
    assert edge.asked == edge.reached == []


@pytest.mark.parametrize("hosts", [("*",), ("*:8443",), ("media.example.com", "*:443")])
def test_a_port_that_is_not_listed_is_refused(edge, server, hosts):
    with pytest.raises(Refused, match=r"^names media\.example\.com:\d+, from which nothing"):
        fetch(
            f"https://media.example.com:{server.port}/a.png",
            hosts=hosts,
            max_bytes=9,
            deadline=time.monotonic() + 5,
        )
    assert edge.reached == []


def test_a_long_host_is_cut_where_it_is_named(get):
    said = refusal(get, f"https://{'x' * 60}.{'y' * 60}.example:PORT/", hosts=["a.example"])
    assert "x" * 60 in said
    assert "y" * 39 in said
    assert "y" * 40 not in said


def test_without_hosts_the_caller_learns_of_other_ways(get, edge):
    said = refusal(get, hosts=[])
    for word in ("CRANE_MEDIA_HOSTS", "base64", "data: URL", "multipart"):
        assert word in said
    assert edge.asked == []


PRIVATE = {
    "private.example.com": ["10.0.0.7"],
    "mixed.example.com": [PUBLIC, "192.168.0.1"],
    "mixed6.example.com": [PUBLIC, "::1"],
    "third.example.com": [PUBLIC, OTHER, "127.0.0.1"],
    "scoped.example.com": ["fe80::1%lo"],
    "nobody.example.com": [],
}
NOT_PUBLIC = [
    "127.0.0.1",
    "127.255.255.254",
    "2130706433",
    "017700000001",
    "0x7f000001",
    "0177.0.0.1",
    "0x7f.1",
    "127.1",
    "127.0.0.1.",
    "0",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "100.100.100.200",
    "169.254.169.254",
    "2852039166",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[::93.184.215.14]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:0:127.0.0.1]",
    "[::ffff:10.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::10.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b::168.63.129.16]",
    "[64:ff9b:1::1]",
    "[64:ff9b:1::808:808]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
    "[2001:db8::1]",
    "[3fff::1]",
    "[100::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[5f00::1]",
    "localhost",
    "LOCALHOST.",
    *PRIVATE,
]


@pytest.mark.parametrize("host", NOT_PUBLIC)
def test_what_does_not_lead_to_a_public_address_is_not_reached(get, edge, private, host):
    edge.names |= PRIVATE
    edge.behind.pop(PUBLIC)  # so that the public half of a mixed answer is not reached either
    said = refusal(get, f"https://{host}:PORT/a.png")
    assert said == "does not lead to a public address"
    assert edge.reached == []


NOT_A_URL = [
    ("", "must be an https URL"),
    ("a.png", "must be an https URL"),
    ("/etc/passwd", "must be an https URL"),
    (f"//{ALLOWED}/a.png", "must be an https URL"),
    (f"http://{ALLOWED}/a.png", "must be an https URL, not http"),
    (f"HTTP://{ALLOWED}/a.png", "must be an https URL, not http"),
    ("http://127.0.0.1:PORT/a.png", "must be an https URL, not http"),
    ("http://[::1]:PORT/a.png", "must be an https URL, not http"),
    ("http://169.254.169.254/latest/meta-data/", "must be an https URL, not http"),
    ("file:///etc/passwd", "must be an https URL, not file"),
    ("file://localhost/etc/passwd", "must be an https URL, not file"),
    (f"ftp://{ALLOWED}/a.png", "must be an https URL, not ftp"),
    (f"gopher://{ALLOWED}/_x", "must be an https URL, not gopher"),
    (f"dict://{ALLOWED}/x", "must be an https URL, not dict"),
    (f"ws://{ALLOWED}/x", "must be an https URL, not ws"),
    (f"jar:https://{ALLOWED}/a.png!/", "must be an https URL, not jar"),
    (f"url:https://{ALLOWED}/a.png", "must be an https URL, not url"),
    ("data:text/plain,x", "must be an https URL, not data"),
    ("javascript:alert(1)", "must be an https URL, not javascript"),
    (f"{'s' * 90}://{ALLOWED}/", f"must be an https URL, not {'s' * 20}"),
    ("https:a.png", "must have a host"),
    ("https:/media.example.com/a.png", "must have a host"),
    ("https:///a.png", "must have a host"),
    ("https://:PORT/a.png", "must have a host"),
    ("https://?media.example.com", "must have a host"),
    ("https://#media.example.com", "must have a host"),
    ("https://./a.png", "must have a host"),
    ("https://.media.example.com:PORT/a.png", "must have a host"),
    ("https://media..example.com:PORT/a.png", "must have a host"),
    ("https://media.example.com..:PORT/a.png", "must have a host"),
    (f"https://{'a' * 64}.example.com:PORT/a.png", "must have a host"),
    (f"https://{'a.' * 130}example.com:PORT/a.png", "must have a host"),
    ("https://*:PORT/a.png", "must have a host"),
    ("https://*.example.com:PORT/a.png", "must have a host"),
    ("https://media.example.com%2f@:PORT/", "must not have a user name"),
    ("https://media%2eexample.com:PORT/a.png", "must have a host"),
    ("https://127.0.0.1%00.example.com:PORT/a.png", "must have a host"),
    ("https://[fe80::1%25eth0]:PORT/a.png", "must have a host"),
    ("https://[fe80::1%eth0]:PORT/a.png", "must have a host"),
    # Some Pythons refuse it themselves.
    ("https://[::1]media.example.com:PORT/a.png", ("must have a host", "is not a URL")),
    ("https://[127.0.0.1]:PORT/a.png", ""),
    ("https://[v1.x]:PORT/a.png", ""),
    ("https://[::1:PORT/a.png", ""),
    ("https://[]:PORT/a.png", ""),
    ("https://media.example.com:/a.png", "must have a host"),
    ("https://media.example.com:0/a.png", "must have a host"),
    ("https://media.example.com:65536/a.png", "must have a host"),
    ("https://media.example.com:99999999999/a.png", "must have a host"),
    ("https://media.example.com:-1/a.png", "must have a host"),
    ("https://media.example.com:PORT:PORT/a.png", "must have a host"),
    ("https://media.example.com:https/a.png", "must have a host"),
    (f"https://{ALLOWED}@127.0.0.1:PORT/a.png", "must not have a user name"),
    (f"https://127.0.0.1:PORT@{ALLOWED}/a.png", "must not have a user name"),
    (f"https://user:password@{ALLOWED}/a.png", "must not have a user name"),
    (f"https://@{ALLOWED}/a.png", "must not have a user name"),
    (f"https://{ALLOWED}\\@127.0.0.1:PORT/a.png", "has white space"),
    ("https://127.0.0.1:PORT\\.example.com/a.png", "has white space"),
    (f"https:\\\\{ALLOWED}\\a.png", "has white space"),
    (f"https://{ALLOWED}/a.png HTTP/1.1\r\nX: y", "has white space"),
    (f"https://{ALLOWED}/a\r\n.png", "has white space"),
    (f"https://{ALLOWED}/a\t.png", "has white space"),
    (f"ht\ntps://{ALLOWED}/a.png", "has white space"),
    ("https://media.\texample.com:PORT/a.png", "has white space"),
    (f" https://{ALLOWED}/a.png", "has white space"),
    (f"https://{ALLOWED}/a.png\n", "has white space"),
    (f"\x00https://{ALLOWED}/a.png", "has white space"),
    (f"https://{ALLOWED}/a\x7f.png", "has white space"),
    (f"https://{ALLOWED}/caf\u00e9.png", "has characters outside ASCII"),
    ("https://\uff4dedia.example.com:PORT/a.png", "has characters outside ASCII"),
    ("https://127\u30020\u30020\u30021:PORT/a.png", "has characters outside ASCII"),
    ("https://media.example.com:\uff14\uff14\uff13/a.png", "has characters outside ASCII"),
    (f"https://{ALLOWED}/a.png\u2028", "has characters outside ASCII"),
]


@pytest.mark.parametrize(("url", "said"), NOT_A_URL)
def test_what_is_not_a_plain_https_url_is_refused_before_anything_is_asked(get, edge, url, said):
    assert refusal(get, url).startswith(said)
    assert edge.asked == edge.reached == []


def test_a_url_has_a_most_length(get, server):
    start = f"https://media.example.com:{server.port}/"
    path = "x" * (2048 - len(start))
    server.answers[f"/{path}"] = ok()
    assert get(f"{start}{path}")[0] == b"picture"
    assert refusal(get, f"{start}{path}x").startswith("has a URL of 2049 characters; at most 2048")


def test_a_name_is_resolved_once_and_its_connection_pinned(get, edge, server):
    """A name server that gives a public address first and a private one ever after."""
    answers = iter([[PUBLIC]])
    edge.names["media.example.com"] = lambda: next(answers, ["127.0.0.1"])
    assert get()[0] == b"picture"
    assert edge.asked == ["media.example.com"]
    assert edge.reached == [(PUBLIC, server.port)]


def test_a_name_that_moves_between_redirects_is_checked_again(get, edge, server):
    answers = iter([[PUBLIC]])
    edge.names["media.example.com"] = lambda: next(answers, ["127.0.0.1"])
    server.answers["/a.png"] = to("/b.png")
    assert refusal(get) == "redirects to an address that does not lead to a public address"
    assert edge.reached == [(PUBLIC, server.port)]


def nobody_listens(timeout):
    raise ConnectionRefusedError("secret")


def nobody_answers(timeout):
    time.sleep(timeout)
    raise TimeoutError("secret")


@pytest.mark.parametrize("first", [nobody_listens, nobody_answers])
def test_a_second_address_is_tried_in_time(get, edge, server, first):
    edge.names["media.example.com"] = [OTHER, PUBLIC]
    edge.behind[OTHER] = first
    assert get(within_s=1.0)[0] == b"picture"
    assert edge.reached == [(OTHER, server.port), (PUBLIC, server.port)]


def test_an_address_that_answers_has_all_the_time_there_is(get, edge, server):
    edge.names["media.example.com"] = [PUBLIC, OTHER]

    def speak(sock):
        time.sleep(1.1)
        sock.sendall(ok())

    server.answers["/a.png"] = speak
    assert get(within_s=2.0)[0] == b"picture"


def test_a_third_address_is_not_tried(get, edge):
    edge.names["media.example.com"] = [OTHER, OTHER, SIXTH, PUBLIC]
    edge.behind |= {OTHER: nobody_listens, SIXTH: nobody_listens}
    assert refusal(get) == "could not be reached, or broke off"
    assert [address for address, _ in edge.reached] == [OTHER, SIXTH]


def test_an_ipv4_address_as_nat64_writes_it_is_reached_if_it_is_public(get, edge, server):
    edge.names["media.example.com"] = [f"64:ff9b::{PUBLIC}"]
    edge.behind["64:ff9b::5db8:d70e"] = server.port
    assert get()[0] == b"picture"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location",
    ["/b.png", "b.png", "//cdn.example.com:PORT/b.png", "https://cdn.example.com:PORT/b.png"],
)
def test_a_redirect_is_followed(get, edge, server, status, location):
    server.answers["/a.png"] = to(location.replace("PORT", str(server.port)), status)
    server.answers["/b.png"] = ok(b"there", "Content-Type: image/webp")
    assert get() == (b"there", "image/webp")
    assert edge.reached == [(PUBLIC, server.port)] * 2


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://media.example.com:PORT/a.png", "must be an https URL, not http"),
        ("file:///etc/passwd", "must be an https URL, not file"),
        ("data:image/png;base64,AAAA", "must be an https URL, not data"),
        ("https://127.0.0.1:PORT/a.png", "does not lead to a public address"),
        ("//[::1]:PORT/a.png", "does not lead to a public address"),
        ("https://private.example.com:PORT/a.png", "does not lead to a public address"),
        ("https://elsewhere.example.net:PORT/a.png", "names elsewhere.example.net:"),
        ("https://media.example.com/a.png", "names media.example.com, from which nothing"),
        ("https://media.example.com:22/a.png", "names media.example.com:22, from which nothing"),
        ("https://user@media.example.com:PORT/a.png", "must not have a user name"),
        ("https://media.example.com:PORT\\@127.0.0.1/a.png", "has white space"),
        ("/a\tb.png", "has white space"),
        ("/caf\u00e9.png", "has characters outside ASCII"),
        ("/" + "x" * 2048, "has a URL of"),
        ("https://[/", "is not a URL"),
        ("/gone.png", "answered 404"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(get, edge, server, location, said):
    edge.names |= PRIVATE
    server.answers["/a.png"] = to(location.replace("PORT", str(server.port)))
    server.answers["/gone.png"] = ok(status="404 Not Found")
    hosts = ["*.example.com", "127.0.0.1", "[::1]"]
    assert refusal(get, hosts=hosts).startswith(f"redirects to an address that {said}")
    assert {address for address, _ in edge.reached} == {PUBLIC}


def test_what_a_redirect_leads_to_may_be_too_large(get, server):
    server.answers |= {"/a.png": to("/b.png"), "/b.png": ok(b"x" * 1001)}
    with pytest.raises(Refused, match="redirects to an address that has more than 1000") as caught:
        get()
    assert caught.value.too_large


def test_at_most_three_redirects_are_followed(get, server):
    server.answers |= {f"/{n}": to(f"/{n + 1}") for n in range(1, 4)} | {"/4": ok()}
    assert get(f"{SITE}/1")[0] == b"picture"
    server.answers["/4"] = to("/5")
    assert refusal(get, f"{SITE}/1") == "redirects more than 3 times"
    assert len(server.requests) == 8


def test_a_redirect_to_itself_ends(get, server):
    server.answers["/a.png"] = to("/a.png")
    assert refusal(get) == "redirects more than 3 times"


@pytest.mark.parametrize("status", [201, 204, 206, 300, 302, 304, 401, 404, 429, 500, 503])
def test_only_200_is_a_success(get, server, status):
    server.answers["/a.png"] = ok(b"", status=f"{status} Secret")
    assert refusal(get) == f"answered {status}"


def test_a_certificate_must_be_for_the_host(get):
    assert refusal(get, "https://elsewhere.example.net:PORT/a.png") == (
        "has a certificate that does not hold"
    )


def test_a_certificate_must_be_of_a_trusted_authority(get, monkeypatch, tmp_path):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "other.pem"))
    assert refusal(get) == "has a certificate that does not hold"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x" * 1000),
        ok(b"x" * 1000, length=False),
        CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n",
        CHUNKED + b"1;a=b\r\nx\r\n" * 1000 + b"0\r\nTrailer: x\r\n\r\n",
    ],
    ids=["length", "until-the-end", "a-chunk", "tiny-chunks"],
)
def test_a_body_may_be_as_large_as_allowed_and_no_larger(get, server, answer):
    server.answers["/a.png"] = answer
    assert get(max_bytes=1000)[0] == b"x" * 1000
    with pytest.raises(Refused, match="has more than 999 bytes") as caught:
        get(max_bytes=999)
    assert caught.value.too_large


def test_an_empty_body_is_a_body(get, server):
    server.answers["/a.png"] = ok(b"")
    assert get() == (b"", None)


def test_a_length_that_is_too_large_is_believed_at_once(get, server):
    def speak(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
        sock.recv(1)  # says nothing more until the other side hangs up

    server.answers["/a.png"] = speak
    started = time.monotonic()
    assert refusal(get) == "has more than 1000 bytes"
    assert time.monotonic() - started < 2


def pour(head, unit=b"x" * 65536):
    def speak(sock):
        sock.sendall(head)
        for _ in range(2**25 // len(unit)):
            sock.sendall(unit)

    return speak


@pytest.mark.parametrize(
    "answer",
    [
        pour(b"HTTP/1.1 200 OK\r\n\r\n"),
        pour(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
        pour(CHUNKED + b"FFFFFFFFFF\r\n"),
        pour(CHUNKED + b"-1\r\n"),
        pour(CHUNKED, b"2\r\nxx\r\n" * 8192),
    ],
    ids=["no-length", "negative-length", "huge-chunk", "negative-chunk", "tiny-chunks"],
)
def test_no_more_than_the_limit_is_held_of_an_endless_body(get, server, answer):
    server.answers["/a.png"] = answer
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        said = refusal(get, max_bytes=100_000)
        most = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert said == "has more than 100000 bytes"
    assert most < 1_000_000


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Transfer-Encoding: gzip, chunked"])
def test_a_compressed_answer_is_refused(get, server, header):
    server.answers["/a.png"] = ok(b"x", header)
    assert refusal(get) == "came compressed, which was not asked for"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        CHUNKED + b"9\r\nshort",
        CHUNKED + b"zz\r\n",
    ],
)
def test_an_answer_that_is_not_whole_is_refused(get, server, answer):
    server.answers["/a.png"] = answer
    assert re.fullmatch("could not be reached, or broke off|broke off before its end", refusal(get))


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_server_that_resets_the_connection_is_refused(get, server):
    server.answers["/a.png"] = reset
    assert refusal(get) == "could not be reached, or broke off"


def test_a_server_without_tls_is_refused(get, edge):
    plain = Server()
    plain.answers["raw"] = lambda sock: sock.sendall(ok())
    edge.behind[PUBLIC] = plain.port
    try:
        assert refusal(get) == "could not be reached, or broke off"
    finally:
        plain.close()


@pytest.fixture
def ends_in_time(get):
    def check():
        started = time.monotonic()
        assert refusal(get, max_bytes=10**6, within_s=0.3) == "took too long"
        assert 0.29 < time.monotonic() - started < 2.5  # what drips does so for longer

    return check


@pytest.mark.parametrize(
    "answer",
    [
        drip(b""),
        drip(b"HTTP/1.1 200 OK\r\nX: "),
        drip(b"HTTP/1.1 200 OK\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        drip(CHUNKED + b"ffff\r\n"),
        drip(CHUNKED + b"0\r\n"),
        lambda sock: sock.recv(1),
    ],
    ids=["status", "header", "body", "body-of-a-length", "chunk", "trailer", "silence"],
)
def test_an_answer_that_drips_ends_at_the_deadline(ends_in_time, server, answer):
    server.answers["/a.png"] = answer
    ends_in_time()


@pytest.mark.parametrize(
    "raw",
    [drip(b"\x16\x03\x03\x40\x00\x02"), lambda sock: sock.recv(2**16) and sock.recv(2**16)],
    ids=["drip", "silence"],
)
def test_a_handshake_that_does_not_end_ends_at_the_deadline(ends_in_time, edge, raw):
    plain = Server()
    plain.answers["raw"] = raw
    edge.behind[PUBLIC] = plain.port
    try:
        ends_in_time()
    finally:
        plain.close()


def test_a_connection_that_is_never_answered_ends_at_the_deadline(ends_in_time, edge):
    edge.behind[PUBLIC] = nobody_answers
    ends_in_time()


def test_a_name_that_does_not_resolve_ends_at_the_deadline(ends_in_time, edge):
    asked_enough = threading.Event()
    edge.names["media.example.com"] = lambda: asked_enough.wait(5) and []
    try:
        ends_in_time()
    finally:
        asked_enough.set()


def test_redirects_share_one_deadline(get, server):
    def slow(sock):
        time.sleep(0.6)
        sock.sendall(to("/a.png"))

    server.answers["/a.png"] = slow
    # Each of them would be in time: they would be too many at last.
    assert refusal(get, within_s=1.0) == "redirects to an address that took too long"


def test_a_deadline_that_has_passed_reaches_nothing(get, edge):
    assert refusal(get, within_s=-1) == "took too long"
    assert edge.reached == []


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", ()),
        (" , ", ()),
        ("images.example.com", ("images.example.com",)),
        ("Images.Example.COM., *.example.com", ("images.example.com", "*.example.com")),
        ("*", ("*",)),
        ("*:8443,a.example:65535", ("*:8443", "a.example:65535")),
        ("a.example:443,*:0443", ("a.example", "*")),
        ("a_b.xn--bcher-kva.example", ("a_b.xn--bcher-kva.example",)),
        ("93.184.215.14:8443", ("93.184.215.14:8443",)),
        ("[2606:2800::0:1],[2606:2800::A]:8443", ("[2606:2800::1]", "[2606:2800::a]:8443")),
    ],
)
def test_media_hosts_are_read_as_the_readme_writes_them(text, hosts):
    assert media_hosts(text) == hosts


@pytest.mark.parametrize(
    "text",
    [
        "ht!tp",
        "https://images.example.com",
        "images.example.com/path",
        "user@images.example.com",
        "images..example.com",
        ".example.com",
        "**",
        "*example.com",
        "images.*.com",
        "*.*.com",
        "*.[2606:2800::1]",
        "a.example:",
        "a.example:0",
        "a.example:65536",
        "a.example:x",
        "a b.example",
        "b\u00fccher.example",
        "2606:2800::1",
        "[2606:2800::1",
        "[2606:2800:1]",
        "[fe80::1%eth0]",
        f"{'a' * 64}.example",
    ],
)
def test_what_is_no_media_host_is_named(text):
    with pytest.raises(ValueError, match="is not a host such as") as caught:
        media_hosts(f"good.example, {text}")
    assert str(caught.value) == (
        f"{text!r} is not a host such as images.example.com or *.example.com"
    )
