"""The log: one line for each event, that a program can parse and that no caller can forge."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from backend.config import Config
from backend.logs import ConsoleFormatter, JsonFormatter, logging_config
from tests.conftest import run

CONSOLE_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) ")


# The log goes to the standard error that there was when the app was made, and pytest puts up
# another for each phase of a test: so the apps are made within the tests.


@pytest.fixture
def lines(capfd):
    """The JSON lines written since the last call."""

    def read(message="request"):
        written = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        return [line for line in written if line["message"] == message]

    return read


def test_a_good_request_is_one_line_with_its_id_model_and_timings(lines, make_app):
    client = make_app().test_client()
    lines()
    sent = {"model_id": "echo", "input": "hello"}
    answer = client.post("/crane/run", json=sent, headers={"X-Request-ID": "abc-1"})
    [line] = lines()
    assert line["request_id"] == answer.headers["X-Request-ID"] == "abc-1"
    assert (line["level"], line["logger"]) == ("INFO", "crane.http")
    assert (line["method"], line["route"], line["status"]) == ("POST", "/crane/run", 200)
    assert (line["model_id"], line["batch_size"]) == ("echo", 1)
    assert line["timings_ms"] == answer.json["metadata"]["timings_ms"]
    assert set(line["timings_ms"]) == {"queue", "load", "inference", "total"}
    assert line["duration_ms"] >= line["timings_ms"]["total"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer crane_wrong"}])
def test_who_has_no_valid_key_is_known_by_the_address(lines, make_app, sent):
    client = make_app().test_client()
    lines()
    client.post("/crane/run", json={"model_id": "echo", "input": 1}, headers=sent)
    [line] = lines()
    assert (line["address"], "key_id" in line) == ("127.0.0.1", False)


def test_settings_by_which_one_caller_takes_all_are_warned_of(gunicorn):
    server = gunicorn(CRANE_AUTH="off", CRANE_THREADS=8, CRANE_TIERS="free 9/minute concurrency=8")
    warned = [line["message"] for line in server.log_lines(level="WARNING")]
    assert warned == [
        "CRANE_AUTH is off: whoever reaches this service may call it",
        "One caller of the tier 'free' can take all 8 calls that an HTTP worker runs at once "
        "(CRANE_THREADS). Lower the tier's concurrency in CRANE_TIERS.",
    ]


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        (
            "/crane/run",
            {"model_id": "nope", "input": 1},
            {"status": 404, "error": "MODEL_NOT_FOUND", "model_id": "nope"},
        ),
        (
            "/crane/run",
            {"model_id": "echo", "input": 1, "options": {"delay": 1}},
            {"status": 400, "error": "VALIDATION_ERROR", "model_id": "echo"},
        ),
        ("/crane/run", ["not", "a", "call"], {"status": 400, "error": "VALIDATION_ERROR"}),
        ("/crane/models", {}, {"status": 405, "error": "METHOD_NOT_ALLOWED"}),
        ("/nowhere", {}, {"status": 404, "error": "NOT_FOUND", "route": None}),
    ],
)
def test_a_refused_request_is_one_line_with_its_error(lines, make_app, path, body, fields):
    client = make_app().test_client()
    lines()
    answer = client.post(path, json=body)
    [line] = lines()
    assert fields.items() <= line.items()
    assert line["request_id"] == answer.json["request_id"]


def test_a_call_that_was_too_slow_is_logged_as_such(lines, make_app):
    client = make_app(request_timeout_s=0.1).test_client()
    run(client, options={"delay_ms": 2000})
    [line] = lines()
    assert (line["status"], line["error"], line["model_id"]) == (504, "TIMEOUT_ERROR", "echo")


def test_what_callers_send_stays_out_of_the_log(capfd, make_app):
    client = make_app().test_client()
    headers = {"Authorization": "Bearer sesame-1", "X-API-Key": "sesame-2", "Cookie": "sesame-3"}
    body = {"model_id": "echo", "input": "sesame-4"}
    assert client.post("/crane/run?key=sesame-5", json=body, headers=headers).status_code == 200
    body["options"] = {"delay_ms": "sesame-6"}
    assert client.post("/crane/run", json=body, headers=headers).status_code == 400
    assert client.get("/sesame-7").status_code == 404
    written = capfd.readouterr().err
    assert written.count('"message":"request"') == 3
    assert "sesame" not in written


def test_the_hub_token_is_never_logged(gunicorn):
    # A model that fails to load leaves a whole traceback, and still no token.
    server = gunicorn(
        [{"id": "gone", "type": "rerank", "hf_model": "crane-tests/no-such-model"}],
        HF_TOKEN="hf_sesameopen",
        HF_HUB_OFFLINE="1",
        CRANE_LOG_LEVEL="DEBUG",
    )
    document = {"query": "a", "documents": ["b"]}
    status, answer = server.run("gone", document)
    assert (status, answer["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
    [line] = server.log_lines(message="gone did not load")
    assert "Traceback" in line["exception"]
    [request] = server.log_lines(message="request", route="/crane/run")
    assert request["request_id"] == answer["request_id"]
    assert "sesame" not in server.log()


@pytest.mark.parametrize(
    "name",
    [
        "echo\n2026-01-01T00:00:00.000Z INFO    request status=200",
        "echo\r\x1b[2Kforged",
        "echo\u2028forged\u0085forged",
        "\u202eforged",
    ],
)
def test_no_caller_can_forge_a_line_on_the_console(capfd, make_app, name):
    client = make_app(log_format="console").test_client()
    capfd.readouterr()
    run(client, model_id=name)
    written = capfd.readouterr().err
    assert written.count("\n") == 1
    assert written.endswith("\n")
    assert written[:-1].isprintable()
    assert CONSOLE_LINE.match(written)
    assert "status=404" in written


def test_no_caller_can_forge_a_pair_on_the_console(capfd, make_app):
    client = make_app(log_format="console").test_client()
    capfd.readouterr()
    run(client, model_id='echo status=200 "')
    assert 'model_id="echo status=200 \\""' in capfd.readouterr().err


def test_a_traceback_on_the_console_is_indented_below_its_line():
    forged = "2026-01-01T00:00:00.000Z INFO    forged"
    text = format_error(ConsoleFormatter(), ValueError(f"bad\n{forged}\x1b[31m"))
    first, *others = text.split("\n")
    assert CONSOLE_LINE.match(first)
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") and line.isprintable() for line in others)
    assert any(forged in line for line in others)


def test_a_traceback_in_json_is_one_line():
    line = format_error(JsonFormatter(), ValueError("bad\nworse"))
    assert "\n" not in line
    assert "ValueError: bad\nworse" in json.loads(line)["exception"]


def format_error(formatter, error):
    try:
        raise error
    except ValueError:
        record = logging.LogRecord("crane", logging.ERROR, "", 1, "failed", (), sys.exc_info())
    return formatter.format(record)


@pytest.mark.parametrize("formatter", [JsonFormatter(), ConsoleFormatter()])
@pytest.mark.parametrize(
    "value",
    ["a lone surrogate \ud800", 2**70, float("nan"), {1: {2}}, b"\xff", ValueError("x"), None, ""],
)
def test_no_value_breaks_the_log(formatter, value):
    record = logging.LogRecord("crane", logging.INFO, "", 1, "said %s", (value,), None)
    record.fields = {"value": value}
    line = formatter.format(record)
    line.encode()
    assert "\n" not in line
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["message"].startswith("said ")


def test_the_console_is_for_terminals_and_json_for_the_rest(capfd):
    # What capfd puts in the place of standard error is a file.
    assert logging_config("INFO", "auto")["formatters"]["crane"]["()"] is JsonFormatter
    assert logging_config("INFO", "console")["formatters"]["crane"]["()"] is ConsoleFormatter
    assert Config().log_format == "auto"


def test_a_terminal_gets_the_console_format():
    ours, theirs = pty.openpty()
    code = (
        "import logging.config; from backend.logs import logging_config\n"
        "logging.config.dictConfig(logging_config('INFO', 'auto'))\n"
        "logging.getLogger('crane').info('hello')"
    )
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    written = os.read(ours, 4096).decode()
    os.close(ours)
    assert CONSOLE_LINE.match(written)
    assert written.rstrip().endswith("hello")


def test_the_level_is_for_cranes_own_lines(capfd, make_app):
    client = make_app(log_level="ERROR").test_client()
    capfd.readouterr()
    run(client)
    logging.getLogger("some.library").info("chatter")
    assert capfd.readouterr().err == ""
    logging.getLogger("some.library").warning("trouble")
    assert json.loads(capfd.readouterr().err)["message"] == "trouble"


def test_every_line_of_a_server_is_json_but_its_greeting(gunicorn):
    server = gunicorn()
    server.run()
    server.stop()
    others = [line for line in server.log().splitlines() if not line.startswith("{")]
    assert [line.split()[0] for line in others if line] == ["Crane", "curl", "-d"]
    assert server.log_lines(logger="gunicorn.error")
