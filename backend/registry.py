"""models.yaml: which models are on offer, checked whole before anything is served."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from marshmallow import ValidationError, validate

from backend.errors import ModelNotFound, did_you_mean
from backend.quota.costs import Cost
from backend.schemas import (
    Boolean,
    Choice,
    Integer,
    KeepAlive,
    Number,
    ObjectOf,
    StrictField,
    StrictSchema,
    Text,
    kind,
    paths,
)
from backend.tasks import TASKS, Options

MAX_COST = 1_000_000  # units
DTYPES = ["auto", "float32", "float16", "bfloat16"]

# A Hub id has no path to it; what has one is a folder, and says so with its first character.
WEIGHTS = r"[./~][^\0]*|[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
MIRROR = r"package:[A-Za-z_]\w*/[^\0]+|(?!package:)[^\0]+"


class ObjectField(StrictField):
    type_name = "object"
    expected = "a mapping"

    def accepts(self, value: Any) -> bool:
        return type(value) is dict

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if others := [key for key in value if type(key) is not str]:
            raise ValidationError(f"has the key {others[0]!r}, which is not text: quote it")
        return value


class Digests(ObjectField):
    """File names of the weights' folder, each with its sha256."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        faults = {}
        value = super()._deserialize(value, attr, data, **kwargs)
        for name, digest in value.items():
            if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
                faults[name] = ["must be the name of a file in the weights' folder"]
            elif type(digest) is not str or not re.fullmatch(r"[0-9A-Fa-f]{64}", digest):
                faults[name] = ["must be a sha256: 64 hexadecimal digits, in quotes"]
        if faults:
            raise ValidationError(faults)
        return value


class Costs(StrictSchema):
    """What a call costs, in units of its caller's quota."""

    per_request = Number(low=0, high=MAX_COST)
    per_input = Number(low=0, high=MAX_COST)
    per_image = Number(low=0, high=MAX_COST)
    per_1k_tokens = Number(low=0, high=MAX_COST)
    per_audio_minute = Number(low=0, high=MAX_COST)
    per_video_second = Number(low=0, high=MAX_COST)


class CostField(StrictField):
    """A number, for each input, or an object that says for what."""

    type_name = "number or object"
    expected = "a number or a mapping"

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float, dict)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Cost:
        value = super()._deserialize(value, attr, data, **kwargs)
        if type(value) is not dict:
            value = {"per_input": value}
        return Cost(**Costs().load(value))


class Memory(StrictSchema):
    """Ways to fit a model on a small device; whether it can is found out when it loads."""

    quantize = Choice(["int8", "float8"])
    offload = Choice(["model", "sequential"])
    vae_tiling = Boolean()
    vae_slicing = Boolean()
    attention_slicing = Boolean()


