"""Who is local, by the real listeners and the connection; what web pages may do without a key."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from backend.locality import FORWARDING
from tests.conftest import ECHO, order, run, write_models
from tests.serving import ROOT, wait_for

FORWARDED = {
    "X-Forwarded-For": "203.0.113.9",
    "X-Forwarded-Proto": "https",
    "X-Forwarded": "for=203.0.113.9",
    **{
        name.removeprefix("HTTP_").replace("_", "-").title(): "203.0.113.9"
        for name in sorted(FORWARDING)
        if name.startswith("HTTP_")
    },
}
HERE = {"SERVER_NAME": "127.0.0.1", "REMOTE_ADDR": "127.0.0.1"}


class End:
    """A connection, by the names of its ends."""

    def __init__(self, own, peer):
        self.getsockname, self.getpeername = lambda: own, lambda: peer


CONNECTIONS = {
    "loopback": (HERE, True),
    "loopback-6": ({"SERVER_NAME": "::1", "REMOTE_ADDR": "::1"}, True),
    "other-loopback": ({"SERVER_NAME": "127.9.9.9", "REMOTE_ADDR": "127.0.0.1"}, True),
    "from-elsewhere": (HERE | {"REMOTE_ADDR": "192.0.2.1"}, False),
    "listens-everywhere": (HERE | {"SERVER_NAME": "0.0.0.0"}, False),
    "listens-everywhere-6": (HERE | {"SERVER_NAME": "::"}, False),
    "listens-at-a-name": (HERE | {"SERVER_NAME": "crane.example.com"}, False),
    "a-unix-socket": ({"SERVER_NAME": "", "REMOTE_ADDR": ""}, False),
    "its-ends": (HERE | {"werkzeug.socket": End(("127.0.0.1", 1), ("127.0.0.1", 2))}, True),
    "its-own-end-elsewhere": (
        HERE | {"gunicorn.socket": End(("192.0.2.2", 1), ("127.0.0.1", 2))},
        False,
    ),
    "its-other-end-elsewhere": (
        HERE | {"werkzeug.socket": End(("127.0.0.1", 1), ("192.0.2.1", 2))},
        False,
    ),
    "a-unix-socket-s-ends": (HERE | {"gunicorn.socket": End("/run/crane.sock", "")}, False),
    "the-proxy-protocol": (HERE | {"PROXY_PROTOCOL": "TCP4"}, False),
}


@pytest.mark.parametrize("kind", CONNECTIONS)
@pytest.mark.parametrize("auth", ["auto", "required", "off"])
def test_a_call_is_local_by_its_connection(make_app, kind, auth):
    environ, is_local = CONNECTIONS[kind]
    client = make_app(auth=auth).test_client()
    body = {"model_id": "echo", "input": 1}
    answer = client.post("/crane/run", json=body, environ_overrides=environ)
    needs_none = auth == "off" or (auth == "auto" and is_local)
    assert answer.status_code == (200 if needs_none else 401)


@pytest.mark.parametrize("header", FORWARDED)
def test_what_a_proxy_passes_on_is_not_local(make_app, capsys, header):
    client = make_app().test_client()
    assert run(client).status_code == 200
    for path in ("/crane/run", "/v1/embeddings", "/crane/models/echo/unload"):
        for _ in range(2):
            answer = client.post(path, json={}, headers={header: FORWARDED[header]})
            assert answer.status_code == 401
    [line] = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert header.lower() in line.lower()
    assert "CRANE_TRUSTED_PROXIES" in line


def test_behind_proxies_that_are_known_nothing_is_warned_of(make_app, capsys):
    client = make_app(trusted_proxies=1).test_client()
    for client_address in ("203.0.113.9", "127.0.0.1"):
        assert order(client, "echo", "load", **{"X-Forwarded-For": client_address}) != 200
        answer = client.post("/crane/run", json={}, headers={"X-Forwarded-For": client_address})
        assert answer.status_code == 401
    assert run(client).status_code == 200  # past the proxies, from this host
    assert "WARNING" not in capsys.readouterr().err


# Web pages, where no key is needed.


def post(client, path="/crane/run", **headers):
    body = {"model_id": "echo", "input": 1}
    return client.post(path, json=body, headers=headers)


OWN = ["localhost", "LOCALHOST:8000", "localhost.", "crane.localhost:1", "127.0.0.1", "[::1]:8000"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "notlocalhost",
    "192.0.2.7:8000",
    "0.0.0.0:8000",
    "a@localhost",
    "localhost:8000:evil.example",
    "x",
]


@pytest.mark.parametrize("host", OWN)
def test_a_service_without_keys_answers_to_its_own_names(make_app, host):
    client = make_app().test_client()
    assert post(client, Host=host).status_code == 200
    assert client.get("/metrics", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_a_page_whose_name_leads_here_is_refused(make_app, host):
    client = make_app().test_client()
    for path in ("/crane/models", "/crane/quota", "/v1/models", "/metrics"):
        assert client.get(path, headers={"Host": host}).status_code == 403
    answer = post(client, Host=host)
    assert (answer.status_code, answer.json["error"]["code"]) == (403, "FORBIDDEN")
    assert "CRANE_ALLOWED_HOSTS" in answer.json["error"]["message"]
    assert client.get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("allowed", ["Crane.example.com", "*"])
def test_a_name_that_is_allowed_is_answered_to(make_app, allowed):
    client = make_app(allowed_hosts=(allowed,)).test_client()
    assert post(client, Host="crane.example.com:8000").status_code == 200
    other = post(client, Host="evil.example").status_code
    assert other == (200 if allowed == "*" else 403)


def test_where_auth_is_off_any_address_is_the_services_name(make_app):
    client = make_app(auth="off").test_client()
    assert post(client, Host="192.0.2.7:8000").status_code == 200
    assert post(client, Host="[2001:db8::1]:8000").status_code == 200
    assert post(client, Host="crane.internal").status_code == 403


PAGES = {
    "foreign": {"Origin": "https://evil.example"},
    "null": {"Origin": "null"},
    "other-port": {"Origin": "http://localhost:3000"},
    "begins-alike": {"Origin": "http://localhost.evil.example"},
    "cross-site": {"Sec-Fetch-Site": "cross-site"},
    "same-site": {"Sec-Fetch-Site": "same-site"},
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("auth", ["auto", "off"])
def test_a_foreign_page_runs_nothing_without_a_key(make_app, page, auth):
    client = make_app(auth=auth).test_client()
    for path in ("/crane/run", "/v1/embeddings", "/crane/models/echo/load"):
        answer = post(client, path, **PAGES[page])
        assert answer.status_code == 403
        assert "CRANE_ALLOWED_ORIGINS" in answer.text
    # What a page may send anywhere without asking first.
    for body in (
        {"data": '{"model_id": "echo"}', "content_type": "text/plain"},
        {"data": {"model_id": "echo", "input": "1"}, "content_type": "multipart/form-data"},
        {"data": {"model_id": "echo"}},
    ):
        assert client.post("/crane/run", headers=PAGES[page], **body).status_code == 403
    assert client.get("/crane/models", headers=PAGES[page]).status_code == 200  # it cannot read it


@pytest.mark.parametrize("origins", ["https://Evil.example", "*"])
def test_a_page_of_an_allowed_origin_runs_models(make_app, origins):
    client = make_app(allowed_origins=(origins,)).test_client()
    answer = post(client, Origin="https://evil.example", **{"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    other = post(client, **PAGES["other-port"]).status_code
    assert other == (200 if origins == "*" else 403)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("localhost", "http://localhost:80"),
        ("localhost:443", "https://localhost"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
    ],
)
def test_the_services_own_pages_and_other_programs_are_untouched(make_app, host, origin):
    client = make_app().test_client()
    own = {"Host": host, "Origin": origin, "Sec-Fetch-Site": "same-origin"}
    assert post(client, **own).status_code == 200
    assert post(client, **{"Sec-Fetch-Site": "none"}).status_code == 200
    assert post(client).status_code == 200


def test_who_has_a_key_may_call_from_any_page_and_by_any_name(make_app):
    client = make_app().test_client()
    assert order(client, "echo", "load").status_code == 200
    key = {"Authorization": f"Bearer {client.application.extensions['admin_key']}"}
    for more in ({"Host": "evil.example"}, *PAGES.values()):
        assert post(client, **key, **more).status_code == 200


@pytest.mark.parametrize("path", ["/crane//run", "//crane/run", "/v1//models", "/crane/run/"])
def test_no_path_leads_to_where_the_caller_says(make_app, path):
    client = make_app(auth="off", allowed_hosts=("*",)).test_client()
    for method in ("GET", "POST"):
        answer = client.open(path, method=method, headers={"Host": "evil.example"})
        assert (answer.status_code, "Location" in answer.headers) == (404, False)


# With real listeners.


def request(family, address, method="POST", path="/crane/run", **headers):
    """The status of a call on a connection of its own, without a ``Host`` that says where."""
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(family)
    try:
        connection.sock.connect(address)
        body = b'{"model_id": "echo", "input": 1}'
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        return connection.getresponse().status
    finally:
        connection.close()


def test_each_listener_of_a_command_line_is_known_for_what_it_is(gunicorn, tmp_path):
    path = str(tmp_path / "s")
    server = gunicorn(
        arguments=["-b", "127.0.0.1:0", "-b", f"unix:{path}"],
        GUNICORN_CMD_ARGS="-b 0.0.0.0:0",
        CRANE_BIND="127.0.0.1:0",
    )
    assert request(socket.AF_UNIX, path) == 401
    ports = dict(re.findall(r"http://([\d.]+):(\d+)", server.log().partition("Listening at")[2]))
    for address, port in ports.items():
        status = request(socket.AF_INET, ("127.0.0.1", int(port)))
        assert status == (200 if address == "127.0.0.1" else 401)
    assert "Callers need an API key here." in server.log()


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1"])
def test_a_socket_that_was_inherited_is_known_for_what_it_is(gunicorn, address):
    with socket.create_server((address, 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        server = gunicorn(
            arguments=["-b", f"fd://{listener.fileno()}"], how={"pass_fds": (listener.fileno(),)}
        )
        exposed = address == "0.0.0.0"
        assert server.run()[0] == (401 if exposed else 200)
        assert ("Callers need an API key here." in server.log()) == exposed


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1"])
def test_flasks_own_server_is_known_for_what_it_is(tmp_path, address):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    env |= {"CRANE_MODELS": str(write_models(tmp_path, [ECHO])), "CRANE_QUOTA": "off"}
    env["CRANE_DATA_DIR"] = str(tmp_path / "data")
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "run", "--host", address]
    process = subprocess.Popen(
        [*command, "--port", str(port)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL
    )

    def answers():
        assert process.poll() is None
        try:
            return request(socket.AF_INET, ("127.0.0.1", port), "GET", "/livez") == 200
        except OSError:
            return False

    try:
        wait_for(answers, 30)
        status = request(socket.AF_INET, ("127.0.0.1", port))
        assert status == (401 if address == "0.0.0.0" else 200)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
