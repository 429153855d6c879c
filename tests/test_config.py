"""The settings: each is checked at start, all faults are told at once, and each is documented."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml

from backend.config import Config, duration, size
from backend.engine.supervisor import END_TIMEOUT_S
from backend.quota.tiers import Limit, Tier

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = {field.metadata["name"]: field for field in fields(Config)}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MODELS", "/etc/crane/models.yaml", Path("/etc/crane/models.yaml")),
        ("MODELS", "~/models.yaml", Path.home() / "models.yaml"),
        ("BIND", "0.0.0.0:80", "0.0.0.0:80"),
        ("BIND", "localhost:0", "localhost:0"),
        ("BIND", "[::1]:65535", "[::1]:65535"),
        ("WORKERS", "3", 3),
        ("WORKERS", " 128 ", 128),
        ("THREADS", "1024", 1024),
        ("ENGINE", "inline", "inline"),
        ("ENGINE_SOCKET", "/run/engine.sock", Path("/run/engine.sock")),
        ("DEVICES", "auto", ("auto",)),
        ("DEVICES", "cuda", ("cuda:0",)),
        ("DEVICES", "cuda:1", ("cuda:1",)),
        ("DEVICES", "mps", ("mps",)),
        ("DEVICES", "cuda:0+cuda:1", ("cuda:0+cuda:1",)),
        ("DTYPE", "bfloat16", "bfloat16"),
        ("REQUEST_TIMEOUT", "90", 90),
        ("REQUEST_TIMEOUT", "500ms", 0.5),
        ("REQUEST_TIMEOUT", "1.5m", 90),
        ("REQUEST_TIMEOUT", "24h", 86400),
        ("LOAD_WAIT", "10 s", 10),
        ("LOAD_TIMEOUT", "20m", 1200),
        ("HANG_TIMEOUT", "90s", 90),
        ("IDLE_TIMEOUT", "20m", 1200),
        ("IDLE_TIMEOUT", "never", math.inf),
        ("MEMORY_BUDGET", "450MB", 450_000_000),
        ("QUEUE_SIZE", "100000", 100_000),
        ("MAX_BODY", "1024", 1024),
        ("MAX_BODY", "32MiB", 32 * 2**20),
        ("MAX_BODY", "1.5 kb", 1500),
        ("HEAD_TIMEOUT", "5s", 5),
        ("CLIENT_TIMEOUT", "1m", 60),
        ("MIN_RATE", "8KiB", 8192),
        ("MAX_CONNECTIONS", "1000", 1000),
        ("MAX_UNSENT", "1GiB", 2**30),
        ("MAX_BODIES", "1GiB", 2**30),
        ("MAX_OUTPUT", "64MiB", 2**26),
        ("MAX_BATCH", "1", 1),
        ("MAX_TEXT", "5000", 5000),
        ("MAX_PIXELS", "1000000", 1_000_000),
        ("MAX_AUDIO", "10m", 600.0),
        (
            "MEDIA_HOSTS",
            "Img.example.com, *.example.org:8443",
            ("img.example.com", "*.example.org:8443"),
        ),
        ("DATA_DIR", "/var/lib/crane", Path("/var/lib/crane")),
        *(
            ("DATABASE_URL", url, url)
            for url in (
                "postgresql://crane:s3cr3t%40@db.example.com:5432/crane?sslmode=require",
                "postgres://db/crane",
                "postgresql+psycopg://u:@a,b:5433/crane",
                "postgresql://postgres@/crane?host=/run/postgresql",
                "postgresql://[::1]:5432/crane",
            )
        ),
        ("KEY_PEPPER", "sixteen letters!", "sixteen letters!"),
        ("AUTH", "required", "required"),
        ("QUOTA", "off", "off"),
        ("TIERS", "free 1/hour", {"free": Tier("free", (Limit("rate", 1, 3600),), 100)}),
        (
            "TIERS",
            "free: 60/minute concurrency=5; top-1 = budget=9/day 2/second,",
            {
                "free": Tier("free", (Limit("rate", 60, 60),), 5),
                "top-1": Tier("top-1", (Limit("rate", 2, 1), Limit("budget", 9, 86_400)), 100),
            },
        ),
        ("QUOTA_ON_OUTAGE", "deny", "deny"),
        *(
            ("REDIS_URL", url, url)
            for url in ("redis://:s3cr3t@db:6379/0", "rediss://db", "unix:///run/redis.sock?db=1")
        ),
        ("TRUSTED_PROXIES", "2", 2),
        ("ALLOWED_ORIGINS", "", ()),
        ("ALLOWED_ORIGINS", "*", ("*",)),
        ("ALLOWED_ORIGINS", "https://a.com, http://b:80", ("https://a.com", "http://b:80")),
        ("ALLOWED_HOSTS", "", ()),
        ("ALLOWED_HOSTS", "*", ("*",)),
        ("ALLOWED_HOSTS", "crane, crane.a.com,::1", ("crane", "crane.a.com", "::1")),
        ("LOG_LEVEL", "DEBUG", "DEBUG"),
        ("LOG_FORMAT", "console", "console"),
    ],
)
def test_a_good_value_is_taken(name, text, value):
    name = f"CRANE_{name}"
    config = Config.from_env({name: text})
    assert getattr(config, SETTINGS[name].name) == value


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("MODELS", "", "must be a path, not empty"),
        ("MODELS", "~nobody-here/models.yaml", "must be a path; there is no such home folder"),
        ("BIND", "127.0.0.1", "must be host:port, such as 127.0.0.1:8000"),
        ("BIND", ":8000", "must be host:port"),
        ("BIND", "localhost:65536", "must be host:port"),
        ("BIND", "localhost:80/path", "must be host:port"),
        ("BIND", "localhost:80?a=b", "must be host:port"),
        ("BIND", "a b:80", "must be host:port"),
        ("BIND", "::1:80", "must be host:port"),
        ("BIND", "unix:/run/crane.sock", "must be host:port"),
        ("WORKERS", "0", "must be a whole number from 1 to 128"),
        ("WORKERS", "129", "must be a whole number from 1 to 128"),
        ("WORKERS", "2.0", "must be a whole number"),
        ("WORKERS", "", "must be a whole number"),
        ("WORKERS", "two", "must be a whole number"),
        ("WORKERS", "٢", "must be a whole number"),
        ("THREADS", "-1", "must be a whole number from 1 to 1024"),
        ("ENGINE", "ray", "must be one of process, inline"),
        ("ENGINE_SOCKET", "", "must be a path, not empty"),
        ("DEVICES", "gpu", "must be auto, or a device for each engine, such as cpu, mps, cuda:0,"),
        ("DEVICES", "CPU", "must be auto, or a device for each engine"),
        ("DEVICES", "cuda:0,", "must be auto, or a device for each engine"),
        ("DEVICES", "cpu+cuda:0", "must be auto, or a device for each engine"),
        ("DEVICES", "cuda:0+cuda", "names a GPU twice for one engine, cuda:0+cuda:0"),
        ("DEVICES", "auto,cpu", "must be auto alone, or a device for each engine"),
        ("DEVICES", ",".join(["cpu"] * 65), "must name at most 64 engines"),
        ("DTYPE", "fp16", "must be one of auto, float32, float16, bfloat16"),
        ("REQUEST_TIMEOUT", "0", "must be a duration above 0 and up to 24h"),
        ("REQUEST_TIMEOUT", "-5", "must be a duration"),
        ("REQUEST_TIMEOUT", "5 days", "must be a duration"),
        ("REQUEST_TIMEOUT", "25h", "must be a duration"),
        ("REQUEST_TIMEOUT", "9" * 400, "must be a duration"),
        ("REQUEST_TIMEOUT", "inf", "must be a duration"),
        ("LOAD_WAIT", "", "must be a duration"),
        ("LOAD_TIMEOUT", "0", "must be a duration"),
        ("HANG_TIMEOUT", "never", "must be a duration"),
        ("IDLE_TIMEOUT", "0", "must be a duration"),
        ("IDLE_TIMEOUT", "ever", "must be a duration"),
        ("MEMORY_BUDGET", "half", "must be a size"),
        ("QUEUE_SIZE", "100001", "must be a whole number from 1 to 100000"),
        ("MAX_BODY", "0", "must be a size of a byte or more, such as 33554432 or 32MiB"),
        ("MAX_BODY", "0.5", "must be a size"),
        ("MAX_BODY", "5 apples", "must be a size"),
        ("MAX_BODY", "9" * 400, "must be a size"),
        ("MAX_BODY", "1e9", "must be a size"),
        ("HEAD_TIMEOUT", "0", "must be a duration"),
        ("CLIENT_TIMEOUT", "never", "must be a duration"),
        ("MIN_RATE", "0", "must be a size"),
        ("MAX_CONNECTIONS", "0", "must be a whole number from 1 to 100000"),
        ("MAX_UNSENT", "none", "must be a size"),
        ("MAX_BODIES", "none", "must be a size"),
        ("MAX_OUTPUT", "all", "must be a size"),
        ("MAX_BATCH", "0", "must be a whole number from 1 to 100000"),
        ("MAX_TEXT", "1000000000", "must be a whole number from 1 to 100000000"),
        ("MAX_PIXELS", "10MP", "must be a whole number from 1 to 500000000"),
        ("MAX_AUDIO", "2d", "must be a duration above 0 and up to 24h"),
        ("MEDIA_HOSTS", "https://a.com", "is not a host such as images.example.com"),
        ("DATA_DIR", " ", "must be a path, not empty"),
        ("DATABASE_URL", "sqlite:///hunter2.db", "must be postgresql://user:password@host"),
        ("DATABASE_URL", "postgresql://u:hunter2@x@db/crane", "marks in a name or password are"),
        ("DATABASE_URL", "postgresql://u:hunter2/3@db/crane", "must be postgresql://"),
        ("DATABASE_URL", "postgresql://u:hunter2#@db/crane", "must be postgresql://"),
        ("KEY_PEPPER", "hunter2hunter2!", "must have at least 16 characters"),
        ("AUTH", "on", "must be one of auto, required, off"),
        ("QUOTA", "yes", "must be one of on, off"),
        ("TIERS", "", "must have a tier 'free'"),
        ("TIERS", "pro 60/minute", "must have a tier 'free'"),
        ("TIERS", "free", "must be tiers such as 'free 60/minute, pro 600/minute', not 'free'"),
        ("TIERS", "free 60/minute, free 6/day", "has the tier 'free' twice"),
        ("TIERS", "free 60", "has '60' for 'free'; a tier has a rate (60/minute,"),
        ("TIERS", "free 60/fortnight", "has '60/fortnight' for 'free'; a tier has a rate"),
        ("TIERS", "free concurrency=5", "has no rate for 'free', such as 60/minute"),
        ("TIERS", "free 60/minute budget=5", "has 'budget=5' for 'free'; a tier has a rate"),
        ("TIERS", "free 6/hour budget=5/hour", "has 'budget=5/hour' for 'free'; a tier has"),
        ("TIERS", "free 6/hour concurrency=5/day", "has 'concurrency=5/day' for 'free'; a tier"),
        ("TIERS", "free 60/minute 6/hour", "has two terms for the rate of 'free'"),
        ("TIERS", "free 0/minute", "has '0/minute' for 'free', which must be from 1 to"),
        ("TIERS", "free -1/minute", "has '-1/minute' for 'free'; a tier has a rate"),
        ("QUOTA_ON_OUTAGE", "ignore", "must be one of local, allow, deny"),
        ("REDIS_URL", "http://hunter2", "must be redis://:password@host:6379/0, rediss://… or"),
        ("REDIS_URL", "redis://u:hunter2@db:port", "must be redis://"),
        ("REDIS_URL", "redis://hunter2/@db", "must be redis://"),
        ("REDIS_URL", "unix://hunter2", "must be redis://"),
        ("TRUSTED_PROXIES", "all", "must be a whole number from 0 to 10"),
        ("ALLOWED_ORIGINS", "a.com", "'a.com' is not an origin such as https://app.example.com"),
        ("ALLOWED_ORIGINS", "https://a.com/", "is not an origin"),
        ("ALLOWED_ORIGINS", "https://*.a.com", "is not an origin"),
        ("ALLOWED_ORIGINS", "*,https://a.com", "must be '*' alone or a list of origins"),
        ("ALLOWED_HOSTS", "a.com:80", "'a.com:80' is not a name such as crane.example.com"),
        ("ALLOWED_HOSTS", "http://a.com", "is not a name such as crane.example.com"),
        ("ALLOWED_HOSTS", "*,a.com", "must be '*' alone or a list of names"),
        ("LOG_LEVEL", "info", "must be one of DEBUG, INFO, WARNING, ERROR"),
        ("LOG_FORMAT", "xml", "must be one of auto, json, console"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_expected(name, text, fault):
    with pytest.raises(ValueError, match="Crane's settings are wrong") as caught:
        Config.from_env({f"CRANE_{name}": text})
    [_, line] = str(caught.value).splitlines()
    if SETTINGS[f"CRANE_{name}"].metadata["secret"]:
        assert line.startswith(f"  CRANE_{name} ")
        assert "hunter2" not in line
    else:
        assert line.startswith(f"  CRANE_{name}={text!r} ")
    assert fault in line


def test_every_setting_has_a_good_and_a_bad_value_in_these_tests():
    tried = [
        {f"CRANE_{name}" for name, *_ in test.pytestmark[0].args[1]}
        for test in (
            test_a_good_value_is_taken,
            test_a_bad_value_is_refused_with_what_is_expected,
        )
    ]
    assert tried == [set(SETTINGS), set(SETTINGS)]


def test_every_fault_is_told_at_once():
    with pytest.raises(ValueError, match="Crane's settings are wrong") as caught:
        Config.from_env(
            {
                "CRANE_WORKERS": "none",
                "CRANE_BIND": "here",
                "CRANE_REQUEST_TIMEOT": "5",
                "CRANE_LOG_LEVEL": "loud",
                "HOME": "/root",
            }
        )
    names = [line.split("=")[0].split()[0] for line in str(caught.value).splitlines()[1:]]
    assert names == ["CRANE_BIND", "CRANE_LOG_LEVEL", "CRANE_REQUEST_TIMEOT", "CRANE_WORKERS"]


def test_settings_that_disagree_are_told_at_once():
    with pytest.raises(ValueError, match="Crane's settings are wrong") as caught:
        Config.from_env(
            {"CRANE_ENGINE": "process", "CRANE_MAX_BATCH": "5", "CRANE_QUEUE_SIZE": "4"}
        )
    assert "CRANE_ENGINE=process needs CRANE_ENGINE_SOCKET" in str(caught.value)
    assert "CRANE_MAX_BATCH (5) must not be above CRANE_QUEUE_SIZE (4)" in str(caught.value)
    with pytest.raises(ValueError, match="must not be above"):
        Config(max_batch=5, queue_size=4)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CRANE_REQUEST_TIMEOT", "did you mean 'CRANE_REQUEST_TIMEOUT'?"),
        ("CRANE_MODEL", "did you mean 'CRANE_MODELS'?"),
        ("CRANE_request_timeout", "CRANE_request_timeout is not a Crane setting"),
        ("CRANE_" + "Z" * 40, "it is one of: CRANE_ALLOWED_HOSTS, CRANE_ALLOWED_ORIGINS, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match="is not a Crane setting") as caught:
        Config.from_env({name: "5"})
    assert hint in str(caught.value)


SECRETS = [name for name, setting in SETTINGS.items() if setting.metadata["secret"]]


def test_a_secret_is_read_from_a_file_too(tmp_path):
    path = tmp_path / "pepper"
    path.write_text("  hunter2 hunter2 hunter2\n\n")
    config = Config.from_env({"CRANE_KEY_PEPPER_FILE": f" {path} "})
    assert config.key_pepper == "hunter2 hunter2 hunter2"


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"CRANE_KEY_PEPPER_FILE": "{}/none"}, "{}/none' cannot be read: No such file"),
        ({"CRANE_KEY_PEPPER_FILE": "{}"}, "{}' cannot be read: Is a directory"),
        ({"CRANE_KEY_PEPPER_FILE": "{}/binary"}, "{}/binary' is not a file with text in it"),
        ({"CRANE_KEY_PEPPER_FILE": "{}/short"}, "{}/short' must have at least 16 characters"),
        ({"CRANE_DATABASE_URL_FILE": "{}/short"}, "{}/short' must be postgresql://"),
        (
            {"CRANE_KEY_PEPPER_FILE": "{}/short", "CRANE_KEY_PEPPER": "hunter2" * 3},
            "CRANE_KEY_PEPPER_FILE and CRANE_KEY_PEPPER are both set; one must go",
        ),
        ({"CRANE_MODELS_FILE": "{}/short"}, "CRANE_MODELS_FILE is not a Crane setting"),
        ({"CRANE_KEY_PEPER_FILE": "hunter2"}, "did you mean 'CRANE_KEY_PEPPER_FILE'?"),
    ],
)
def test_a_fault_with_a_secrets_file_names_the_file_and_not_what_is_in_it(tmp_path, environ, says):
    (tmp_path / "short").write_text("hunter2")
    (tmp_path / "binary").write_bytes(b"hunter2\xff" * 5)
    environ = {name: text.format(tmp_path) for name, text in environ.items()}
    with pytest.raises(ValueError, match="Crane's settings are wrong") as caught:
        Config.from_env(environ)
    assert says.format(tmp_path) in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None  # which a traceback would show


def test_a_secret_is_in_no_repr():
    secrets = {"database_url": "postgresql://u:hunter2@db/c", "key_pepper": "hunter2" * 3}
    secrets["redis_url"] = "redis://u:hunter2@db"
    assert {SETTINGS[name].name for name in SECRETS} == set(secrets)
    assert "hunter2" not in repr(Config(**secrets))


def test_names_of_other_programs_are_left_alone():
    assert Config.from_env({"HF_TOKEN": "x", "CRANES": "5", "WORKERS": "many"}) == Config()


def test_settings_cannot_be_changed_later():
    with pytest.raises(FrozenInstanceError):
        Config().workers = 5


def test_a_size_is_never_rounded_to_nothing():
    assert size("1.9") == 1
    with pytest.raises(ValueError, match="must be a size"):
        size("0.0001KB")


def test_a_duration_can_be_less_than_a_second():
    assert duration("250ms") == 0.25
    assert duration("0.1") == 0.1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux has core affinity")
def test_only_cores_that_the_process_may_use_are_counted():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from backend.config import Config; print(Config().engine_threads)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == b"(1, 1)\n"


@pytest.mark.parametrize(
    ("settings", "models", "says"),
    [
        ({"CRANE_WORKERS": "many", "CRANE_MODEL": "a"}, "models: []", ["CRANE_MODEL ", "='many'"]),
        ({}, "models:\n- {id: a, type: ecko}\n", ["line 2", "did you mean 'echo'?"]),
    ],
)
def test_the_service_does_not_start_and_says_why(tmp_path, settings, models, says):
    path = tmp_path / "models.yaml"
    path.write_text(models)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
    env |= {"CRANE_MODELS": str(path), "CRANE_BIND": "127.0.0.1:0"} | settings
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "wsgi:app"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert all(part in done.stderr for part in says), done.stderr
    assert "Traceback" not in done.stderr


# What is written about the settings.


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_documented(name):
    assert re.search(rf"^\| `{name}` \|", README, re.MULTILINE)


def test_no_setting_is_documented_that_is_none():
    assert set(re.findall(r"CRANE_[A-Z_]+", README)) <= set(SETTINGS)


def test_each_default_is_documented_as_it_is():
    for name, text in re.findall(r"^\| `(CRANE_\w+)` \| `([^`]+)` \|", README, re.MULTILINE):
        default = getattr(Config(), SETTINGS[name].name)
        if name == "CRANE_ENGINE":  # gunicorn.conf.py's
            assert text == "process"
        else:
            assert SETTINGS[name].metadata["parse"](text) == default, name


# The image and the composition: no Docker runs here, so what they name is checked to be there.

DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(
        r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M)
    ).splitlines()
    if line.strip()
]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def image_env():
    pairs = " ".join(rest for name, rest in INSTRUCTIONS if name == "ENV")
    return dict(pair.split("=", 1) for pair in pairs.split())


def test_the_image_copies_files_that_exist_and_are_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"  # nothing goes into the image unless it is named
    let_in = {line[1:].rstrip("/") for line in ignored if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for name, rest in INSTRUCTIONS
        if name == "COPY"
        for source in rest.split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)
    assert {"backend", "wsgi.py", "gunicorn.conf.py", "models.yaml"} <= copied
    assert "requirements-sample.txt" not in copied


def test_the_image_sets_known_settings_to_good_values():
    env = {name: value for name, value in image_env().items() if name.startswith("CRANE_")}
    assert Config.from_env(env).bind == "0.0.0.0:8000"


def test_the_image_keeps_weights_and_data_on_volumes():
    volumes = json.loads(dict(INSTRUCTIONS)["VOLUME"])
    assert volumes == [image_env()["HF_HOME"], image_env()["CRANE_DATA_DIR"]]


def test_the_image_runs_gunicorn_itself_and_not_as_root():
    names = [name for name, _ in INSTRUCTIONS]
    assert names.index("USER") < names.index("CMD")
    assert dict(INSTRUCTIONS)["USER"] not in ("root", "0")
    # The exec form: no shell between the signal and gunicorn.
    assert json.loads(dict(INSTRUCTIONS)["CMD"]) == ["gunicorn", "wsgi:app"]
    assert dict(INSTRUCTIONS)["STOPSIGNAL"] == "SIGTERM"


def healthcheck():
    options, _, command = dict(INSTRUCTIONS)["HEALTHCHECK"].partition(" CMD ")
    assert "--interval=" in options
    program, *arguments = json.loads(command)
    assert program == "python"
    return [sys.executable, *arguments]


def test_the_images_health_check_tells_a_service_that_is_up(gunicorn):
    server = gunicorn()
    env = os.environ | {"CRANE_BIND": f"0.0.0.0:{server.port}"}
    assert subprocess.run(healthcheck(), env=env, timeout=30).returncode == 0
    server.stop()
    down = subprocess.run(healthcheck(), env=env, timeout=30, stderr=subprocess.DEVNULL)
    assert down.returncode == 1


def test_the_composition_sets_known_settings_and_mounts_the_images_volumes():
    crane = COMPOSE["services"]["crane"]
    environment = crane["environment"]
    Config.from_env({k: str(v) for k, v in environment.items() if k.startswith("CRANE_")})
    places = {volume.split(":")[1] for volume in crane["volumes"]}
    assert {image_env()["HF_HOME"], image_env()["CRANE_DATA_DIR"]} <= places
    for volume in (v for service in COMPOSE["services"].values() for v in service["volumes"]):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (ROOT / source).exists()
    port = image_env()["CRANE_BIND"].rpartition(":")[2]
    assert crane["ports"] == [f"127.0.0.1:8000:{port}"]


def test_the_composition_gives_calls_the_time_to_end():
    grace_s = duration(COMPOSE["services"]["crane"]["stop_grace_period"])
    # gunicorn.conf.py gives calls their deadline and 5 s, and then the engine ends.
    assert grace_s > Config().request_timeout_s + 5 + END_TIMEOUT_S


def test_the_gpu_block_of_the_composition_is_valid_once_it_is_uncommented():
    text = (ROOT / "compose.yaml").read_text()
    with_gpu = yaml.safe_load(re.sub(r"^(\s*)# ?(?=deploy:|  )", r"\1", text, flags=re.M))
    [device] = with_gpu["services"]["crane"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in COMPOSE["services"]["crane"]
