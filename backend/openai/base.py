"""What the routes of /v1 have in common: from a body in OpenAI's words to a call in Crane's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from marshmallow import ValidationError

from backend.bounds import check_body
from backend.errors import MORE, CraneError, InvalidRequest
from backend.media.parts import Upload
from backend.openai.errors import names_fields
from backend.registry import ModelSpec
from backend.schemas import Anything, StrictField, StrictSchema, Text, kind, load

CANNOT = "is not something this model can be asked"


class Nullable(StrictSchema):
    """OpenAI's clients write null for what they do not say."""

    def load(self, data: Any, **kwargs: Any) -> Any:
        if type(data) is dict and None in data.values():
            data = {name: value for name, value in data.items() if value is not None}
        return super().load(data, **kwargs)


class Named(Nullable):
    model = Text(required=True)


class Body(Named):
    """A body in OpenAI's words."""

    # Who calls, for a provider that looks for abuse: no answer depends on them.
    user = Text(blank=True)
    safety_identifier = Text(blank=True)


class Option(Anything):
    """An option of the model's under OpenAI's name for it; the model's own schema checks it.

    A value that is ``idle`` says nothing to a model that has no such option.
    """

    def __init__(self, option: str, *, idle: Iterable[Any] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.option, self.idle = option, tuple(idle)

    def says_nothing(self, value: Any) -> bool:
        return type(value) is not bool and value in self.idle


class Stop(Option):
    """A string or a list of them."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        return [value] if type(value) is str else value


class Only(StrictField):
    """Takes the one value, or the few, that are so here anyway."""

    def __init__(self, *values: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.values = values

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in self.values):
            known = " or ".join(orjson.dumps(one).decode() for one in self.values)
            raise ValidationError(f"can only be {known} here, not {_shown(value)}")
        return value


def _shown(value: Any) -> str:
    if type(value) in (bool, int, float, str):
        return orjson.dumps(value).decode()[:80]
    return kind(value)  # which may be of any depth


class TextOrTexts(StrictField):
    """A text, or a list of them: each is for the task to check."""

    type_name = "string or list"
    expected = "a string or a list of strings"

    def accepts(self, value: Any) -> bool:
        return type(value) in (str, list)


class File(StrictField):
    """A file of a form, by itself or as a list of one."""

    type_name = "file"
    expected = "a file of the form"

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if type(value) is list and len(value) > 1:
            raise ValidationError(f"must be one file, not {len(value)}")
        one = value[0] if type(value) is list else value
        if not isinstance(one, Upload):
            raise ValidationError(f"must be {self.expected}, not {kind(one)}")
        return one


@dataclass(frozen=True, kw_only=True)
class Route:
    """One path of /v1: the models it is for, what it takes, and what it answers.

    ``ask`` makes the input of a loaded body, and the options that are no ``Option`` of it;
    ``names`` has OpenAI's name of those. ``main`` is the field that the input comes from.
    ``answer`` makes of an output and its receipt a JSON body, or a ``Page``, or ``Media``.
    ``chunks`` makes of a stream's events the lines of OpenAI's stream. ``at`` finds a path of our
    input in the body. One that ``repeats`` answers each input ``n`` times.
    """

    path: str
    types: tuple[str, ...]
    body: type[Body]
    main: str
    ask: Callable[[dict[str, Any], ModelSpec], tuple[Any, dict[str, Any]]]
    answer: Callable[[Order, Any, Mapping[str, Any]], Any]
    form: bool = False
    repeats: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    chunks: Callable[[Order, Iterable[Any], str], Iterator[str]] | None = None
    at: Callable[[str, Order], str] = lambda path, order: in_body(path, order.route.main)

    @property
    def name(self) -> str:
        return re.sub(r"\W", "_", self.path.strip("/"))


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a caller of /v1 asks for, in Crane's words.

    ``names`` has OpenAI's name of each option.
    """

    route: Route
    spec: ModelSpec
    body: Mapping[str, Any]
    input: Any
    options: dict[str, Any]
    names: Mapping[str, str]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def batched(self) -> bool:
        return type(self.input) is list or self.repeat > 1

    @property
    def repeat(self) -> int:
        """How many outputs each input has; choice 3 of ``n: 2`` is of the second input."""
        return int(self.body["n"]) if self.route.repeats else 1

    def renamed(self, error: CraneError) -> CraneError:
        """An error of ``run_model`` whose fields have the names that this caller knows."""
        if not names_fields(error):
            return error
        renamed = {
            path if path == MORE else self._at(path): fault for path, fault in error.details.items()
        }
        return type(error).of(renamed)

    def _at(self, path: str) -> str:
        if found := re.fullmatch(r"options\.(\w+)(.*)", path, re.DOTALL):
            return self.names.get(found[1], found[1]) + found[2]
        return "n" if path == "repeat" else self.route.at(path, self)


@dataclass(frozen=True, slots=True)
class Page:
    """An answer that is a plain text."""

    text: str
    mime_type: str = "text/plain"


def in_body(path: str, main: str) -> str:
    """``input[2]`` is ``prompt[2]`` where the input is the prompt; ``input.mask`` is ``mask``."""
    if path.startswith("input."):
        return path.removeprefix("input.")
    return re.sub(r"^input(?=\[|$)", main, path)


def order(route: Route, spec: ModelSpec, sent: dict[str, Any], routes: Iterable[Route]) -> Order:
    """Load a body that asks for a model; raises ``InvalidRequest`` in the caller's own words.

    Beside OpenAI's fields it may have the model's own options, by their own names.
    """
    if spec.type not in route.types:
        raise InvalidRequest.of({"model": _wrong_type(route, spec, routes)})
    schema, known = route.body(), spec.options_schema.fields
    if route.form:
        sent = {
            name: _of_form(name, value, _taker(name, schema, spec)) for name, value in sent.items()
        }
    own = {
        name: value
        for name, value in sent.items()
        if name in known and name not in schema.fields and value is not None
    }
    body = load(schema, {name: value for name, value in sent.items() if name not in own})
    options, names = {**own}, {**route.names, **{name: name for name in own}}
    faults: dict[str, str] = {}

    def put(option: str, name: str, value: Any) -> None:
        if option in options and options[option] != value:
            faults[name] = f"says what {names.get(option, option)} says too: send one of them"
        options[option], names[option] = value, name

    for name, taken in schema.fields.items():
        if not isinstance(taken, Option) or name not in body:
            continue
        if taken.option in known or not taken.says_nothing(body[name]):
            put(taken.option, name, body[name])
    input_, more = route.ask(body, spec)
    for option, value in more.items():
        put(option, route.names[option], value)
    faults |= {names.get(option, option): CANNOT for option in options if option not in known}
    if faults:
        raise InvalidRequest.of(faults)
    return Order(route=route, spec=spec, body=body, input=input_, options=options, names=names)


def _taker(name: str, schema: Body, spec: ModelSpec) -> Any:
    """The field that a value is for, OpenAI's or an option's."""
    taken = schema.fields.get(name)
    if taken is None or isinstance(taken, Option):
        return spec.options_schema.fields.get(taken.option if taken else name)
    return taken


def _of_form(name: str, value: Any, taken: Any) -> Any:
    """A form has texts alone: one for a number or a boolean is read as JSON."""
    if type(value) is not str or taken is None or isinstance(taken, Text | File):
        return value
    if isinstance(taken, Only) and type(taken.values[0]) is str:
        return value
    try:
        read = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    check_body(read, name)
    return read


def _wrong_type(route: Route, spec: ModelSpec, routes: Iterable[Route]) -> str:
    own = [f"POST {one.path}" for one in routes if spec.type in one.types]
    served = " and ".join([*own, "POST /crane/run"])
    verb = "serve" if own else "serves"
    return (
        f"is a model of type {spec.type}, which {served} {verb}; "
        f"{route.path} is for {' and '.join(route.types)}"
    )


def each(order: Order, value: Any) -> list[Any]:
    """An output, or a fact of the receipt, for each input."""
    return list(value) if order.batched else [value]
