"""README.md is true: its commands are run, its answers compared, its examples used."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

import backend.adapters
from backend import tasks
from backend.config import Config
from backend.errors import ERRORS
from backend.inputs import load_inputs
from backend.media.reader import MediaReader
from backend.openai import ROUTES
from backend.quota.costs import Cost
from backend.registry import Registry
from backend.schemas import RunRequest
from backend.schemas import load as load_schema
from backend.tasks import TASKS
from tests.diffusers_checkpoints import stable_diffusion
from tests.pictures import picture
from tests.serving import Gunicorn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
REGISTRY = Registry.load(ROOT / "models.yaml")
PICTURES = "hf_model: stable-diffusion-v1-5/stable-diffusion-v1-5"


def commands():
    """Every command of the README, each with the block that is shown as its answer."""
    for place, (kind, text) in enumerate(BLOCKS):
        if kind == "sh":
            after = BLOCKS[place + 1] if place + 1 < len(BLOCKS) else ("", "")
            for command in text.replace("\\\n", "").splitlines():
                yield command, after[1] if after[0] in ("json", "text") else None


CURLS = [(command, shown) for command, shown in commands() if command.startswith("curl ")]
MODEL_COMMANDS = [command for command, _ in commands() if " crane models " in command]
KEY_COMMANDS = [command for command, _ in commands() if " crane keys " in command]
OTHERS = [command for command, _ in commands() if not command.startswith("curl ")]

# Differ from call to call, or from machine to machine; their kind is compared.
VARYING = {
    "timings_ms",
    "device",
    "dtype",
    "budget_bytes",
    "held_bytes",
    "pid",
    "threads",
    "uptime_s",
    "request_id",
    "batch_size",
    "left",
    "reset_s",
}


def parse(shown):
    """The JSON of a shown answer; ``…`` stands for what was left out."""
    text = re.sub(r",\s*…\s*\]", ', "…"]', shown)
    return json.loads(re.sub(r",\s*…\s*\}", ', "…": null}', text))


def parse_events(shown):
    """The names and the JSON of a stream's events."""
    blocks = [block.split("\n") for block in shown.strip().split("\n\n")]
    return [[name.removeprefix("event: "), parse(data[6:])] for name, data in blocks]


def differences(shown, real, at="answer"):
    """Where a real answer is not as it is shown."""
    if isinstance(shown, dict) and isinstance(real, dict):
        keys = set(shown) - {"…"}
        if missing := keys - set(real) or ("…" not in shown and set(real) - keys):
            return [f"{at}: {sorted(missing)}"]
        return [d for key in keys for d in differences_at(key, shown[key], real[key], at)]
    if isinstance(shown, list) and isinstance(real, list):
        if shown[-1:] == ["…"]:
            shown, real = shown[:-1], real[: len(shown) - 1]
        if len(shown) != len(real):
            return [f"{at}: {len(shown)} items, not {len(real)}"]
        pairs = enumerate(zip(shown, real, strict=True))
        return [d for i, (one, other) in pairs for d in differences(one, other, f"{at}[{i}]")]
    if isinstance(shown, str) and isinstance(real, str) and shown.endswith("…"):
        return [] if real.startswith(shown[:-1]) else [f"{at}: {shown}, not {real[:80]}"]
    if isinstance(shown, float) and isinstance(real, float):
        # bfloat16 and float32 differ by this much.
        return [] if abs(shown - real) <= 5e-3 else [f"{at}: {shown}, not {real}"]
    return [] if shown == real else [f"{at}: {shown!r}, not {real!r}"]


def differences_at(key, shown, real, at):
    at = f"{at}.{key}"
    if key not in VARYING:
        return differences(shown, real, at)
    if isinstance(shown, dict):
        return [] if set(shown) == set(real) else [f"{at}: {sorted(shown)}, not {sorted(real)}"]
    same_kind = isinstance(real, int | float) == isinstance(shown, int | float)
    return [] if same_kind and type(shown) in (str, type(real)) else [f"{at}: {real!r}"]


