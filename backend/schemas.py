"""The envelope of a call, and fields that take a value as it is or refuse it.

marshmallow's own ``Integer`` turns ``"5"`` and ``5.7`` into 5; a caller who sends those has a bug
that is better named than hidden, so the fields here convert nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson
from marshmallow import RAISE, Schema, ValidationError, fields, missing, validate

from backend.bounds import TOO_DEEP, is_deep
from backend.config import seconds_of
from backend.errors import LONGEST_ECHO, MAX_FAULTS, MORE, InvalidRequest, did_you_mean, echoed

UNCHECKED = "was not checked after so many faults"


def kind(value: Any) -> str:
    """What JSON calls a value: ``a string``, ``null``, ``an object``."""
    names: dict[type, str] = {str: "a string", bool: "a boolean", dict: "an object", list: "a list"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "a value of another kind")


class StrictField(fields.Field[Any]):
    """Takes a value as it is, or says what was expected and what came.

    ``expected`` is the sentence's end (``must be a whole number, not a string``) and ``type_name``
    is what ``GET /crane/models/{id}`` calls it.
    """

    type_name = "any"
    expected = "any JSON value"

    def __init__(self, **kwargs: Any) -> None:
        messages: dict[str, str | list[Any] | dict[Any, Any]] = {
            "required": "is missing",
            "null": f"must be {self.expected}, not null",
            "validator_failed": "is not valid",
        }
        super().__init__(error_messages=messages, **kwargs)

    def accepts(self, value: Any) -> bool:
        return True

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        if not self.accepts(value):
            raise ValidationError(f"must be {self.expected}, not {kind(value)}")
        return value


class Anything(StrictField):
    """Any JSON value, null too."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_none=True, **kwargs)


class Bounds(validate.Validator):
    """A number within ``[low, high]``."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, value: Any) -> Any:
        if value < self.low:
            raise ValidationError(f"must be at least {self.low}, not {value}")
        if value > self.high:
            raise ValidationError(f"must be at most {self.high}, not {value}")
        return value


class Integer(StrictField):
    type_name = "integer"
    expected = "a whole number"

    def __init__(self, *, low: int, high: int, **kwargs: Any) -> None:
        super().__init__(validate=Bounds(low, high), **kwargs)

    def accepts(self, value: Any) -> bool:
        return type(value) is int


class Number(StrictField):
    type_name = "number"
    expected = "a number"

    def __init__(self, *, low: float, high: float, **kwargs: Any) -> None:
        super().__init__(validate=Bounds(low, high), **kwargs)

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        # 1 and 1.0 are one number in JSON; as one type they also share a batch.
        return float(super()._deserialize(value, attr, data, **kwargs))


class KeepAlive(StrictField):
    """Seconds, or a duration such as ``15m``; -1 is for ever."""

    type_name = "number or string"
    expected = "seconds, a duration such as 15m, or -1 for ever"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(validate=Bounds(0, math.inf), **kwargs)

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float, str)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> float:
        value = super()._deserialize(value, attr, data, **kwargs)
        seconds = seconds_of(value.strip()) if type(value) is str else float(value)
        if seconds == -1:
            return math.inf
        if seconds is None or not 0 <= seconds < math.inf:
            raise ValidationError(f"must be {self.expected}, not {echoed(value)}")
        return seconds


class Boolean(StrictField):
    type_name = "boolean"
    expected = "true or false"

    def accepts(self, value: Any) -> bool:
        return type(value) is bool


class Text(StrictField):
    """A string; by default one with something in it besides white space."""

    type_name = "string"
    expected = "a string"

    def __init__(self, *, blank: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blank = blank

    def accepts(self, value: Any) -> bool:
        return type(value) is str

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if not self.blank and not value.strip():
            raise ValidationError("must not be empty")
        return value


class Choice(Text):
    def __init__(self, choices: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.choices = list(choices)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if value not in self.choices:
            raise ValidationError(f"is {echoed(value)}: {did_you_mean(value, self.choices)}")
        return value


class AnyObject(StrictField):
    """An object with whatever in it, of at most ``high`` bytes as JSON."""

    type_name = "object"
    expected = "an object"

    def __init__(self, *, high: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.high = high

    def accepts(self, value: Any) -> bool:
        return type(value) is dict

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if is_deep(value):
            raise ValidationError(TOO_DEEP)
        if self.high is not None and (size := len(orjson.dumps(value))) > self.high:
            raise ValidationError(f"has {size} bytes as JSON; at most {self.high} are allowed")
        return value


class ListOf(StrictField):
    """A list of ``low`` to ``high`` values, each of which ``item`` accepts."""

    type_name = "list"
    expected = "a list"

    def __init__(self, item: fields.Field[Any], *, low: int = 0, high: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.item, self.low, self.high = item, low, high

    def accepts(self, value: Any) -> bool:
        return type(value) is list

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if not self.low <= len(value) <= self.high:
            raise ValidationError(f"must have {self.low} to {self.high} items, not {len(value)}")
        loaded: list[Any] = []
        faults: dict[int | range, Any] = {}
        named = 0
        for index, one in enumerate(value):
            try:
                loaded.append(self.item.deserialize(one))
            except ValidationError as error:
                faults[index] = error.messages
                named += sum(1 for _ in paths(error.messages))
                if named >= MAX_FAULTS - 1 and index + 1 < len(value):
                    faults[range(index + 1, len(value))] = [UNCHECKED]
                    break
        if faults:
            raise ValidationError(faults)
        return loaded


class StrictSchema(Schema):
    """Refuses a key it does not know, with the nearest one it does."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._names = [field.data_key or name for name, field in self.fields.items()]
        self._known = frozenset(self._names)
        self._defaults: dict[str, Any] | None = None
        self._has_hooks = any(self._hooks.values())

    def load(self, data: Any, **kwargs: Any) -> Any:
        """Load an object; keys that are not known never reach marshmallow.

        It would take a time that grows with the square of their number.
        """
        if data == {} and not kwargs:
            return self._load_nothing()
        if self.unknown != RAISE or type(data) is not dict or data.keys() <= self._known:
            plain = type(data) is dict and not kwargs and not self._has_hooks
            return self._load_fields(data) if plain else super().load(data, **kwargs)
        faults: dict[Any, Any] = {}
        try:
            super().load({k: v for k, v in data.items() if k in self._known}, **kwargs)
        except ValidationError as error:
            faults |= error.messages_dict
        unknown = [key for key in data if key not in self._known]
        count = MAX_FAULTS if len(unknown) <= MAX_FAULTS else MAX_FAULTS - 1
        for key in unknown[:count]:
            faults[key] = [f"is not known here; {did_you_mean(key, self._names)}"]
        if left := unknown[count:]:
            faults[MORE] = [f"{len(left)} more keys are not known here"]
        raise ValidationError(faults)

    def _load_fields(self, data: dict[str, Any]) -> dict[str, Any]:
        """Load an object as marshmallow does where there are only fields, in half of its time.

        Raises the same ``ValidationError``.
        """
        loaded = {}
        faults: dict[str, Any] = {}
        for name, field in self.load_fields.items():
            key = field.data_key or name
            try:
                value = field.deserialize(data.get(key, missing), key, data)
            except ValidationError as error:
                faults[key] = error.messages
            else:
                if value is not missing:
                    loaded[field.attribute or name] = value
        if faults:
            raise ValidationError(faults)
        return loaded

    def forget_defaults(self) -> None:
        """To be called when a field's ``load_default`` was changed."""
        self._defaults = None

    def _load_nothing(self) -> Any:
        """What an object without keys comes to, as most calls' options: the same each time."""
        if self._defaults is None:
            loaded = super().load({})
            if any(isinstance(value, list | dict) for value in loaded.values()):
                return loaded  # which must be each call's own
            self._defaults = loaded
        return dict(self._defaults)


