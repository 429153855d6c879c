"""Who calls: keys and addresses through the caller's door."""

from __future__ import annotations

import stat
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from backend import callers
from backend.config import Config
from backend.keys import Keys
from tests.conftest import ECHO, write_models
from tests.serving import Gunicorn, wait_for
from tests.test_engine import at_once

OTHER = ECHO | {"id": "other"}
OUTSIDE = {"auth": "required"}


WRONG = {
    "unknown-id": lambda text, number: f"crane_{'a' * 12}_{number:032}",
    "wrong-secret": lambda text, number: f"{text[:19]}{number:032}",
    "no-key": lambda text, number: f"sk-{number}",
    "one-again-and-again": lambda text, number: f"crane_{'a' * 12}_{'b' * 32}",
}


@pytest.fixture
def keys(tmp_path):
    opened = Keys(Config(data_dir=tmp_path / "data"))
    yield opened
    opened.close()


def bearer(text):
    return {"Authorization": f"Bearer {text}"}


def ask(client, text=None, model_id="echo", address="192.0.2.1", **headers):
    if text is not None:
        headers["Authorization"] = f"Bearer {text}"
    return client.post(
        "/crane/run",
        json={"model_id": model_id, "input": 1},
        headers=headers,
        environ_base={"REMOTE_ADDR": address},
    )


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(lambda text: {"Authorization": f"Bearer {text}"}, id="bearer"),
        pytest.param(lambda text: {"Authorization": f"bearer   {text} "}, id="bearer-spaced"),
        pytest.param(lambda text: {"X-API-Key": text}, id="x-api-key"),
        pytest.param(
            lambda text: {"X-API-Key": text, "Authorization": f"Bearer {text}"}, id="both"
        ),
    ],
)
def test_a_key_is_taken_from_either_header(make_app, keys, headers):
    _, text = keys.create(owner="Ann", tier="pro")
    answer = ask(make_app(**OUTSIDE).test_client(), **headers(text))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "An API key is needed: send it as Authorization: Bearer crane_…."),
        ({"Authorization": "Basic YTpi"}, "Send the API key as Authorization: Bearer crane_…"),
        ({"Authorization": "crane_abc"}, "Send the API key as Authorization: Bearer crane_…"),
        ({"Authorization": "Bearer"}, "This API key is not valid"),
        ({"X-API-Key": ""}, "This API key is not valid"),
        ({"X-API-Key": "crane_" + "é" * 40}, "This API key is not valid"),
        ({"X-API-Key": "k" * 8000}, "This API key is not valid"),
        ({"X-API-Key": "a", "Authorization": "Bearer b"}, "hold different keys: send one"),
    ],
)
def test_who_has_no_key_is_told_how_to_send_one(make_app, headers, message):
    answer = ask(make_app(**OUTSIDE).test_client(), **headers)
    assert (answer.status_code, answer.json["error"]["code"]) == (401, "INVALID_API_KEY")
    assert message in answer.json["error"]["message"]
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_what_is_wrong_with_a_key_is_not_told_apart(make_app, keys):
    revoked, text = keys.create(owner="Ann", tier="free")  # which makes the database, in its time
    keys.revoke(revoked.id)
    ended = datetime.now(UTC) + timedelta(seconds=0.5)
    _, late = keys.create(owner="Ann", tier="free", expires_at=ended)
    time.sleep(0.5)
    client = make_app(**OUTSIDE).test_client()
    wrong = [late, text, text[:-1] + ("a" if text[-1] != "a" else "b"), "crane_x_y"]
    answers = [ask(client, one) for one in wrong]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.json["error"]["message"] for answer in answers}) == 1


def test_health_needs_no_key_and_all_else_does(make_app):
    client = make_app(**OUTSIDE).test_client()
    for path in ("/livez", "/readyz", "/health"):
        assert client.get(path).status_code == 200
    for path in ("/crane/models", "/crane/models/echo", "/crane/quota"):
        assert client.get(path).status_code == 401
    assert client.get("/nowhere").status_code == 404


def test_a_browsers_question_whether_it_may_call_needs_no_key(make_app):
    client = make_app(**OUTSIDE, allowed_origins=("https://a.com",)).test_client()
    asked = {"Origin": "https://a.com", "Access-Control-Request-Method": "POST"}
    answer = client.options("/crane/run", headers=asked)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (
        200,
        "https://a.com",
    )


def test_a_key_has_the_quota_of_its_tier_wherever_it_calls_from(make_app, keys):
    key, text = keys.create(owner="Ann", tier="pro")
    client = make_app(quota="on", **OUTSIDE).test_client()
    left = [
        ask(client, text, address=address).headers["X-RateLimit-Remaining"]
        for address in ("192.0.2.1", "192.0.2.2")
    ]
    assert left == ["599", "598"]
    quota = client.get("/crane/quota", headers=bearer(text)).json
    assert (quota["tier"], quota["key_id"]) == ("pro", key.id)
    assert [limit["left"] for limit in quota["limits"]] == [598]


