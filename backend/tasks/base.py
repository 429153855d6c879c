"""What a task is: the promise to the caller, in the service's own spelling."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from marshmallow import ValidationError, fields

from backend.bounds import text_size
from backend.schemas import Bounds, Choice, KeepAlive, ListOf, StrictField, StrictSchema, Text
from backend.tasks.usage import Makes, nothing

MAX_SEED = 2**32 - 1

Check = Callable[[], None]


def about(description: str) -> dict[str, str]:
    """Metadata of an option: what ``GET /crane/models/{id}`` says it does."""
    return {"description": description}


STAY = about("how long the model stays loaded after this call: seconds, 15m, or -1 for ever")
TRUNCATE = about("cut an input that is longer than the model's window, instead of refusing it")


class Template(Text):
    """A sentence with ``{}`` where a label goes, once.

    Other braces are refused: ``{0.__class__}`` would mean something to ``str.format``, and each
    ``{}`` more would multiply the label.
    """

    def __init__(self, default: str) -> None:
        metadata = about("a sentence with {} for the label, once")
        super().__init__(load_default=default, metadata=metadata)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        before, place, after = value.partition("{}")
        if not place or any(brace in before + after for brace in "{}"):
            raise ValidationError("must have {} once, where the label goes, and no other braces")
        return value


class Expansion(NamedTuple):
    """What a model reads for one input: how many sequences, and their characters.

    ``longest`` is the longest sequence's, ``characters`` those of all.
    """

    sequences: int
    longest: int
    characters: int


def expansion(lengths: list[int]) -> Expansion:
    """Of sequences of these lengths, in characters."""
    return Expansion(len(lengths), max(lengths, default=0), sum(lengths))


def one_sequence(value: Any, options: Mapping[str, Any]) -> Expansion:
    """An input and its options' texts are read once."""
    return expansion([text_size(value) + sum(map(text_size, options.values()))])


class Options(StrictSchema):
    """A task's options. A subclass declares them; a model's entry may narrow them."""

    keep_alive = KeepAlive(load_default=None, metadata=STAY)

    def narrow(self, defaults: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
        """Put a model's own defaults and bounds on this instance's fields.

        ``limits`` has a highest value or ``{"min": …, "max": …}`` for each number. Raises
        ``ValidationError`` keyed like the entry: ``{"limits": {"max_tokens": […]}}``.
        """
        faults: dict[str, dict[str, list[str]]] = {"options": {}, "limits": {}}
        for name, limit in limits.items():
            if fault := self._limit(name, limit):
                faults["limits"][name] = [fault]
        try:
            applied = self.load({**self.load({}), **defaults})
        except ValidationError as error:
            faults["options"] = dict(error.messages_dict)
        else:
            for name in defaults:
                self.fields[name].load_default = applied[name]
        self.forget_defaults()
        if any(faults.values()):
            raise ValidationError({key: value for key, value in faults.items() if value})

    def _limit(self, name: str, limit: Any) -> str | None:
        option = self.fields.get(name)
        bounds = next((v for v in getattr(option, "validators", ()) if type(v) is Bounds), None)
        if option is None or bounds is None:
            numbers = [k for k, f in self.fields.items() if f.validators]
            return f"is not an option with bounds; those are: {', '.join(numbers) or 'none'}"
        span = limit if isinstance(limit, dict) else {"max": limit}
        numbers_only = all(type(v) in (int, float) and math.isfinite(v) for v in span.values())
        if not span or not set(span) <= {"min", "max"} or not numbers_only:
            return "must be a number (the highest allowed) or {min: …, max: …}"
        low, high = span.get("min", bounds.low), span.get("max", bounds.high)
        if low < bounds.low or high > bounds.high:
            return f"is wider than the task's own bounds, {bounds.low} to {bounds.high}"
        if low > high:
            return f"has a min above its max, {low} above {high}"
        # marshmallow shares validators between instances, so this model gets its own.
        option.validators = [Bounds(low, high)]
        default = option.load_default
        if isinstance(default, int | float) and default > high:
            option.load_default = type(default)(high)
        return None

    def bounds(self, name: str) -> tuple[float, float]:
        """The lowest and the highest value of a number."""
        [found] = [v for v in self.fields[name].validators if isinstance(v, Bounds)]
        return found.low, found.high

    def describe(self) -> dict[str, dict[str, Any]]:
        """Each option's type, default and bounds, as ``GET /crane/models/{id}`` shows them."""
        return {name: _describe(field) for name, field in self.fields.items()}


def _describe(field: fields.Field[Any]) -> dict[str, Any]:
    assert isinstance(field, StrictField)
    default = field.load_default() if callable(field.load_default) else field.load_default
    shown: dict[str, Any] = {"type": field.type_name, "default": copy.copy(default)}
    for validator in field.validators:
        if isinstance(validator, Bounds):
            shown["min"] = validator.low
            shown["max"] = validator.high if validator.high < math.inf else None
    if isinstance(field, Choice):
        shown["choices"] = field.choices
    if isinstance(field, ListOf):
        shown |= {"max_items": field.high}
    if description := field.metadata.get("description"):
        shown["description"] = description
    return {key: value for key, value in shown.items() if value is not None or key == "default"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a caller may ask of a model, and what comes back.

    ``input`` loads one input (a list of inputs is a batch, which the caller of this class
    unpacks); ``output`` says in words what one output is; ``example`` is a valid
    ``(input, options)``. Where an output is ``Media``, ``formats`` has the values of the option
    ``format``, each with its media type. ``dump`` makes of an adapter's output what callers get,
    in the engine, where that is not the output itself; it calls ``check`` between its parts, which
    raises once nobody waits for them. ``expand`` says what an input
    comes to as the model reads it, before anything is made of it; ``makes`` says how much the
    outputs of one input may come to.
    """

    name: str
    input: fields.Field[Any]
    options: type[Options]
    output: str
    example: tuple[Any, dict[str, Any]]
    weights: bool = True  # whether an entry names a model; echo's does not
    formats: Mapping[str, str] = field(default_factory=dict)
    dump: Callable[[Any, Mapping[str, Any], Check], Any] | None = None
    # Of a loaded input and options; a task that reads some text several times says how often.
    expand: Callable[[Any, Mapping[str, Any]], Expansion] = one_sequence
    makes: Makes = nothing

    def draws(self, options: Mapping[str, Any]) -> bool:
        """Whether anything is drawn at random, so that a seed belongs in the receipt."""
        return "seed" in options and options.get("temperature", 1) > 0

    def sequences(self, loaded: Any, options: Mapping[str, Any]) -> int:
        """How many sequences a model reads for one input."""
        return 1 if self.expand is one_sequence else self.expand(loaded, options).sequences

    def outputs(self, options: Mapping[str, Any]) -> int:
        """How many outputs an input has; where it is above one, they are a list."""
        count: int = options.get("num_images", 1)
        return count
