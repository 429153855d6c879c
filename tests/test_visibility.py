"""A key for some models learns nothing of the others, whatever it asks."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from backend.adapters.echo import Echo
from backend.config import Config
from backend.errors import ModelLoading, ModelUnavailable, OutOfMemory
from backend.keys import Keys
from backend.visibility import visible_error
from tests.conftest import ECHO
from tests.serving import wait_for
from tests.test_residency import MB, events, sized

__all__ = ["events", "sized"]

SECRET = "secret-model"
MINE = ECHO | {"id": "mine"}
THEIRS = ECHO | {"id": SECRET, "pinned": True}
REMOTE = {"REMOTE_ADDR": "192.0.2.1"}


@pytest.fixture
def keys(tmp_path):
    """Headers with a key of each kind."""
    kinds = {
        "admin": {"admin": True},
        "all": {},
        "some": {"models": ["mine", "gone"]},
        "some-admin": {"models": ["mine", "gone"], "admin": True},
    }
    with closing(Keys(Config(data_dir=tmp_path / "data"))) as opened:
        yield {
            kind: {"Authorization": "Bearer " + opened.create(owner=kind, tier="free", **more)[1]}
            for kind, more in kinds.items()
        }


@pytest.fixture
def client(make_app):
    return make_app([MINE, THEIRS], auth="required").test_client()


def calls(model_id):
    """Each way to name a model."""
    run = {"model_id": model_id, "input": 1}
    return [
        ("POST", "/crane/run", run),
        ("POST", "/crane/run", run | {"stream": True}),
        ("GET", f"/crane/models/{model_id}", None),
        ("GET", f"/v1/models/{model_id}", None),
        ("POST", f"/crane/models/{model_id}/load", None),
        ("POST", f"/crane/models/{model_id}/unload", None),
        ("POST", "/v1/embeddings", {"model": model_id, "input": "a"}),
        ("POST", "/v1/chat/completions", {"model": model_id, "messages": []}),
    ]


@pytest.mark.parametrize("kind", ["some", "some-admin"])
def test_a_model_that_a_key_may_not_use_is_as_one_that_is_not_there(client, keys, kind):
    for there, not_there in zip(calls(SECRET), calls("secret-modem"), strict=True):
        answers = []
        for method, path, body in (there, not_there):
            answer = client.open(path, method=method, json=body, headers=keys[kind])
            message = answer.json["error"]["message"]
            answers.append((answer.status_code, message.replace("secret-modem", SECRET)))
        assert answers[0] == answers[1]
        assert answers[0][0] == 403


def test_a_key_is_told_no_names_but_those_of_its_models(client, keys):
    asked = [
        *calls("min"),
        *calls("gone"),
        *calls(""),
        *calls("x" * 5000),
        ("GET", "/crane/models", None),
        ("GET", "/v1/models", None),
        ("GET", "/crane/quota", None),
        ("GET", "/metrics", None),
        ("GET", "/readyz", None),
        ("GET", "/health", None),
    ]
    for method, path, body in asked:
        answer = client.open(
            path, method=method, json=body, headers=keys["some"], environ_base=REMOTE
        )
        assert SECRET not in answer.text, path
    missing = client.get("/crane/models/gone", headers=keys["some"])
    assert (missing.status_code, missing.json["error"]["code"]) == (404, "MODEL_NOT_FOUND")


def test_a_key_for_all_models_is_still_told_the_nearest_name(client, keys):
    answer = client.get("/crane/models/secret-modem", headers=keys["all"])
    assert (answer.status_code, SECRET in answer.text) == (404, True)


LEAKS = [
    OutOfMemory(
        f"mine needs 3 MB; held: {SECRET} 2 MB (idle), mine 1 MB (in use).",
        details={"held_bytes": {SECRET: 2, "mine": 1}},
        retry_after_s=10,
    ),
    ModelLoading(f"mine waits for the load of {SECRET}.", details={"waits": [SECRET]}),
    ModelUnavailable(f"{SECRET}, then mine."),
]


@pytest.mark.parametrize("kind", ["some", "all"])
@pytest.mark.parametrize("error", LEAKS, ids=lambda error: error.code)
def test_an_error_of_an_engine_names_no_model_of_others(client, keys, kind, error):
    crane = client.application.extensions["crane"]
    header = {f"HTTP_{name.upper()}": value for name, value in keys[kind].items()}
    caller = crane.callers.identify(header | {"REMOTE_ADDR": "192.0.2.1"})
    seen = visible_error(caller, crane.registry, error)
    assert "mine" in seen.message
    assert (seen.code, seen.retry_after_s) == (error.code, error.retry_after_s)
    if kind == "all":
        assert (seen.message, seen.details) == (error.message, error.details)
    else:
        assert SECRET not in f"{seen.message}{seen.details}"


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_in_vain_for_memory_is_not_told_what_of_others_has_it(
    make_app, sized, keys, stream
):
    entries = [sized(SECRET, 2 * MB, pinned=True), sized("mine", 2 * MB)]
    settings = {"auth": "required", "memory_budget": 3 * MB, "load_wait_s": 0.1}
    client = make_app(entries, **settings).test_client()
    loaded = {"model_id": SECRET, "input": 1}
    wait_for(
        lambda: client.post("/crane/run", json=loaded, headers=keys["all"]).status_code == 200, 60
    )
    body = {"model_id": "mine", "input": 1, "stream": stream}

    def refused(kind):
        answer = client.post("/crane/run", json=body, headers=keys[kind], buffered=True)
        assert answer.json["error"]["code"] == "OUT_OF_MEMORY"
        return answer.text + client.get("/crane/models/mine", headers=keys[kind]).text

    wait_for(lambda: refused("all").count(SECRET) >= 2, 60)
    assert SECRET not in refused("some")


def test_what_a_caller_sent_comes_back_as_it_was(client, keys):
    """Or names could be tried out: one that is a model's would come back changed."""
    body = {"model_id": "mine", "input": 1, SECRET: 1}
    answer = client.post("/crane/run", json=body, headers=keys["some"])
    assert (answer.status_code, SECRET in answer.text) == (400, True)