def test_a_key_is_on_its_own_quota_where_none_is_needed_too(make_app, keys):
    _, text = keys.create(owner="Ann", tier="pro")
    client = make_app(quota="on").test_client()
    here = {"address": "127.0.0.1"}
    assert ask(client, text, **here).headers["X-RateLimit-Limit"] == "600"
    assert ask(client, **here).headers["X-RateLimit-Limit"] == "60"
    assert ask(client, "sk-what-some-clients-send", **here).headers["X-RateLimit-Limit"] == "60"
    assert ask(client, text[:-1], **here).status_code == 401
    free = make_app(quota="on", auth="off").test_client()
    assert ask(free, text[:-1]).headers["X-RateLimit-Limit"] == "60"


def test_a_tier_that_is_no_more_counts_as_free(make_app, keys, capsys):
    _, text = keys.create(owner="Ann", tier="gold")
    client = make_app(quota="on", **OUTSIDE).test_client()
    assert ask(client, text).headers["X-RateLimit-Limit"] == "60"
    assert "gold" in capsys.readouterr().err


def test_a_key_may_use_the_models_it_names_and_no_other(make_app, keys):
    _, text = keys.create(owner="Ann", tier="free", models=["other"])
    client = make_app([ECHO, OTHER], quota="on", **OUTSIDE).test_client()
    assert ask(client, text, "other").status_code == 200
    refused = ask(client, text, "echo")
    assert (refused.status_code, refused.json["error"]["code"]) == (403, "FORBIDDEN")
    assert refused.json["error"]["message"] == ("This key may not use echo. It may use: other.")
    assert client.get("/crane/models/echo", headers=bearer(text)).status_code == 403
    shown = client.get("/crane/models", headers=bearer(text)).json["models"]
    assert [model["id"] for model in shown] == ["other"]
    quota = client.get("/crane/quota", headers=bearer(text)).json
    assert quota["models"] == ["other"]
    assert quota["limits"][0]["left"] == 58  # the refused call took its unit too


def test_nothing_of_a_key_but_its_id_is_logged(make_app, keys, capsys):
    key, text = keys.create(owner="Ann", tier="free")
    client = make_app(log_level="DEBUG", **OUTSIDE).test_client()
    ask(client, text)
    ask(client, text[:-1] + "x")
    log = capsys.readouterr().err
    assert f'"key_id":"{key.id}"' in log
    assert not [line for line in log.splitlines() if '"key_id"' in line and '"address"' in line]
    assert text.rpartition("_")[2][:-1] not in log


