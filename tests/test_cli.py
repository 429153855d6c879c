"""The command line, as an operator runs it: ``flask --app wsgi crane …``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click import ClickException

from backend.cli import expiry
from backend.config import Config
from backend.keys import Keys
from tests.conftest import ECHO, write_models

ROOT = Path(__file__).resolve().parent.parent
KEY = r"crane_([a-z2-7]{12})_[A-Za-z0-9]{32}"
NOW = datetime(2030, 1, 30, 12, tzinfo=UTC)


@pytest.fixture
def flask(tmp_path):
    """Run ``flask --app wsgi crane keys …`` (or another group) as a process of its own."""
    models = write_models(tmp_path, [ECHO, ECHO | {"id": "other"}])
    env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    env |= {"CRANE_DATA_DIR": str(tmp_path / "data"), "CRANE_MODELS": str(models)}

    def run(*arguments, group="keys", **settings):
        command = [sys.executable, "-m", "flask", "--app", "wsgi", "crane", group, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=env | settings, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def keys(tmp_path):
    with closing(Keys(Config(data_dir=tmp_path / "data"))) as opened:
        yield opened


def test_a_key_is_made_shown_rotated_and_revoked(flask, keys):
    made = flask("create", "--owner", "Ann Lee", "--tier", "free")
    assert made.returncode == 0, made.stderr
    [id_] = re.fullmatch(KEY + "\n", made.stdout).groups()
    found = keys.find(made.stdout.strip())
    assert (found.owner, found.tier, found.models, found.expires_at) == (
        "Ann Lee",
        "free",
        None,
        None,
    )

    listed = flask("list")
    assert listed.returncode == 0
    [head, line] = listed.stdout.splitlines()
    assert head.split()[:4] == ["ID", "OWNER", "TIER", "STATE"]
    assert re.split("  +", line)[:5] == [id_, "Ann Lee", "free", "live", "all"]
    secret = made.stdout.strip()[19:]
    assert secret not in listed.stdout + listed.stderr + made.stderr
    assert not re.search("[0-9a-f]{32}", listed.stdout)

    rotated = flask("rotate", id_)
    assert rotated.returncode == 0
    assert re.fullmatch(KEY + "\n", rotated.stdout).groups() == (id_,)
    assert keys.find(rotated.stdout.strip()).owner == "Ann Lee"
    with closing(Keys(keys._config)) as elsewhere:
        assert elsewhere.find(made.stdout.strip()) is None

    revoked = flask("revoke", id_)
    assert (revoked.returncode, revoked.stdout) == (0, "")
    assert "revoked" in flask("list").stdout
    with closing(Keys(keys._config)) as elsewhere:
        assert elsewhere.find(rotated.stdout.strip()) is None


def test_a_key_may_end_and_be_for_some_models_only(flask, keys):
    options = ["--expires", "30d", "--models", "other, echo"]
    made = flask("create", "--owner", "a", "--tier", "pro", *options)
    assert made.returncode == 0, made.stderr
    [key] = keys.list()
    assert key.models == {"echo", "other"}
    assert key.expires_at - key.created_at == pytest.approx(
        timedelta(days=30), abs=timedelta(seconds=5)
    )
    assert "echo,other" in flask("list").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "--owner", "a", "--tier", "gold"], "one of: free, pro"),
        (["create", "--owner", " ", "--tier", "free"], "--owner must be a name"),
        (["create", "--owner", "a\nb", "--tier", "free"], "--owner must be a name"),
        (["create", "--owner", "a", "--tier", "free", "--models", "eco"], "did you mean 'echo'?"),
        (["create", "--owner", "a", "--tier", "free", "--models", "x"], "allowed are: echo, other"),
        (["create", "--owner", "a", "--tier", "free", "--models", ","], "are: echo, other"),
        (["create", "--owner", "a", "--tier", "free", "--expires", "soon"], "such as 90m, 12h"),
        (["create", "--owner", "a", "--tier", "free", "--expires", "2020-01-01"], "in the future"),
        (["revoke", "abcdefghijkl"], "there is no key 'abcdefghijkl'; it is one of: none"),
        (["rotate", "é"], "there is no key 'é'"),
    ],
)
def test_a_fault_is_told_in_one_line(flask, arguments, says):
    done = flask(*arguments)
    assert done.returncode != 0
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("{")]  # the log's
    assert line.startswith("Error: ")
    assert says in line


def test_a_database_that_is_away_is_told_in_one_line_without_its_password(flask):
    url = "postgresql://crane:hunter2@127.0.0.1:1/crane"
    done = flask("list", CRANE_DATABASE_URL=url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Connection refused" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("90m", NOW + timedelta(minutes=90)),
        ("12h", NOW + timedelta(hours=12)),
        ("30d", NOW + timedelta(days=30)),
        ("4w", NOW + timedelta(days=28)),
        ("2030-02-28", datetime(2030, 2, 28, tzinfo=UTC)),
        ("2030-02-28T08:00+02:00", datetime(2030, 2, 28, 6, tzinfo=UTC)),
    ],
)
def test_an_expiry_is_a_time_from_now_or_a_date(text, until):
    assert expiry(text, NOW) == until


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "d",
        "0d",
        "-1d",
        "1.5d",
        "٣d",
        "30d ",
        "30 days",
        "999999999w",
        "2030-01-30",
        "2030-02-30",
        "9999-12-31T23:59-23:00",
        "1" * 5000 + "d",
    ],
)
def test_an_expiry_that_is_none_or_is_over_is_refused(text):
    with pytest.raises(ClickException, match="--expires"):
        expiry(text, NOW)


def test_the_command_line_works_beside_the_service(gunicorn, flask):
    server = gunicorn()
    folder = str(server.output.with_suffix(""))
    made = flask("create", "--owner", "a", "--tier", "free", CRANE_DATA_DIR=folder)
    assert re.fullmatch(KEY + "\n", made.stdout), made.stderr
    assert server.run()[0] == 200


@pytest.fixture
def models(flask, gunicorn):
    """``crane models …`` beside a running server: ``models(server, "load", "echo")``."""

    def run(server, *arguments):
        place = {"CRANE_DATA_DIR": server.data_dir, "CRANE_MODELS": server.models}
        return flask(*arguments, group="models", **{k: str(v) for k, v in place.items()})

    return run


def test_models_are_listed_loaded_inspected_and_unloaded(models, gunicorn):
    server = gunicorn([ECHO, ECHO | {"id": "kept", "pinned": True}])
    loaded = models(server, "load", "echo")
    assert (loaded.returncode, loaded.stderr) == (0, "echo is loaded.\n")
    head, *rows = models(server, "list").stdout.splitlines()
    assert head.split() == ["ID", "TASK", "STATE", "DEVICE", "MEMORY", "QUEUE", "IDLE"]
    assert [re.split(r"\s{2,}", row)[:6] for row in rows] == [
        ["echo", "echo", "ready", "cpu", "0 B", "0"],
        ["kept", "echo", "ready, pinned", "cpu", "0 B", "0"],
    ]
    inspected = json.loads(models(server, "inspect", "echo").stdout)
    shown = server.get("/crane/models/echo")[1]
    for model in (inspected, *inspected["copies"], shown, *shown["copies"]):
        del model["idle_s"]
    assert inspected == shown
    assert models(server, "unload", "echo").stderr == "echo is unloaded.\n"
    assert server.get("/crane/models/echo")[1]["state"] == "unloaded"


def test_a_wrong_model_and_a_service_that_does_not_run_are_told_in_a_line(models, gunicorn):
    server = gunicorn()
    for order in ("load", "unload", "inspect"):
        done = models(server, order, "ecko")
        assert done.returncode == 1
        assert re.fullmatch(
            r"Error: There is no model 'ecko'.*did you mean 'echo'.*\n", done.stderr
        )
    server.stop()
    done = models(server, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: no service runs on {server.data_dir}\n"
