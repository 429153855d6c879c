"""The wire: ids, headers, limits, CORS, and the shape of every refusal."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ECHO, run

EMBEDDER = {
    "id": "embedder",
    "type": "embeddings",
    "hf_model": "sentence-transformers/all-MiniLM-L6-v2",
}


def code(answer):
    """The status and code of a refusal, after a look at its whole shape."""
    assert set(answer.json) == {"error", "request_id"}
    assert set(answer.json["error"]) == {"code", "message", "details"}
    assert answer.json["request_id"] == answer.headers["X-Request-ID"]
    assert answer.json["error"]["message"]
    return answer.status_code, answer.json["error"]["code"]


def test_an_answer_has_the_output_and_the_receipt(client):
    answer = run(client, input={"a": [1, None, "ü"]}, options={"delay_ms": 1})
    assert answer.status_code == 200
    assert answer.json["output"] == {"a": [1, None, "ü"]}
    metadata = answer.json["metadata"]
    assert metadata.pop("timings_ms").keys() == {"queue", "load", "inference", "total"}
    assert metadata == {
        "model_id": "echo",
        "task": "echo",
        "hf_model": None,
        "revision": None,
        "device": "cpu",
        "dtype": "none",
        "request_id": answer.headers["X-Request-ID"],
        "options": {"delay_ms": 1},
        "usage": {},
        "batch_size": 1,
    }


@pytest.mark.parametrize("value", [0, False, "", None, [[]], {}, 1.5, -(2**63), "\0", "😀"])
def test_echo_gives_back_just_what_it_got(client, value):
    answer = run(client, input=[value])
    assert answer.json["output"] == [value]
    assert type(answer.json["output"][0]) is type(value)


@pytest.mark.parametrize("sent", ["order-17", "a.b:c/d+e=f@g_h", "x" * 128])
def test_a_sane_request_id_is_kept(client, sent):
    answer = client.get("/livez", headers={"X-Request-ID": sent})
    assert answer.headers["X-Request-ID"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "<script>", "é", '"', "a;b"])
def test_another_request_id_is_replaced(client, sent):
    answer = client.get("/livez", headers={"X-Request-ID": sent})
    assert len(answer.headers["X-Request-ID"]) == 32


@pytest.mark.parametrize(
    ("body", "status", "error", "details"),
    [
        pytest.param({}, 400, "VALIDATION_ERROR", ["model_id", "input"], id="empty"),
        pytest.param({"model_id": "echo"}, 400, "VALIDATION_ERROR", ["input"], id="no-input"),
        pytest.param([], 400, "VALIDATION_ERROR", ["body"], id="a-list"),
        pytest.param(
            {"model_id": 5, "input": 1}, 400, "VALIDATION_ERROR", ["model_id"], id="id-type"
        ),
        pytest.param(
            {"model_id": "ecko", "input": 1}, 404, "MODEL_NOT_FOUND", [], id="unknown-model"
        ),
        pytest.param(
            {"model_id": "echo", "input": 1, "inptu": 2},
            400,
            "VALIDATION_ERROR",
            ["inptu"],
            id="unknown-key",
        ),
        pytest.param(
            {"model_id": "echo", "input": 1, "options": {"delay_ms": "5", "x": 1}},
            400,
            "VALIDATION_ERROR",
            ["options.delay_ms", "options.x"],
            id="options",
        ),
        pytest.param(
            {"model_id": "echo", "input": 1, "options": []},
            400,
            "VALIDATION_ERROR",
            ["options"],
            id="options-type",
        ),
        pytest.param(
            {"model_id": "echo", "input": 1, "options": {"delay_ms": 60_001}},
            400,
            "VALIDATION_ERROR",
            ["options.delay_ms"],
            id="out-of-range",
        ),
        pytest.param(
            {"model_id": "embedder", "input": ["a", 3, " "]},
            400,
            "VALIDATION_ERROR",
            ["input[1]", "input[2]"],
            id="items",
        ),
        pytest.param(
            {"model_id": "embedder", "input": []}, 400, "VALIDATION_ERROR", ["input"], id="no-items"
        ),
    ],
)
def test_a_fault_is_named_by_its_path(make_app, body, status, error, details):
    answer = make_app([ECHO, EMBEDDER]).test_client().post("/crane/run", json=body)
    assert code(answer) == (status, error)
    assert sorted(answer.json["error"]["details"]) == sorted(details)


@pytest.mark.parametrize(
    ("method", "path", "headers", "refusal"),
    [
        ("GET", "/nope", {}, (404, "NOT_FOUND")),
        ("GET", "/crane/models/nope", {}, (404, "MODEL_NOT_FOUND")),
        ("GET", "/crane/run", {}, (405, "METHOD_NOT_ALLOWED")),
        ("PATCH", "/livez", {}, (405, "METHOD_NOT_ALLOWED")),
        ("POST", "/crane/run", {"Content-Type": "text/plain"}, (415, "UNSUPPORTED_MEDIA_TYPE")),
        ("POST", "/crane/run", {}, (415, "UNSUPPORTED_MEDIA_TYPE")),
        ("POST", "/crane/run", {"Accept": "image/png"}, (406, "NOT_ACCEPTABLE")),
    ],
)
def test_http_faults_have_the_same_shape(client, method, path, headers, refusal):
    body = b'{"model_id": "echo", "input": 1}'
    if "Accept" in headers:
        headers = {"Content-Type": "application/json"} | headers
    assert code(client.open(path, method=method, headers=headers, data=body)) == refusal


@pytest.mark.parametrize("accept", ["*/*", "application/*", "application/json;q=0.1, text/html"])
def test_an_accept_header_that_takes_json_gets_json(client, accept):
    answer = client.post(
        "/crane/run", json={"model_id": "echo", "input": 1}, headers={"Accept": accept}
    )
    assert (answer.status_code, answer.mimetype) == (200, "application/json")


def test_each_limit_has_its_own_clear_error(make_app):
    client = make_app(max_body=2000, max_batch=3, max_text=50, queue_size=3).test_client()
    assert run(client, input=[1, 2, 3]).status_code == 200
    long_batch = run(client, input=[1, 2, 3, 4])
    assert code(long_batch) == (400, "VALIDATION_ERROR")
    assert "1 to 3 items" in long_batch.json["error"]["details"]["input"]
    assert run(client, input="x" * 50).status_code == 200
    long_text = run(client, input=[1, {"deep": ["x" * 51]}])
    assert code(long_text) == (400, "VALIDATION_ERROR")
    assert long_text.json["error"]["details"] == {
        "input[1].deep[0]": "has 51 characters; at most 50 are allowed"
    }
    large = run(client, input=["x" * 49] * 50)
    assert code(large) == (413, "PAYLOAD_TOO_LARGE")
    assert "2000 bytes" in large.json["error"]["message"]


def test_deep_nesting_is_refused_at_the_level_that_readme_and_msgpack_can_take(client):
    def nested(levels):
        return json.loads("[" * levels + "]" * levels)

    assert run(client, input={"x": nested(60)}).status_code == 200
    assert code(run(client, input={"x": nested(70)})) == (400, "VALIDATION_ERROR")
    body = f'{{"model_id": "echo", "input": {"[" * 100_000}'
    answer = client.post("/crane/run", data=body, content_type="application/json")
    assert code(answer) == (400, "VALIDATION_ERROR")


def test_every_answer_has_the_security_headers(client):
    for answer in (run(client), run(client, "nope"), client.get("/nope"), client.get("/livez")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_without_the_setting_no_origin_is_allowed(client):
    answer = client.get("/livez", headers={"Origin": "https://app.example.com"})
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_listed_origin_and_no_other_may_call(make_app):
    client = make_app(allowed_origins=("https://app.example.com",)).test_client()
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "Content-Type",
    }
    for origin, allowed in [
        ("https://app.example.com", "https://app.example.com"),
        ("https://evil.example.com", None),
        ("https://app.example.com.evil.org", None),
        ("https://appxexample.com", None),
        ("null", None),
    ]:
        asked = client.options("/crane/run", headers={"Origin": origin, **preflight})
        assert asked.headers.get("Access-Control-Allow-Origin") == allowed
        got = client.get("/livez", headers={"Origin": origin})
        assert got.headers.get("Access-Control-Allow-Origin") == allowed
        assert got.headers.get("Access-Control-Allow-Credentials") is None


def test_the_models_list_says_how_to_call_each(make_app):
    entry = EMBEDDER | {"options": {"dimensions": 4}, "limits": {"dimensions": 64}}
    client = make_app([ECHO, entry]).test_client()
    listed = client.get("/crane/models").json["models"]
    assert [(model["id"], model["task"], model["state"]) for model in listed] == [
        ("echo", "echo", "unloaded"),
        ("embedder", "embeddings", "unloaded"),
    ]
    assert listed[1] == client.get("/crane/models/embedder").json
    dimensions = listed[1]["options"]["dimensions"]
    assert dimensions["type"] == "integer"
    assert (dimensions["default"], dimensions["min"], dimensions["max"]) == (4, 1, 64)
    assert client.post("/crane/run", json=listed[0]["example"]).status_code == 200
    assert client.get("/crane/models/echo").json["state"] == "ready"


def test_every_model_is_counted_in_one_state(make_app):
    client = make_app([ECHO, {"id": "again", "type": "echo"}, EMBEDDER]).test_client()
    assert client.get("/readyz").json["models"] == {"unloaded": 3}
    run(client)
    assert client.get("/readyz").json["models"] == {"ready": 1, "unloaded": 2}
    client.application.extensions["crane"].engine.unload("echo")
    assert client.get("/readyz").json["models"] == {"unloaded": 3}


def test_livez_and_readyz_need_no_model_library():
    look = (
        "import sys\n"
        "from backend import create_app\n"
        "from backend.config import Config\n"
        "client = create_app(Config()).test_client()\n"
        "assert client.get('/livez').status_code == 200\n"
        "assert client.get('/readyz').status_code == 200\n"
        "assert client.get('/health').json['models'] == client.get('/readyz').json['models']\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**80), max_value=2**80)
    | st.floats()
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
GOOD = {"model_id": "embedder", "input": "x", "options": {}}


@st.composite
def bad_bodies(draw):
    """Bytes that are no valid call: of another type, torn, mangled, or not JSON at all."""
    body = dict(GOOD)
    way = draw(st.sampled_from(["type", "key", "torn", "bytes", "mangled", "nan", "huge"]))
    if way == "type":
        field = draw(st.sampled_from(["model_id", "input", "options"]))
        right = {"model_id": str, "input": str, "options": dict}[field]
        wrong = JSON.filter(lambda value: not isinstance(value, right | list))
        body[field] = draw(wrong if field != "options" else wrong.filter(lambda v: v != {}))
    elif way == "key":
        body[draw(st.text().filter(lambda key: key not in GOOD))] = draw(JSON)
    data = json.dumps(body).encode()
    if way == "torn":
        data = data[: draw(st.integers(0, len(data) - 1))]
    elif way == "bytes":
        data = draw(st.binary(max_size=64))
    elif way == "mangled":
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + bytes([draw(st.integers(128, 255))]) + data[place + 1 :]
    elif way == "nan":
        options = draw(st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999"]))
        data = data.replace(b"{}", b'{"dimensions": %s}' % options.encode())
    elif way == "huge":
        digits = b"9" * draw(st.integers(1, 5000))
        data = data.replace(b"{}", b'{"dimensions": %s99999}' % digits)
    return data


@pytest.fixture(scope="module")
def hardened(tmp_path_factory):
    """One app for all the bad bodies; nothing that is sent to it reaches a model."""
    from backend import create_app
    from backend.config import Config
    from tests.conftest import write_models

    models = write_models(tmp_path_factory.mktemp("hardened"), [EMBEDDER])
    app = create_app(Config(models=models, quota="off"))
    yield app.test_client()
    app.extensions["crane"].engine.close()


@settings(
    max_examples=400,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    body=bad_bodies(),
    content_type=st.sampled_from(["application/json", "application/json; charset=utf-8"]),
)
def test_a_bad_body_is_a_4xx_in_our_shape(hardened, body, content_type):
    answer = hardened.post("/crane/run", data=body, content_type=content_type)
    assert code(answer)[0] in (400, 404)


@settings(max_examples=100, deadline=None, database=None)
@given(content_type=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])))
def test_another_content_type_is_refused_whatever_it_is(hardened, content_type):
    if "json" in content_type.lower():
        return
    answer = hardened.post("/crane/run", data=json.dumps(GOOD), content_type=content_type)
    assert code(answer)[0] == 415
