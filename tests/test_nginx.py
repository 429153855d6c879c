"""Crane behind the nginx that ``deploy/nginx.conf`` makes of it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ECHO, write_models
from tests.serving import Gunicorn, Stream, wait_for

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
CONF = Path(__file__).resolve().parent.parent / "deploy" / "nginx.conf"
KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own(conf, folder, port, upstream):
    """The shipped configuration with other ports, and files that are no other nginx's."""
    paths = "".join(f"    {kind}_temp_path {folder / kind};\n" for kind in KINDS)
    user = "" if os.geteuid() else "user root;\n"  # pytest's folders are nobody else's
    for line, other in (
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("server 127.0.0.1:8000 ", f"server 127.0.0.1:{upstream} "),
        ("pid /run/nginx.pid;", f"{user}pid {folder / 'nginx.pid'};\ndaemon off;"),
        ("http {\n", "http {\n" + paths),
    ):
        assert conf.count(line) == 1
        conf = conf.replace(line, other)
    return conf


@pytest.fixture(scope="module")
def crane(tmp_path_factory):
    folder = tmp_path_factory.mktemp("behind-nginx")
    settings = {"CRANE_TRUSTED_PROXIES": 1, "CRANE_THREADS": 8, "CRANE_QUOTA": "on"}
    settings["CRANE_AUTH"] = "off"  # else what nginx passes on needs a key
    settings["CRANE_TIERS"] = "free 1000000/minute concurrency=1, pro 60/minute"
    server = Gunicorn(write_models(folder, [ECHO]), folder / "data", settings)
    yield server.wait_until_ready()
    server.stop()


@pytest.fixture(scope="module")
def port(crane, tmp_path_factory):
    """nginx's."""
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    conf = folder / "nginx.conf"
    conf.write_text(own(CONF.read_text(), folder, port, crane.port))
    with (folder / "log").open("wb") as log:
        nginx = subprocess.Popen(
            [NGINX, "-c", conf, "-p", folder, "-e", "stderr"], stdout=log, stderr=log
        )

    wait_for(partial(listens, nginx, port))
    yield port
    nginx.terminate()
    nginx.wait(10)


def listens(nginx, port):
    assert nginx.poll() is None
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ask(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def run(port, body=b'{"model_id": "echo", "input": 1}', **headers):
    headers = {"Content-Type": "application/json"} | headers
    return ask(port, "POST", "/crane/run", body, **headers)


def test_calls_and_probes_pass_and_metrics_do_not(port, crane):
    status, headers, body = run(port, **{"X-Request-ID": "through-nginx"})
    assert (status, json.loads(body)["output"]) == (200, 1)
    assert headers["X-Request-ID"] == "through-nginx"
    assert ask(port, "GET", "/livez")[0] == 200
    for path in ("/metrics", "/readyz", "/health"):
        status, _, body = ask(port, "GET", path)
        assert (status, json.loads(body)["error"]["code"]) == (403, "REFUSED")
    assert ask(port, "GET", "/crane/run")[1]["Allow"] == "OPTIONS, POST"


def test_a_large_call_passes_both_ways(port):
    body = json.dumps({"model_id": "echo", "input": ["x" * 900_000] * 20}).encode()
    status, _, answer = run(port, body)
    assert (status, len(answer) > 18_000_000) == (200, True)


@pytest.mark.parametrize("upstream", ["away", "too large"])
def test_what_nginx_refuses_is_json_too(port, tmp_path, upstream):
    if upstream == "too large":
        status, _, body = ask(port, "POST", "/crane/run", None, **{"Content-Length": "99999999"})
        assert (status, json.loads(body)["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
        return
    conf, other = tmp_path / "nginx.conf", free_port()
    conf.write_text(own(CONF.read_text(), tmp_path, other, free_port()))
    nginx = subprocess.Popen([NGINX, "-c", conf, "-p", tmp_path, "-e", "stderr"])
    try:
        wait_for(partial(listens, nginx, other))
        status, headers, body = run(other)
        assert (status, headers["Retry-After"]) == (502, "1")
        assert json.loads(body)["error"]["code"] == "MODEL_UNAVAILABLE"
    finally:
        nginx.terminate()
        nginx.wait(10)


def test_a_caller_is_known_by_its_own_address_and_cannot_choose_it(port):
    slow = {"model_id": "echo", "input": 1, "stream": True, "options": {"delay_ms": 20_000}}
    stream = Stream(port, json.dumps(slow).encode())
    for forged in ({}, {"X-Forwarded-For": "192.0.2.7"}, {"X-Real-IP": "192.0.2.8"}):
        assert run(port, **forged)[0] == 429  # of the one call at once that it may have
    stream.leave()
    wait_for(lambda: run(port)[0] == 200)


def test_streams_are_not_kept(port):
    body = {"model_id": "echo", "input": 1, "stream": True, "options": {"delay_ms": 20_000}}
    stream = Stream(port, json.dumps(body).encode(), timeout_s=10)
    assert stream.until("start")["metadata"]["model_id"] == "echo"  # long before the output
    stream.leave()
    wait_for(lambda: run(port)[0] == 200)


def test_connections_to_the_service_are_kept(port, crane):
    for _ in range(20):
        assert run(port)[0] == 200
    [worker] = crane.http_workers()
    open_ = [c for c in worker.net_connections("tcp") if c.laddr.port == crane.port and c.raddr]
    assert len(open_) <= 8  # one or two by each of nginx's workers


@pytest.mark.parametrize(
    ("count", "data"),
    [
        pytest.param(90, b"POST /crane/run HTTP/1.1\r\nHos", id="half heads"),
        pytest.param(90, b"", id="silent"),
        pytest.param(
            90,
            b"POST /crane/run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 9000000\r\n\r\n{",
            id="half bodies",
        ),
    ],
)
def test_slow_clients_get_no_further_than_nginx(port, crane, count, data):
    [worker] = crane.http_workers()
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall(data)
        assert run(port)[0] == 200
        open_ = [c for c in worker.net_connections("tcp") if c.laddr.port == crane.port and c.raddr]
        assert len(open_) <= 8


def test_its_limits_agree_with_the_services_own():
    conf = CONF.read_text()
    readme = (CONF.parent.parent / "README.md").read_text()
    assert re.search(r"\| `CRANE_MAX_BODY` \| `32MiB`", readme)
    assert "client_max_body_size 32m;" in conf


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 40_000 + b"\r\n\r\n", 400),
        (b"GET /livez HTTP/9.1\r\nHost: x\r\n\r\n", 505),
        (b"POST /crane/run HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: cow\r\n\r\n", 501),
    ],
)
def test_what_nginx_does_not_understand_is_refused_in_json(port, sent, status):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(sent)
        head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["code"] == "REFUSED"


@pytest.mark.parametrize("more_blanks", [0, 1])
def test_a_caller_with_too_many_requests_takes_none_of_others_at_its_address(port, more_blanks):
    """However many blanks it sends before its key: Crane takes all of them."""
    for count in range(2000):  # as long as it may burst, and more come than are allowed
        blanks = " " * (1 + more_blanks * count % 500)
        greedy = {"Authorization": f"Bearer{blanks}crane_abcdefghijkl_{more_blanks}{'x' * 40}"}
        status, headers, body = ask(port, "GET", "/livez", None, **greedy)
        if status != 200:
            break
    assert (status, headers["Retry-After"]) == (429, "1")
    assert json.loads(body)["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert ask(port, "GET", "/livez", None)[0] == 200