@pytest.mark.parametrize("seen", [True, False], ids=["seen-before", "never-seen"])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_keys_slow_down_nobody_with_a_right_one(make_app, keys, monkeypatch, kind, seen):
    _, text = keys.create(owner="Ann", tier="free")
    client = make_app(**OUTSIDE).test_client()
    if seen:
        assert ask(client, text).status_code == 200
        monkeypatch.setattr("backend.keys.CACHE_S", -1)  # as if it was seen long ago
    answers = [ask(client, WRONG[kind](text, number)) for number in range(12)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 2
    assert answers[-1].json["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert "Too many wrong API keys" in answers[-1].json["error"]["message"]
    assert 58 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert "RateLimit" not in answers[-1].headers
    assert ask(client, text).status_code == 200
    other = ask(client, WRONG[kind](text, 20), address="192.0.2.2")
    assert other.status_code == 401


def test_a_revoked_key_is_one_of_the_wrong_ones(make_app, keys, monkeypatch):
    key, text = keys.create(owner="Ann", tier="free")
    client = make_app(**OUTSIDE).test_client()
    for _ in range(30):
        assert ask(client, text).status_code == 200  # which are no attempts
    keys.revoke(key.id)
    monkeypatch.setattr("backend.keys.CACHE_S", -1)  # as if it was seen long ago
    assert [ask(client, text).status_code for _ in range(11)] == [401] * 10 + [429]


def test_wrong_keys_are_counted_anew_after_a_minute(make_app, monkeypatch):
    monkeypatch.setattr(callers, "WINDOW_S", 0.05)
    client = make_app(**OUTSIDE).test_client()
    assert {ask(client, "wrong").status_code for _ in range(10)} == {401}
    wait_for(lambda: ask(client, "wrong").status_code == 401)


def test_addresses_with_wrong_keys_take_only_so_much_memory(monkeypatch):
    monkeypatch.setattr(callers, "MAX_ADDRESSES", 2)
    wrong = callers.WrongKeys()
    for address in "aaabbbccc" + "c" * 7:
        assert wrong.count(address) is None
    assert wrong.count("c") is not None
    assert len(wrong._counts) == 2


def test_many_first_calls_at_once_with_a_right_key_are_all_let_in(make_app, keys):
    _, text = keys.create(owner="Ann", tier="free")
    client = make_app(**OUTSIDE).test_client()
    asked = at_once(40, lambda number: ask(client, text).status_code)
    assert Counter(asked) == Counter({200: 40})


def test_of_many_wrong_keys_at_once_ten_are_told_so(make_app):
    client = make_app(**OUTSIDE).test_client()
    asked = Counter(
        at_once(40, lambda number: ask(client, WRONG["unknown-id"]("", number)).status_code)
    )
    assert asked == Counter({401: 10, 429: 30})


def test_keys_that_cannot_be_looked_up_are_answered_503(make_app, keys, tmp_path):
    _, text = keys.create(owner="Ann", tier="free")
    keys.close()
    client = make_app(**OUTSIDE).test_client()
    (tmp_path / "data" / "crane.db").write_bytes(b"no database, and long enough to be read" * 99)
    for name in ("crane.db-wal", "crane.db-shm"):
        (tmp_path / "data" / name).unlink(missing_ok=True)
    answer = ask(client, text)
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "KEYS_UNAVAILABLE")
    assert int(answer.headers["Retry-After"]) >= 1


# With real workers.


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server that needs keys and counts calls, as it is after its first start."""
    folder = tmp_path_factory.mktemp("locked")
    settings = {"CRANE_AUTH": "required", "CRANE_QUOTA": "on"}
    server = Gunicorn(write_models(folder, [ECHO]), folder / "data", settings)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def test_the_first_start_that_needs_keys_leaves_one_in_a_file(gunicorn, tmp_path):
    data = tmp_path / "kept"
    server = gunicorn(CRANE_AUTH="required", CRANE_DATA_DIR=data)
    text, file = server.first_key(), data / "first-key"
    assert server.log().count(str(file)) == 1
    assert text not in server.log()
    assert "-H 'Authorization: Bearer YOUR_KEY'" in server.log()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert server.run()[0] == 401
    call = {"model_id": "echo", "input": 1}
    assert server.post(call, Authorization=f"Bearer {text}")[0] == 200
    listed = server.get("/crane/quota", Authorization=f"Bearer {text}")[1]
    assert listed["tier"] == "pro"
    assert server.request("POST", "/crane/models/echo/load", headers=bearer(text))[0] == 200
    file.unlink()
    again = gunicorn(CRANE_AUTH="required", CRANE_DATA_DIR=data)
    assert "first" not in again.log()
    assert not file.exists()
    assert "-H 'Authorization: Bearer YOUR_KEY'" in again.log()
    assert again.post(call, Authorization=f"Bearer {text}")[0] == 200


def test_a_start_behind_a_proxy_leaves_a_key_in_a_file_too(gunicorn):
    server = gunicorn(CRANE_TRUSTED_PROXIES=1)
    headers = {"X-Forwarded-For": "192.0.2.1"}
    assert server.post({"model_id": "echo", "input": 1}, **headers)[0] == 401
    headers["Authorization"] = f"Bearer {server.first_key()}"
    assert server.post({"model_id": "echo", "input": 1}, **headers)[0] == 200


def test_the_data_folder_is_the_services_own(locked):
    assert locked.data_dir.stat().st_mode & 0o777 == 0o700


def test_a_start_on_loopback_makes_no_key_and_no_database(gunicorn, tmp_path):
    data = tmp_path / "kept"
    server = gunicorn(CRANE_DATA_DIR=data)
    assert server.run()[0] == 200
    assert "crane_" not in server.log()
    assert not (data / "crane.db").exists()


def test_a_start_whose_database_is_away_says_so_and_serves_what_needs_no_key(gunicorn):
    url = "postgresql://nobody:hunter2@127.0.0.1:9/crane"
    server = gunicorn(CRANE_AUTH="required", CRANE_DATABASE_URL=url)
    assert "No first API key could be made" in server.log()
    assert "hunter2" not in server.log()
    status, answer = server.post(
        {"model_id": "echo", "input": 1}, Authorization=f"Bearer crane_{'a' * 12}_{'b' * 32}"
    )
    assert (status, answer["error"]["code"]) == (503, "KEYS_UNAVAILABLE")
    assert server.get("/readyz")[0] == 200


def test_a_revoked_key_stops_in_every_worker_within_5_s(gunicorn, tmp_path):
    data = tmp_path / "kept"
    server = gunicorn(CRANE_AUTH="required", CRANE_DATA_DIR=data, CRANE_WORKERS=4)
    keys = Keys(Config(data_dir=data))
    key, text = keys.create(owner="Ann", tier="pro")
    call = {"model_id": "echo", "input": 1}

    def statuses(count):
        return {server.post(call, Authorization=f"Bearer {text}")[0] for _ in range(count)}

    assert statuses(60) == {200}
    keys.revoke(key.id)
    keys.close()
    revoked = time.monotonic()
    time.sleep(max(0, revoked + 5 - time.monotonic()))
    assert 200 not in statuses(60)


@pytest.mark.parametrize("sent", ["-H 'Authorization: Bearer KEY'", "-H 'X-API-Key: KEY'"])
def test_curl_calls_with_a_key(locked, sent):
    sent = sent.replace("KEY", locked.first_key())
    command = f"curl -si http://127.0.0.1:{locked.port}/crane/quota {sent}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("HTTP/1.1 200 OK")
