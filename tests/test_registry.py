"""models.yaml: every fault is found at start, with its line, and what is right is applied."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from backend.errors import ModelNotFound
from backend.quota.costs import Cost
from backend.registry import Entry, Memory, Registry
from backend.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "models.yaml"
SCHEMA = json.loads((ROOT / "models.schema.json").read_text())
KEYS = {field.data_key or name for name, field in Entry().fields.items()}


@pytest.fixture
def load(tmp_path):
    """Load a registry from the text of a models.yaml."""

    def load_text(text):
        path = tmp_path / "models.yaml"
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text)
        return Registry.load(path)

    return load_text


@pytest.fixture
def faults(load):
    """The faults of a models.yaml: ``[(line, what), …]`` in the order they are told."""

    def find(text):
        with pytest.raises(ValueError, match=r"models\.yaml is wrong:") as caught:
            load(text)
        _, *lines = str(caught.value).splitlines()
        found = [re.fullmatch(r"  line (\d+): (.+)", line) for line in lines]
        return [(int(match[1]), match[2]) for match in found]

    return find


def entry(text, type_="text-generation", hf_model="org/name"):
    """A models.yaml with one entry, whose line 5 and on are ``text``."""
    lines = [f"  {line}" if line else "" for line in text.splitlines()]
    head = ["models:", "- id: m", f"  type: {type_}", f"  hf_model: {hf_model}"]
    return "\n".join([*head, *lines]) + "\n"


# One kind of fault each: the entry's line 5, and what is said of it.
FAULTY = {
    "an unknown key": (
        "max_bach_size: 8",
        "models[0].max_bach_size is not known here; did you mean 'max_batch_size'?",
    ),
    "an idle time that is none": (
        "idle_timeout: soon",
        "idle_timeout must be seconds, a duration such as 15m, or -1 for ever, not 'soon'",
    ),
    "an idle time of nothing at all": ("idle_timeout:", "idle_timeout must be seconds"),
    "pinned by a word": ("pinned: always", "pinned must be true or false"),
    "a cost that is none": (
        "cost: cheap",
        "models[0].cost must be a number or a mapping, not a string",
    ),
    "a cost below nothing": ("cost: -1", "models[0].cost.per_input must be at least 0, not -1"),
    "a cost for what there is none of": (
        "cost: {per_picture: 1}",
        "models[0].cost.per_picture is not known here; did you mean",
    ),
    "a cost that is not a number": (
        "cost: {per_image: true}",
        "models[0].cost.per_image must be a number, not a boolean",
    ),
    "a key like none": (
        "zzzzzz: 8",
        "is not known here; it is one of: compile, cost, device, dtype, ",
    ),
    "a key that is a number": ("5: 8", "models[0].5 is not known here; it is one of: "),
    "a key twice": ("id: n", "models[0].id is there twice"),
    "a way to save memory that is none": (
        "memory: {quantise: int8}",
        "models[0].memory.quantise is not known here; did you mean 'quantize'?",
    ),
    "a way to quantize that is none": (
        "memory: {quantize: int4}",
        "models[0].memory.quantize is 'int4': did you mean 'int8'?",
    ),
    "a compile that is no boolean": ("compile: 1", ".compile must be true or false, not a number"),
    "a revision that is a number": ("revision: 5", ".revision must be a string, not a number"),
    "a revision left out": ("revision:", "models[0].revision must be a string, not null"),
    "a blank revision": ("revision: ' '", "models[0].revision must not be empty"),
    "a slip in a dtype": ("dtype: flot16", ".dtype is 'flot16': did you mean 'float16'?"),
    "an unknown device": ("device: gpu", "device must be auto, cpu, mps, cuda or cuda:0"),
    "two devices": ("device: cuda:0,cuda:1", "device must be auto, cpu, mps, cuda or cuda:0"),
    "a batch size of none": ("max_batch_size: 0", "max_batch_size must be at least 1, not 0"),
    "a batch size past all": ("max_batch_size: 5000", "must be at most 4096, not 5000"),
    "a batch size that is true": ("max_batch_size: true", "a whole number, not a boolean"),
    "a batch size in quotes": ("max_batch_size: '8'", "must be a whole number, not a string"),
    "a batch size in parts": ("max_batch_size: 8.0", "must be a whole number, not a number"),
    "options as a list": ("options: [top_k]", "models[0].options must be a mapping, not a list"),
    "options left out": ("options:", "models[0].options must be a mapping, not null"),
    "a numbered option": ("options: {5: 8}", ".options has the key 5, which is not text: quote it"),
    "an unknown option": (
        "options: {max_new_tokens: 5}",
        "models[0].options.max_new_tokens is not known here; did you mean 'max_tokens'?",
    ),
    "an option out of bounds": (
        "options: {temperature: 3}",
        "models[0].options.temperature must be at most 2.0, not 3.0",
    ),
    "an option of another kind": (
        "options: {seed: done}",
        "models[0].options.seed must be a whole number, not a string",
    ),
    "a fault in an option's list": (
        "options: {stop: [a, 5]}",
        "models[0].options.stop[1] must be a string, not a number",
    ),
    "options that disagree": (
        "options: {max_tokens: 5, min_tokens: 6}",
        "models[0].options.min_tokens must not be above max_tokens (5)",
    ),
    "limits as a number": ("limits: 5", "models[0].limits must be a mapping, not a number"),
    "a limit of no option": (
        "limits: {max_token: 5}",
        "models[0].limits.max_token is not an option with bounds; those are: keep_alive",
    ),
    "a limit of a text": ("limits: {stop: 5}", ".limits.stop is not an option with bounds"),
    "a limit that is true": ("limits: {top_k: true}", "limits.top_k must be a number (the highest"),
    "a limit of other keys": ("limits: {top_k: {most: 5}}", "limits.top_k must be a number (the"),
    "a limit of nothing": ("limits: {top_k: {}}", "limits.top_k must be a number (the highest"),
    "a limit wider than the task's": (
        "limits: {max_tokens: 40000}",
        "models[0].limits.max_tokens is wider than the task's own bounds, 1 to 32768",
    ),
    "a default above its limit": (
        "options: {top_k: 9}\nlimits: {top_k: 5}",
        "models[0].options.top_k must be at most 5, not 9",
    ),
    "digests as a text": ("sha256: abc", "models[0].sha256 must be a mapping, not a string"),
    "a short digest": ("sha256: {a.bin: abc}", "sha256.a.bin must be a sha256: 64 hexadecimal"),
    "a digest read as a number": (
        f"sha256: {{a.bin: {'1' * 64}}}",
        "models[0].sha256.a.bin must be a sha256: 64 hexadecimal digits, in quotes",
    ),
    "a digest of a file elsewhere": (
        f"sha256: {{../a.bin: {'a' * 64}}}",
        "models[0].sha256.../a.bin must be the name of a file in the weights' folder",
    ),
    "a digest of an absolute path": (f"sha256: {{/a: {'a' * 64}}}", "must be the name of a file"),
    "a blank mirror": ("mirror: ' '", "models[0].mirror must not be empty"),
    "a mirror in no package": ("mirror: 'package:'", "must be a folder, or package:<Python"),
    "a mirror in no folder": ("mirror: package:yaml", "must be a folder, or package:<Python"),
    "a mirror in a subpackage": ("mirror: package:a.b/c", "must be a folder, or package:<Python"),
    "load as a text": ("load: fp16", "models[0].load must be a mapping, not a string"),
}
# JSON Schema cannot say these: they are of YAML itself, or of one task's options.
BEYOND_THE_SCHEMA = {
    "a key that is a number",
    "a numbered option",
    "a batch size in parts",
    "a key twice",
    "an unknown option",
    "an option out of bounds",
    "an option of another kind",
    "a fault in an option's list",
    "options that disagree",
    "a limit of no option",
    "a limit of a text",
    "a limit wider than the task's",
    "a default above its limit",
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_fault_is_told_with_its_line(faults, kind):
    [(line, what)] = faults(entry(FAULTY[kind][0]))
    assert FAULTY[kind][1] in what
    assert line == 5


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("options: {stop: done}", "options.stop must be a list, not a string"),
        ("options: {max_tokens: lots}", "options.max_tokens must be a whole number, not a string"),
        ("limits: {temperature: .nan}", "limits.temperature must be a number (the highest"),
        ("limits: {seed: {min: 5, max: 2}}", "limits.seed has a min above its max"),
    ],
)
def test_a_wrong_default_or_limit_never_takes_effect(faults, text, what):
    [(line, found)] = faults(entry(text))
    assert what in found
    assert line == 5


@pytest.mark.parametrize("kind", [kind for kind in FAULTY if kind not in BEYOND_THE_SCHEMA])
def test_an_editor_refuses_what_the_service_refuses(kind):
    assert not validator().is_valid(yaml.safe_load(entry(FAULTY[kind][0])))


def validator():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize(
    ("head", "line", "what"),
    [
        ("type: echo", 2, "models[0].id is missing"),
        ("id: 5\n  type: echo", 2, "models[0].id must be a string, not a number"),
        ("id: a b\n  type: echo", 2, "models[0].id may have letters, digits, '.', '_' and '-'"),
        (f"id: {'a' * 101}\n  type: echo", 2, "and at most 100 of them"),
        ("id: -a\n  type: echo", 2, "models[0].id may have letters"),
        ("id: a\n  hf_model: org/name", 2, "models[0].type is missing"),
        ("id: a\n  type: 5\n  hf_model: org/name", 3, "type must be a string, not a number"),
        ("id: a\n  type: [echo]\n  hf_model: o/n", 3, "type must be a string, not a list"),
        ("id: a\n  type: no\n  hf_model: o/n", 3, "type must be a string, not a boolean"),
        (
            "id: a\n  type: summarisation\n  hf_model: o/n",
            3,
            "models[0].type 'summarisation' is not a task; did you mean 'summarization'?",
        ),
        ("id: a\n  type: zzz\n  hf_model: o/n", 3, "'zzz' is not a task; it is one of: audio-"),
        ("id: a\n  type: chat", 2, "models[0].hf_model is missing: a Hub id or a local folder"),
        ("id: a\n  type: chat\n  hf_model:", 4, "hf_model must be a string, not null"),
        ("id: a\n  type: chat\n  hf_model: ''", 4, "models[0].hf_model must not be empty"),
        ("id: a\n  type: chat\n  hf_model: a b", 4, "hf_model must be a Hub id (org/name) or a"),
        ("id: a\n  type: chat\n  hf_model: a/b/c", 4, "hf_model must be a Hub id (org/name) or a"),
        ("id: a\n  type: chat\n  hf_model: ./nowhere", 4, "models[0].hf_model is no folder: /"),
        ("id: a\n  type: chat\n  hf_model: ~nobody-here/b", 4, "models[0].hf_model is no folder"),
        ("id: a\n  type: chat\n  hf_model: /no\\such", 4, "models[0].hf_model is no folder"),
    ],
)
def test_what_an_entry_must_have_is_checked(faults, head, line, what):
    [(found_line, found)] = faults(f"models:\n- {head}\n")
    assert what in found
    assert found_line == line
    document = yaml.safe_load(f"models:\n- {head}\n")
    assert "is no folder" in found or not validator().is_valid(document)


def test_every_fault_of_the_file_is_in_one_message_in_the_order_of_lines(faults):
    found = faults(
        "version: 1\n"
        "models:\n"
        "- id: a\n"
        "  type: summarisation\n"
        "  dtype: fp16\n"
        "- id: a\n"  # 6
        "  type: chat\n"
        "  hf_model: ./nowhere\n"
        "  options: {max_tokns: 5}\n"
        "  limits: {top_k: many}\n"
        "- just a text\n"  # 11
        "- id: b\n"
        "  type: echo\n"
        "  type: echo\n"
        "  max_batch_size: 0\n"
    )
    assert [(line, what.split()[0]) for line, what in found] == [
        (1, "version"),
        (3, "models[0].hf_model"),
        (4, "models[0].type"),
        (5, "models[0].dtype"),
        (6, "models[1].id"),
        (8, "models[1].hf_model"),
        (9, "models[1].options.max_tokns"),
        (10, "models[1].limits.top_k"),
        (11, "models[2]"),
        (14, "models[3].type"),
        (15, "models[3].max_batch_size"),
    ]
    assert found[4][1] == "models[1].id 'a' is the id of line 3 already"
    assert found[8][1] == "models[2] must be a mapping, not a string"


def test_an_id_is_refused_each_time_it_comes_again(faults):
    text = "models:\n- {id: a, type: echo}\n- {id: a, type: echo}\n- {id: a, type: echo}\n"
    assert faults(text) == [
        (3, "models[1].id 'a' is the id of line 2 already"),
        (4, "models[2].id 'a' is the id of line 2 already"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "the file must have a key 'models' with a list of entries"),
        ("# nothing but this\n", 1, "the file must have a key 'models'"),
        ("- id: a\n", 1, "the file must have a key 'models'"),
        ("models:\n  a: {type: echo}\n", 1, "the file must have a key 'models' with a list"),
        ("models:\n", 1, "the file must have a key 'models' with a list"),
        ("model:\n- id: a\n", 1, "the file must have a key 'models' with a list"),
        ("models:\n- id: 'a\n", 3, "is not valid YAML: found unexpected end of stream"),
        ("models:\n- id: a\n\ttype: echo\n", 3, "is not valid YAML: found character '\\t'"),
        ("models:\n- id: a\n type: b\n", 3, "is not valid YAML: expected <block end>"),
        ("models: []\n---\nmodels: []\n", 2, "is not valid YAML: but found another document"),
        ("models:\n- id: !!python/name:os.system x\n", 2, "is not valid YAML: could not determine"),
        ("models:\n- id: *a\n", 2, "is not valid YAML: found undefined alias 'a'"),
        ("models:\n- {[a]: b}\n", 2, "is not valid YAML: found unhashable key"),
        ("models:\n- id: 2024-13-45\n", 2, "'2024-13-45' is not a valid timestamp; quote it"),
        ("models:\n- id: !!bool maybe\n", 2, "'maybe' is not a valid bool; quote it"),
        ("models:\n- id: a\x01\n", 2, "is not valid YAML: special characters are not allowed"),
        ("models: &a [*a]\n", 1, "is not valid YAML: models[0] holds itself"),
        ("models:\n- &e\n  id: a\n  type: echo\n  options: *e\n", 2, "models[0].options holds its"),
        ("models: " + "[" * 2000 + "]" * 2000, 1, "is not valid YAML: it is nested too deeply"),
    ],
)
def test_a_file_that_is_no_registry_says_why_and_where(faults, text, line, what):
    [(found_line, found)] = faults(text)
    assert what in found
    assert found_line == line


def test_a_file_that_cannot_be_read_is_named(load, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read: .*No such file"):
        Registry.load(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match=r"cannot be read: .*Is a directory"):
        Registry.load(tmp_path)
    with pytest.raises(ValueError, match=r"models\.yaml cannot be read: .*utf-8"):
        load(b"\x80\x04\x95binary\xff\xfe")


def test_an_alias_repeats_what_it_names(load):
    registry = load(
        "models:\n"
        "- {id: a, type: chat, hf_model: o/n, options: &short {max_tokens: 9}}\n"
        "- {id: b, type: chat, hf_model: o/n, options: *short}\n"
        "- &c {id: c, type: chat, hf_model: o/n, max_batch_size: 4}\n"
        "- {<<: *c, id: d}\n"
    )
    assert registry.get("b").options_schema.load({})["max_tokens"] == 9
    assert registry.get("d").max_batch_size == 4


def test_a_fault_in_what_an_alias_repeats_has_the_alias_line(faults):
    found = faults(
        "models:\n"
        "- {id: a, type: chat, hf_model: o/n, options: &wrong {max_tokns: 9}}\n"
        "- {id: b, type: chat, hf_model: o/n, options: *wrong}\n"
    )
    assert [line for line, _ in found] == [2, 3]


def test_a_key_with_a_dot_is_not_taken_for_a_path(faults):
    digest = "a" * 64
    text = f"sha256:\n  a.b: {digest}\n  a: {{b: c}}\n  a.b: {digest}\n"
    assert [(line, what) for line, what in faults(entry(text)) if "twice" in what] == [
        (8, "models[0].sha256.a.b is there twice")
    ]


# What is right is applied.


def test_an_entry_gets_its_defaults(load):
    spec = load("models:\n- {id: a, type: echo}\n").get("a")
    assert (spec.dtype, spec.device, spec.max_batch_size) == ("auto", "auto", 32)
    assert (spec.hf_model, spec.revision, spec.mirror) == (None, None, None)
    assert (spec.sha256, spec.load_kwargs) == ({}, {})


def test_an_entry_takes_every_key_there_is(load):
    text = (
        "revision: abc123\nmirror: /no/such\n"
        f"sha256: {{a/b.bin: {'0aF' * 21 + '0'}}}\n"
        "options: {top_k: 4}\nlimits: {top_k: 5}\ndtype: float16\ndevice: cuda:1\n"
        "load: {variant: fp16}\nmax_batch_size: 7\ncompile: true\n"
        "memory: {quantize: int8, offload: model, vae_tiling: true}\n"
        "cost: {per_request: 1, per_image: 0.5}\npinned: true\nidle_timeout: 5m\nreplicas: 3\n"
        "share_prefixes: true\n"
    )
    spec = load(entry(text)).get("m")
    assert set(yaml.safe_load(entry(text))["models"][0]) == KEYS
    assert (spec.revision, spec.mirror, spec.dtype) == ("abc123", "/no/such", "float16")
    assert (spec.device, spec.max_batch_size) == ("cuda:1", 7)
    assert spec.load_kwargs == {"variant": "fp16"}
    assert spec.compile is True
    assert (spec.pinned, spec.idle_timeout, spec.replicas) == (True, 300, 3)
    assert spec.share_prefixes is True
    assert spec.memory == {"quantize": "int8", "offload": "model", "vae_tiling": True}
    assert spec.cost == Cost(per_request=1, per_image=0.5)
    assert spec.weights() == "org/name"


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ("", Cost(per_input=1)),
        ("cost: 0", Cost()),
        ("cost: 2.5", Cost(per_input=2.5)),
        (
            "cost: {per_1k_tokens: 2, per_audio_minute: 3, per_video_second: 4, per_input: 5}",
            Cost(per_1k_tokens=2, per_audio_minute=3, per_video_second=4, per_input=5),
        ),
    ],
)
def test_a_call_costs_what_its_entry_says(load, text, cost):
    assert load(entry(text)).get("m").cost == cost


def test_options_and_limits_are_a_models_own(make_app):
    hf_model = {"type": "text-generation", "hf_model": "org/name"}
    narrowed = {
        "options": {"temperature": 0.5, "stop": ["\n"]},
        "limits": {"max_tokens": 100, "top_k": {"min": 5, "max": 50}, "num_beams": {"max": 2}},
    }
    narrowed["options"]["top_k"] = 10
    client = make_app(
        [{"id": "narrow", **hf_model, **narrowed}, {"id": "plain", **hf_model}]
    ).test_client()
    shown = {model["id"]: model["options"] for model in client.get("/crane/models").json["models"]}
    picked = {
        name: {key: shown["narrow"][name].get(key) for key in ("default", "min", "max")}
        for name in ("temperature", "stop", "max_tokens", "top_k", "num_beams")
    }
    assert picked == {
        "temperature": {"default": 0.5, "min": 0.0, "max": 2.0},
        "stop": {"default": ["\n"], "min": None, "max": None},
        # The task's own default, 256, would be past this model's limit.
        "max_tokens": {"default": 100, "min": 1, "max": 100},
        "top_k": {"default": 10, "min": 5, "max": 50},
        "num_beams": {"default": 1, "min": 1, "max": 2},
    }
    assert shown["plain"]["max_tokens"] == {
        **shown["plain"]["max_tokens"],
        "default": 256,
        "max": 32768,
    }
    body = {"model_id": "narrow", "input": "a", "options": {"max_tokens": 101, "top_k": 4}}
    refusal = client.post("/crane/run", json=body)
    assert refusal.status_code == 400
    assert refusal.json["error"]["details"] == {
        "options.max_tokens": "must be at most 100, not 101",
        "options.top_k": "must be at least 5, not 4",
    }


def test_a_default_applies_and_is_in_the_receipt(make_app):
    entry = {"id": "slow", "type": "echo", "options": {"delay_ms": 3}, "limits": {"delay_ms": 5}}
    client = make_app([entry]).test_client()
    answer = client.post("/crane/run", json={"model_id": "slow", "input": 1})
    assert answer.json["metadata"]["options"] == {"delay_ms": 3}


def test_a_folder_is_looked_for_beside_the_file(load, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir("/")
    assert load(entry("", hf_model="./weights")).get("m").weights() == str(tmp_path / "weights")
    assert load(entry("", hf_model=str(tmp_path / "weights"))).get("m").weights() == str(
        tmp_path / "weights"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(entry("", hf_model="~/weights")).get("m").weights() == str(tmp_path / "weights")
    assert load(entry("", hf_model="gpt2")).get("m").weights() == "gpt2"


def test_a_mirror_is_used_only_where_it_is_there(load, tmp_path):
    assert load(entry("mirror: ./copy")).get("m").weights() == "org/name"
    (tmp_path / "copy").mkdir()
    assert load(entry("mirror: ./copy")).get("m").weights() == str(tmp_path / "copy")
    assert load(entry("mirror: package:no_such_package/a")).get("m").weights() == "org/name"
    assert load(entry("mirror: package:yaml/no_such_folder")).get("m").weights() == "org/name"
    # A module is no package, so nothing can be in it.
    assert load(entry("mirror: package:re/a")).get("m").weights() == "org/name"
    # Where the mirror is there, the folder it stands for need not be.
    assert load(entry("mirror: ./copy", hf_model="./gone")).get("m").weights() == str(
        tmp_path / "copy"
    )


def test_a_package_is_found_without_being_imported(load, tmp_path, monkeypatch):
    weights = tmp_path / "site" / "weights_package" / "model"
    weights.mkdir(parents=True)
    (weights.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    spec = load(entry("mirror: package:weights_package/model")).get("m")
    assert spec.weights() == str(weights)


def test_an_unknown_model_is_answered_with_the_nearest(load):
    registry = load("models:\n- {id: text-embedder-v1, type: echo}\n")
    with pytest.raises(ModelNotFound, match="did you mean 'text-embedder-v1'"):
        registry.get("text-embeder-v1")
    with pytest.raises(ModelNotFound, match="the models are: text-embedder-v1"):
        registry.get("x" * 5000)


# The file that ships, and its schema.


def test_the_shipped_registry_has_a_model_for_every_task():
    types = [spec.type for spec in Registry.load(SHIPPED)]
    assert sorted(types) == sorted(TASKS)


def test_every_task_example_suits_the_shipped_model():
    for spec in Registry.load(SHIPPED):
        input_, options = TASKS[spec.type].example
        TASKS[spec.type].input.deserialize(copy.deepcopy(input_))
        spec.options_schema.load(options)


def test_the_shipped_registry_says_what_each_key_is_exactly_once():
    comments = re.findall(r"^#   (\w+) {2,}\S", SHIPPED.read_text(), re.MULTILINE)
    assert sorted(comments) == sorted(KEYS)


def test_the_shipped_summarizer_writes_as_it_was_trained_to():
    spec = Registry.load(SHIPPED).get("text-summarizer-v1")
    options = spec.options_schema.load({})
    assert spec.hf_model == "facebook/bart-large-cnn"
    assert (options["max_tokens"], options["min_tokens"], options["num_beams"]) == (142, 56, 4)


def test_the_schema_for_editors_accepts_the_shipped_registry():
    validator().validate(yaml.safe_load(SHIPPED.read_text()))
    assert SHIPPED.read_text().startswith("# yaml-language-server: $schema=./models.schema.json\n")


def test_the_schema_for_editors_has_the_keys_and_tasks_of_the_service():
    properties = SCHEMA["$defs"]["entry"]["properties"]
    assert set(properties) == KEYS
    assert properties["type"]["enum"] == list(TASKS)
    assert all(property["description"] for property in properties.values())
    ways = properties["memory"]["properties"]
    assert {name: shown.get("enum") for name, shown in ways.items()} == {
        name: getattr(field, "choices", None) for name, field in Memory().fields.items()
    }
    required = {field.data_key or name for name, field in Entry().fields.items() if field.required}
    assert set(SCHEMA["$defs"]["entry"]["required"]) == required
    for name, field in Entry().fields.items():
        shown = properties[field.data_key or name]
        if "default" in shown:
            assert shown["default"] == field.load_default
        if hasattr(field, "choices"):
            assert shown["enum"] == field.choices
    bounds = Entry().fields["max_batch_size"].validators[0]
    assert (bounds.low, bounds.high) == (
        properties["max_batch_size"]["minimum"],
        properties["max_batch_size"]["maximum"],
    )