class ObjectOf(StrictField):
    """An object that a schema describes."""

    type_name = "object"
    expected = "an object"

    def __init__(self, schema: type[StrictSchema], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schema = schema()

    def accepts(self, value: Any) -> bool:
        return type(value) is dict

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        return self.schema.load(super()._deserialize(value, attr, data, **kwargs))


class ByType(StrictField):
    """An object whose other fields are those that its ``type`` has."""

    type_name = "object"
    expected = "an object"

    def __init__(self, types: Mapping[str, type[StrictSchema]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.types = {name: schema() for name, schema in types.items()}

    def accepts(self, value: Any) -> bool:
        return type(value) is dict

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        name = value.get("type")
        if type(name) is not str:
            raise ValidationError({"type": [f"must be {' or '.join(map(repr, self.types))}"]})
        if name not in self.types:
            fault = f"is {echoed(name)}: {did_you_mean(name, [*self.types])}"
            raise ValidationError({"type": [fault]})
        return self.types[name].load(value)


class StringOr(StrictField):
    """A string, one of ``words`` where there are such, or what another field takes."""

    def __init__(
        self,
        other: StrictField,
        *,
        expected: str,
        words: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.other, self.expected, self.words = other, expected, words
        self.type_name = f"string or {other.type_name}"
        super().__init__(**kwargs)

    def accepts(self, value: Any) -> bool:
        if type(value) is str:
            return self.words is None or value in self.words
        return self.other.accepts(value)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        return value if type(value) is str else self.other.deserialize(value)


class RunRequest(StrictSchema):
    """The body of ``POST /crane/run``."""

    model_id = Text(required=True)
    input = Anything(required=True)
    options = StrictField(load_default=dict)
    stream = Boolean(load_default=None)  # unset, the Accept header says it


def load(schema: Schema | fields.Field[Any], data: Any, at: str = "") -> Any:
    """Load ``data`` or raise ``InvalidRequest`` that names each fault by its path below ``at``."""
    try:
        if isinstance(schema, fields.Field):
            return schema.deserialize(data)
        if type(data) is not dict:
            raise ValidationError(f"must be an object, not {kind(data)}")
        return schema.load(data)
    except ValidationError as error:
        faults = dict(paths(error.messages, at))
        unchecked = [path for path, fault in faults.items() if fault == UNCHECKED]
        named = [path for path in faults if faults[path] != UNCHECKED]
        cut = MAX_FAULTS - len(unchecked)
        told = [*named[:cut], *unchecked, *named[cut:]]
        raise InvalidRequest.of({path: faults[path] for path in told}) from None


def paths(messages: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Flatten marshmallow's nested messages: ``("options.stop[1]", "must be a string, …")``."""
    if isinstance(messages, Mapping):
        for key, inner in messages.items():
            if key == "_schema":
                step = at
            elif isinstance(key, int):
                step = f"{at}[{key}]"
            elif isinstance(key, range):
                step = f"{at}[{key.start}:]"
            else:
                name = str(key)[:LONGEST_ECHO]
                step = f"{at}.{name}" if at else name
            yield from paths(inner, step)
    elif isinstance(messages, list):
        # One sentence a field: the first fault is the one to mend first.
        yield at or "body", str(messages[0])
    else:
        yield at or "body", str(messages)
