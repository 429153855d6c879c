"""models.yaml: which models are on offer, checked whole before anything is served."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from marshmallow import ValidationError, validate

from backend.errors import ModelNotFound, did_you_mean
from backend.schemas import Choice, Integer, StrictField, StrictSchema, Text, kind, paths
from backend.tasks import TASKS, Options

DTYPES = ["auto", "float32", "float16", "bfloat16"]


class ObjectField(StrictField):
    type_name = "object"
    expected = "a mapping"

    def accepts(self, value: Any) -> bool:
        return type(value) is dict and all(type(key) is str for key in value)


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
    hf_model = Text(load_default=None)
    revision = Text(load_default=None)
    mirror = Text(load_default=None)
    sha256 = ObjectField(load_default=dict)
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
    max_batch_size = Integer(low=1, high=4096, load_default=32)


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
    max_batch_size: int = 32
    folder: Path = Path()
    options_schema: Options = field(repr=False, compare=False)

    def weights(self) -> str:
        """The mirror where it is there, else the local folder or Hub id of ``hf_model``."""
        if self.mirror and (mirror := self._mirror()) is not None and mirror.is_dir():
            return str(mirror)
        assert self.hf_model is not None
        if self.hf_model.startswith((".", "/", "~")):
            return str((self.folder / Path(self.hf_model).expanduser()).resolve())
        return self.hf_model

    def _mirror(self) -> Path | None:
        assert self.mirror is not None
        if not self.mirror.startswith("package:"):
            return self.folder / Path(self.mirror).expanduser()
        package, _, inside = self.mirror.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            return None
        return Path(found.submodule_search_locations[0]) / inside


class Registry:
    """The models on offer, by id, in the order of models.yaml."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = dict(specs)

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self._specs.values())

    def get(self, model_id: str) -> ModelSpec:
        """Return the model's spec; raise ``ModelNotFound`` with the nearest id."""
        if model_id not in self._specs:
            hint = did_you_mean(model_id[:100], list(self._specs), what="the models are")
            raise ModelNotFound(f"There is no model {model_id[:100]!r} here; {hint}")
        return self._specs[model_id]

    @classmethod
    def load(cls, path: Path) -> Registry:
        """Read models.yaml; raise ``ValueError`` that lists every fault with its line."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        try:
            document, lines = _parse(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
        faults = _Faults(lines)
        specs: dict[str, ModelSpec] = {}
        for at, entry in _entries(document, faults):
            spec = _spec(entry, at, path.parent.resolve(), faults)
            if spec is None:
                continue
            if spec.id in specs:
                faults.add(f"{at}.id", f"{spec.id!r} is there already")
            specs[spec.id] = spec
        if faults.found:
            shown = "\n".join(f"  line {line}: {what}" for line, what in sorted(faults.found))
            raise ValueError(f"{path} is wrong:\n{shown}")
        return cls(specs)


class _Faults:
    """Faults with the line they are on: of the path itself, else of what is around it."""

    def __init__(self, lines: Mapping[str, int]) -> None:
        self._lines = lines
        self.found: list[tuple[int, str]] = []
        for at, line in lines.items():
            if at.endswith("\0again"):
                self.found.append((line, f"{at.removesuffix(chr(0) + 'again')} is there twice"))

    def add(self, at: str, what: str) -> None:
        around = at
        while around not in self._lines and around:
            around = around[: max(around.rfind("."), around.rfind("["), 0)]
        self.found.append((self._lines.get(around, 1), f"{at or 'the file'} {what}"))


def _parse(text: str) -> tuple[Any, dict[str, int]]:
    """Return the document and the line of every path in it (``models[0].options.top_k``)."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    lines: dict[str, int] = {"": 1}

    def walk(node: yaml.Node, at: str) -> None:
        lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, one in enumerate(node.value):
                walk(one, f"{at}[{index}]")
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{at}.{key.value}" if at else str(key.value)
                if inner in lines:  # YAML would take the last one in silence
                    lines[inner + "\0again"] = key.start_mark.line + 1
                lines[inner] = key.start_mark.line + 1
                walk(value, inner)

    if node is not None:
        walk(node, "")
    return yaml.safe_load(text), lines


def _entries(document: Any, faults: _Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    if type(document) is not dict or type(document.get("models")) is not list:
        faults.add("", "must have a key 'models' with a list of entries")
        return
    for key in document:
        if key != "models":
            faults.add(str(key), "is not known here; the file has one key, 'models'")
    for index, entry in enumerate(document["models"]):
        at = f"models[{index}]"
        if type(entry) is dict:
            yield at, entry
        else:
            faults.add(at, f"must be a mapping, not {kind(entry)}")


def _spec(entry: dict[str, Any], at: str, folder: Path, faults: _Faults) -> ModelSpec | None:
    before = len(faults.found)
    try:
        values = Entry().load(entry)
    except ValidationError as error:
        for path, fault in paths(error.messages, at):
            faults.add(path, fault)
        values = entry
    type_ = values.get("type")
    if type(type_) is str and type_ not in TASKS:
        faults.add(f"{at}.type", f"{type_!r} is not a task; {did_you_mean(type_, list(TASKS))}")
    if type_ != "echo" and "hf_model" not in entry:
        faults.add(at, "has no hf_model: a Hub id or a local folder")
    options_schema = TASKS[type_].options() if type_ in TASKS else Options()
    defaults, limits = values.get("options", {}), values.get("limits", {})
    if type_ in TASKS and type(defaults) is dict and type(limits) is dict:
        try:
            options_schema.narrow(defaults, limits)
        except ValidationError as error:
            for path, fault in paths(error.messages, at):
                faults.add(path, fault)
    if len(faults.found) > before:
        return None
    spec = ModelSpec(**values, folder=folder, options_schema=options_schema)
    if spec.hf_model and Path(spec.weights()).is_absolute() and not Path(spec.weights()).is_dir():
        faults.add(f"{at}.hf_model", f"is no folder: {spec.weights()}")
    return spec