@pytest.mark.parametrize("kind", ["none", "wrong", "some", "all", "admin"])
def test_only_admins_see_metrics_from_elsewhere(client, keys, kind):
    headers = {"none": {}, "wrong": {"X-API-Key": "no"}, **keys}[kind]
    answer = client.get("/metrics", headers=headers, environ_base=REMOTE)
    assert answer.status_code == {"none": 401, "wrong": 401, "admin": 200}.get(kind, 403)


@pytest.mark.parametrize("auth", ["auto", "required", "off"])
def test_this_host_sees_metrics_without_a_key_and_a_proxys_callers_do_not(make_app, auth):
    client = make_app(auth=auth).test_client()
    assert client.get("/metrics").status_code == 200
    passed_on = client.get("/metrics", headers={"X-Forwarded-For": "203.0.113.9"})
    assert passed_on.status_code == (200 if auth == "off" else 401)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("here", True), ("none", False), ("wrong", False), ("some", False), ("all", True)],
)
def test_readyz_names_models_for_those_who_may_use_them(make_app, add_task, keys, kind, shown):
    gate = threading.Event()

    class LoadsAtTheGate(Echo):
        def load(self):
            assert gate.wait(60)
            super().load()

    theirs = add_task(SECRET, LoadsAtTheGate) | {"pinned": True}
    client = make_app([MINE, theirs], auth="required").test_client()
    headers = {"none": {}, "here": {}, "wrong": {"X-API-Key": "no"}, **keys}[kind]
    answer = client.get("/readyz", headers=headers, environ_base={} if kind == "here" else REMOTE)
    gate.set()
    assert answer.status_code == 503
    name = SECRET if shown else "A model"
    assert answer.json["reasons"] == [f"{name} is pinned and not loaded yet."]


@pytest.mark.parametrize(
    ("who", "hub", "folder"),
    [
        ("here", True, True),
        ("admin", True, True),
        ("all", True, False),
        ("some", False, False),
        ("some-admin", False, False),
    ],
)
def test_where_weights_come_from_is_not_for_everybody(make_app, keys, tmp_path, who, hub, folder):
    (tmp_path / "weights").mkdir()
    entries = [
        MINE | {"hf_model": "private/repository"},
        ECHO | {"id": "gone", "hf_model": "./weights"},
    ]
    auth = "auto" if who == "here" else "required"
    client = make_app(entries, auth=auth).test_client()
    headers = keys.get(who, {})
    wanted = {
        "mine": "private/repository" if hub else None,
        "gone": "./weights" if folder else None,
    }
    listed = client.get("/crane/models", headers=headers).json["models"]
    assert {model["id"]: model["hf_model"] for model in listed} == wanted
    for model_id, hf_model in wanted.items():
        one = client.get(f"/crane/models/{model_id}", headers=headers)
        assert one.json["hf_model"] == hf_model
        body = {"model_id": model_id, "input": 1}
        answer = client.post("/crane/run", json=body, headers=headers)
        assert answer.json["metadata"]["hf_model"] == hf_model
        streamed = client.post("/crane/run", json={**body, "stream": True}, headers=headers)
        weights = (str(name) for name in ("private/repository", "./weights"))
        assert [name for name in weights if name in streamed.text] == [hf_model] * bool(hf_model)