class Entry(StrictSchema):
    """One entry of models.yaml. ``models.schema.json`` says the same to editors."""

    id = Text(
        required=True,
        validate=validate.Regexp(
            r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z",
            error="may have letters, digits, '.', '_' and '-', and at most 100 of them",
        ),
    )
    type = Text(required=True)
    hf_model = Text(
        load_default=None,
        allow_none=False,
        validate=validate.Regexp(
            rf"({WEIGHTS})\Z",
            error="must be a Hub id (org/name) or a folder (which starts with ., / or ~)",
        ),
    )
    revision = Text(load_default=None, allow_none=False)
    mirror = Text(
        load_default=None,
        allow_none=False,
        validate=validate.Regexp(
            rf"({MIRROR})\Z", error="must be a folder, or package:<Python package>/<folder in it>"
        ),
    )
    sha256 = Digests(load_default=dict)
    options = ObjectField(load_default=dict)
    limits = ObjectField(load_default=dict)
    dtype = Choice(DTYPES, load_default="auto")
    device = Text(
        load_default="auto",
        validate=validate.Regexp(
            r"(auto|cpu|mps|cuda(:\d+)?)\Z", error="must be auto, cpu, mps, cuda or cuda:0"
        ),
    )
    load_kwargs = ObjectField(data_key="load", load_default=dict)
    memory = ObjectOf(Memory, load_default=dict)
    compile = Boolean(load_default=False)
    max_batch_size = Integer(low=1, high=4096, load_default=32)
    replicas = Integer(low=1, high=64, load_default=1)
    pinned = Boolean(load_default=False)
    share_prefixes = Boolean(load_default=False)
    idle_timeout = KeepAlive(load_default=None, allow_none=False)
    cost = CostField(load_default=Cost(per_input=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A registry entry, typed. ``options_schema`` has this model's own defaults and bounds."""

    id: str
    type: str
    hf_model: str | None = None
    revision: str | None = None
    mirror: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "auto"
    load_kwargs: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    compile: bool = False
    max_batch_size: int = 32
    replicas: int = 1
    pinned: bool = False
    share_prefixes: bool = False
    idle_timeout: float | None = None  # seconds
    cost: Cost = Cost(per_input=1)
    folder: Path = Path()
    options_schema: Options = field(repr=False, compare=False)

    def weights(self) -> str:
        """The mirror where it is there, else the local folder or Hub id of ``hf_model``."""
        assert self.hf_model is not None
        return _weights(self.hf_model, self.mirror, self.folder)


def _weights(hf_model: str, mirror: str | None, folder: Path) -> str:
    if mirror and (place := _mirror(mirror, folder)) is not None and place.is_dir():
        return str(place)
    if hf_model.startswith((".", "/", "~")):
        return str((folder / _home(hf_model)).resolve())
    return hf_model


def _mirror(mirror: str, folder: Path) -> Path | None:
    if not mirror.startswith("package:"):
        return (folder / _home(mirror)).resolve()
    package, _, inside = mirror.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / inside


def _home(path: str) -> Path:
    """The path with ``~`` written out; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


class Registry:
    """The models on offer, by id, in the order of models.yaml."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = dict(specs)

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self._specs.values())

    def get(self, model_id: str, among: Collection[str] | None = None) -> ModelSpec:
        """Return the model's spec; raise ``ModelNotFound`` with the nearest id.

        Where there is ``among``, only those ids are told.
        """
        if model_id not in self._specs:
            told = [name for name in self._specs if among is None or name in among]
            hint = did_you_mean(model_id[:100], told, what="the models are")
            raise ModelNotFound(f"There is no model {model_id[:100]!r} here; {hint}")
        return self._specs[model_id]

    @classmethod
    def load(cls, path: Path) -> Registry:
        """Read models.yaml; raise ``ValueError`` that lists every fault with its line."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        faults = _Faults()
        specs: dict[str, ModelSpec] = {}
        ids: dict[str, int] = {}
        for at, entry in _entries(_parse(text, faults), faults):
            id_ = entry.get("id")
            if type(id_) is str and id_ in ids:
                faults.add(f"{at}.id", f"{id_!r} is the id of line {ids[id_]} already")
            elif type(id_) is str:
                ids[id_] = faults.line(f"{at}.id")
            spec = _spec(entry, at, path.parent.resolve(), faults)
            if spec is not None:
                specs[spec.id] = spec
        if faults.found:
            shown = "\n".join(f"  line {line}: {what}" for line, what in sorted(faults.found))
            raise ValueError(f"{path} is wrong:\n{shown}")
        return cls(specs)


class _Faults:
    """Faults with the line they are on: of the path itself, else of what is around it."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.found: list[tuple[int, str]] = []

    def add(self, at: str, what: str) -> None:
        self.add_line(self.line(at), f"{at or 'the file'} {what}")

    def add_line(self, line: int, what: str) -> None:
        self.found.append((line, what))

    def line(self, at: str) -> int:
        while at not in self.lines and at:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        return self.lines.get(at, 1)


class _Loader(yaml.SafeLoader):
    """Says where a value is that is none, such as the date 2024-13-45."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError):
            kind_ = node.tag.rpartition(":")[2]
            problem = f"{node.value!r} is not a valid {kind_}; quote it if it is text"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark) from None


def _parse(text: str, faults: _Faults) -> Any:
    """Return the document, and leave the line of every path in it with ``faults``."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _walk(node, "", faults, around=[], seen=set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context
        faults.add_line(mark.line + 1 if mark else 1, f"is not valid YAML: {problem}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.add_line(line, f"is not valid YAML: {error.reason}: {chr(error.character)!r}")
    except RecursionError:
        faults.add_line(1, "is not valid YAML: it is nested too deeply")
    return None


def _walk(
    node: yaml.Node, at: str, faults: _Faults, *, around: list[yaml.Node], seen: set[int]
) -> None:
    """Note the line of every path below ``node`` (``models[0].options.top_k``).

    What an alias repeats has the alias's line: its own insides are walked once.
    """
    if any(node is outer for outer in around):
        raise yaml.MarkedYAMLError(None, None, f"{at} holds itself", node.start_mark)
    faults.lines.setdefault(at, node.start_mark.line + 1)
    if id(node) in seen:
        return
    seen.add(id(node))
    inside = [*around, node]
    if isinstance(node, yaml.SequenceNode):
        for index, one in enumerate(node.value):
            _walk(one, f"{at}[{index}]", faults, around=inside, seen=seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            inner = f"{at}.{name}" if at else name
            if name in names:  # YAML would take the last one in silence
                faults.add_line(line, f"{inner} is there twice")
            names.add(name)
            faults.lines[inner] = line
            _walk(value, inner, faults, around=inside, seen=seen)


def _entries(document: Any, faults: _Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    if type(document) is not dict or type(document.get("models")) is not list:
        if not faults.found:
            faults.add("", "must have a key 'models' with a list of entries")
        return
    for key in document:
        if key != "models":
            faults.add(str(key), "is not known here; the file has one key, 'models'")
    for index, entry in enumerate(document["models"]):
        at = f"models[{index}]"
        if type(entry) is dict:
            yield at, {str(key): value for key, value in entry.items()}
        else:
            faults.add(at, f"must be a mapping, not {kind(entry)}")


def _spec(entry: dict[str, Any], at: str, folder: Path, faults: _Faults) -> ModelSpec | None:
    """Return the entry's spec, or None where it has faults, all of which are added."""
    values, wrong = entry, dict[str, str]()
    try:
        values = Entry().load(entry)
    except ValidationError as error:
        wrong |= paths(error.messages)
    # What is checked below needs some keys to be right, whatever the others are.
    sound = {key: value for key, value in values.items() if key not in _keys(wrong)}
    type_, hf_model = sound.get("type"), sound.get("hf_model")
    if type_ is not None and type_ not in TASKS:
        wrong["type"] = f"{type_!r} is not a task; {did_you_mean(type_, list(TASKS))}"
    if hf_model is not None:
        weights = _weights(hf_model, sound.get("mirror"), folder)
        if Path(weights).is_absolute() and not Path(weights).is_dir():
            wrong["hf_model"] = f"is no folder: {weights}"
    elif (type_ not in TASKS or TASKS[type_].weights) and "hf_model" not in _keys(wrong):
        wrong["hf_model"] = "is missing: a Hub id or a local folder"
    options_schema = TASKS[type_].options() if type_ in TASKS else Options()
    if type_ in TASKS:
        try:
            options_schema.narrow(sound.get("options", {}), sound.get("limits", {}))
        except ValidationError as error:
            wrong |= paths(error.messages)
    for path, fault in wrong.items():
        faults.add(f"{at}.{path}", fault)
    return None if wrong else ModelSpec(**values, folder=folder, options_schema=options_schema)


def _keys(wrong: Mapping[str, str]) -> set[str]:
    """The entry's keys that have a fault, or something in them that has."""
    return {re.split(r"[.\[]", path)[0] for path in wrong}