class MakeRun(Gunicorn):
    """``make run`` in a copy of the tree, with every setting but the port as it is by default."""

    def __init__(self, folder: Path, pictures: str) -> None:
        self.folder = folder / "crane"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "backend", self.folder / "backend", ignore=ignored)
        for pattern in ("*.py", "*.txt", "models.*", "Makefile"):
            for file in ROOT.glob(pattern):
                shutil.copy2(file, self.folder)
        # The weights of pictures are on the Hub: tiny ones stand in for them.
        models = self.folder / "models.yaml"
        assert models.read_text().count(PICTURES) == 3
        models.write_text(models.read_text().replace(PICTURES, f"hf_model: {pictures}"))
        # The environment is the one that runs this test, so nothing has to be installed.
        (self.folder / ".venv").mkdir()
        (self.folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
        (self.folder / ".venv" / "run.done").touch()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CRANE_", "MAKE"))}
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["make", "run"],
                cwd=self.folder,
                env={**env, "CRANE_BIND": "127.0.0.1:0", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.port = 0
        self._seen: dict[int, psutil.Process] = {}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The service as it ships, started as the README says."""
    pictures = tmp_path_factory.mktemp("pictures") / "stable-diffusion"
    stable_diffusion(pictures, sample_size=64)  # 512 x 512 pixels
    server = MakeRun(tmp_path_factory.mktemp("shipped"), str(pictures))
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def bash(command, **kwargs):
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=90, check=True, **kwargs
    )
    return done.stdout


def test_every_curl_is_answered_as_shown(shipped, tmp_path):
    assert len(CURLS) >= 8
    picture(128, 96).save(tmp_path / "boat.jpg")
    wrong = {}
    # In the README's order: the state of a model is told before anything has asked for it.
    for command, shown in CURLS:
        address = f"127.0.0.1:{shipped.port}"
        answer = bash(command.replace("127.0.0.1:8000", address), cwd=tmp_path)
        if file := re.search(r" -o (\S+)$", command):
            with Image.open(tmp_path / file[1]) as drawn:
                assert drawn.size == (128, 96)
            continue
        assert shown, f"no answer is shown for {command}"
        read = parse_events if shown.startswith("event: ") else parse
        if found := differences(read(shown), read(answer)):
            wrong[command] = found
    assert wrong == {}


def test_the_readmes_calls_leave_no_warning_in_the_log(shipped):
    assert shipped.run("text-embedder-v1", "Cranes dance.")[0] == 200
    assert shipped.log_lines(level="WARNING") + shipped.log_lines(level="ERROR") == []


def test_a_shown_answer_that_is_not_so_is_noticed():
    shown = parse('{"output": [1.0, 2.0, …], "metadata": {"a": 1, "device": "cpu", …}}')
    real = {"output": [1.001, 2.0, 3.0], "metadata": {"a": 1, "device": "cuda:0", "b": 2}}
    assert differences(shown, real) == []
    assert differences(shown, {**real, "output": [1.1, 2.0]})
    assert differences(shown, {**real, "output": [1.0]})
    assert differences(shown, {**real, "metadata": {"a": 2, "device": "cpu"}})
    assert differences(shown, {**real, "metadata": {"a": 1}})
    assert differences(shown, {**real, "more": 1})
    assert differences({"device": "cpu"}, {"device": 5})
    assert differences({"timings_ms": {"a": 1.0}}, {"timings_ms": {"b": 1.0}})
    assert differences({"revision": None}, {"revision": "main"})
    assert differences("ab…", "abc") == []
    assert differences("ab…", "bc")


def test_openais_client_is_answered_as_shown(shipped, capsys):
    [text] = [text for kind, text in BLOCKS if kind == "python" and "openai" in text]
    here, names = text.replace("127.0.0.1:8000", f"127.0.0.1:{shipped.port}"), {}
    exec(compile(here, "README.md", "exec"), names)
    names["client"].close()
    assert capsys.readouterr().out.strip() == re.search(r"# (.*)$", text, re.MULTILINE)[1]


@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_is_one_that_works(command):
    program, *arguments = command.split()
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", MAKEFILE, re.MULTILINE)
    elif program == "docker":
        assert (ROOT / "Dockerfile").exists()
        assert (ROOT / "compose.yaml").exists()
        for option, value in itertools.pairwise(arguments):
            if option == "-v":
                assert f'VOLUME ["{value.split(":")[1]}"' in (ROOT / "Dockerfile").read_text()
            if option == "--stop-timeout":
                assert int(value) > Config().request_timeout_s
    else:
        known = command in ("git clone REPOSITORY crane", "cd crane")
        assert known or command in KEY_COMMANDS + MODEL_COMMANDS  # which are run below


def test_the_commands_for_keys_work_beside_the_service(shipped):
    made, admins, listed = (bash(command, cwd=shipped.folder) for command in KEY_COMMANDS)
    assert all(re.fullmatch(r"crane_\w+_\w+\n", key) for key in (made, admins))
    assert "billing" in listed
    assert "operations" in listed
    assert made.strip() not in listed
    status, quota = shipped.get("/crane/quota", Authorization=f"Bearer {made.strip()}")
    assert (status, quota["tier"]) == (200, "pro")
    assert quota["models"] == ["echo", "text-embedder-v1"]


def test_the_commands_for_models_work_beside_the_service(shipped):
    _, listed, _ = (bash(command, cwd=shipped.folder) for command in MODEL_COMMANDS)
    assert re.search(r"^text-embedder-v1 +embeddings +ready +cpu +45.4 MB", listed, re.MULTILINE)
    assert shipped.get("/crane/models/text-embedder-v1")[1]["state"] == "unloaded"


def test_the_headers_of_a_quota_are_those_that_are_shown(shipped):
    [block] = [text for kind, text in BLOCKS if kind == "" and "RateLimit-Policy" in text]
    _, headers, _ = shipped.request(
        "POST",
        "/crane/run",
        b'{"model_id": "echo", "input": 1}',
        {"Content-Type": "application/json"},
    )
    for line in block.splitlines():
        name, _, shown = line.partition(": ")
        kind = re.sub("[0-9]+", "N", shown.replace("pro", "free"))
        assert re.sub("[0-9]+", "N", headers[name]) == kind


def test_every_make_target_that_is_named_exists():
    for target in re.findall(r"`make ([\w-]+)`", README):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_make_run_prints_the_call_that_the_readme_shows_and_it_works(shipped):
    printed = re.search(r"^curl .*\\\n.*$", shipped.log(), re.MULTILINE)[0]
    command, shown = CURLS[0]
    address = f"127.0.0.1:{shipped.port}"
    assert printed.replace("\\\n", "") == command.replace("127.0.0.1:8000", address)
    assert differences(parse(shown), json.loads(bash(printed))) == []


# Examples whose weights are on the Hub: what the service checks before it loads them is checked.

REQUESTS = [
    json.loads(line) for kind, text in BLOCKS if kind == "jsonl" for line in text.splitlines()
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["model_id"])
def test_every_example_request_is_one_that_its_model_takes(request_):
    body = load_schema(RunRequest(), request_)
    spec = REGISTRY.get(body["model_id"])
    config = Config()
    with MediaReader(config).reading() as reading:
        options = load_schema(spec.options_schema, body["options"], "options")
        assert load_inputs(config, TASKS[spec.type], body["input"], options, reading)


def test_there_is_an_example_for_every_task():
    assert [REGISTRY.get(request["model_id"]).type for request in REQUESTS] == list(TASKS)


@pytest.mark.parametrize("request_", REQUESTS[:1] + [r for r in REQUESTS if "embed" in str(r)])
def test_the_examples_whose_weights_are_here_are_answered(shipped, request_):
    status, answer = shipped.post(request_)
    assert status == 200
    applied = answer["metadata"]["options"]
    assert {name: applied[name] for name in request_["options"]} == request_["options"]


# The tables.


def rows(*head):
    """The rows of the table that begins with ``head``, as lists of cells."""
    table = re.search(
        rf"^\| {re.escape(' | '.join(head))} .*\n\|[-| ]+\n((?:\|.*\n)+)", README, re.M
    )
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()
    ]


def test_the_table_of_tasks_says_what_the_tasks_say():
    options = {}
    for type_, model, _, output, listed in rows("`type`", "shipped model"):
        task = TASKS[type_.strip("`")]
        assert REGISTRY.get(model.strip("`")).type == task.name
        assert output == task.output
        names = re.findall(r"`([\w-]+)`", listed)
        if listed.startswith("as "):
            names = options[names[0]] + names[1:]
        options[task.name] = names
        # The table has no row full of what they all have.
        assert sorted([*names, "keep_alive"]) == sorted(task.options().fields)
    assert list(options) == list(TASKS)


def test_the_table_of_openais_routes_has_each_with_its_types():
    told = {
        route.strip("`"): tuple(re.findall(r"`([\w-]+)`", types))
        for route, types, *_ in rows("route", "for models of type")
    }
    assert told == {f"POST {route.path}": route.types for route in ROUTES.values()}


def test_the_table_of_openais_routes_knows_what_they_take():
    for route, _, takes, *_ in rows("route", "for models of type"):
        known = ROUTES[route.strip("`").removeprefix("POST ")].body().fields
        shown = re.findall(r"`(\w+)(?:\[\])?`", takes)
        values = {
            "image_url",
            "enable_thinking",
            "float",
            "base64",
            "png",
            "jpeg",
            "webp",
            "inpainting",
            "flagged",
        }
        values |= {"mp3", "opus", "flac", "wav", "json", "text", "verbose_json", "srt", "vtt"}
        assert set(shown) - values <= set(known), route


def test_the_table_of_errors_has_every_error_with_its_status():
    told = [(int(status), code.strip("`")) for status, code, _ in rows("status", "code")]
    assert sorted(told) == sorted((int(error.status), code) for code, error in ERRORS.items())


def test_the_table_of_the_receipt_has_every_key_that_is_answered(shipped):
    told = {name for keys, _ in rows("key", "is") for name in re.findall(r"`(\w+)`", keys)}
    answered = shipped.run()[1]["metadata"]
    assert set(answered) <= told
    assert told - set(answered) == {
        "seed",
        "finish_reason",
        "logprobs",
        "reasoning_content",
        "tool_calls",
        "language",
        "min_depth",
        "max_depth",
        "truncated",
        "flagged",
    }


def test_the_way_of_a_call_is_through_functions_that_are_there():
    way = rows("in", "by")
    assert len(way) > 5
    for file, functions, *_ in way:
        text = (ROOT / file.strip("`")).read_text()
        for name in re.findall(r"`(\w+)`", functions):
            assert f"def {name}(" in text, file


def test_a_request_is_logged_as_shown(shipped):
    [shown] = [json.loads(text) for kind, text in BLOCKS if kind == "json" and '"logger"' in text]
    shipped.run("text-embedder-v1", "Cranes dance.")
    [real, *_] = shipped.log_lines(message="request", route="/crane/run", status=200)
    assert list(real) == list(shown)


# The code.


def test_the_examples_of_models_are_entries_that_load(tmp_path):
    specs = {}
    for text in [text for kind, text in BLOCKS if kind == "yaml"]:
        (tmp_path / "models.yaml").write_text(text)
        specs |= {spec.id: spec for spec in Registry.load(tmp_path / "models.yaml")}
    assert specs["text-summarizer-v2"].options_schema.load({})["num_beams"] == 8
    memory = {"quantize": "int8", "offload": "model", "vae_tiling": True}
    assert specs["large-image-generator-v1"].memory == memory
    assert specs["studio-v1"].cost == Cost(per_request=1, per_image=4)
    assert not set(specs) & {shipped.id for shipped in REGISTRY}


def test_the_example_of_a_task_is_all_that_a_task_needs(make_app, monkeypatch):
    names = {}
    for kind, text in BLOCKS:
        if kind == "python" and "openai" not in text:
            exec(compile(text, "README.md", "exec"), names)
    task = names["SIMILARITY"]
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    monkeypatch.setitem(backend.adapters.ADAPTERS, task.name, names["Similarity"])
    [embedder] = [
        entry
        for entry in yaml.safe_load((ROOT / "models.yaml").read_text())["models"]
        if entry["id"] == "text-embedder-v1"
    ]
    entry = {**embedder, "id": "alike", "type": task.name}
    entry.pop("limits")
    client = make_app([entry]).test_client()
    example = client.get("/crane/models/alike").json["example"]
    pairs = [example["input"], {"a": "A cat sleeps.", "b": "Interest rates rose."}]
    answer = client.post("/crane/run", json={**example, "input": pairs})
    assert answer.status_code == 200, answer.json
    alike, unlike = answer.json["output"]
    assert 0.5 < alike <= 1
    assert -1 <= unlike < 0.3
    assert answer.json["metadata"]["usage"]["input_tokens"] > 10
