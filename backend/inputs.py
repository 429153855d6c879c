"""A call's inputs: checked, bounded, their media read, and a seed for each."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from backend.bounds import MAX_TEXTS, TOO_DEEP, is_deep, long_texts, text_size
from backend.config import Config
from backend.errors import MAX_FAULTS, InvalidRequest
from backend.media.reader import Reading
from backend.schemas import UNCHECKED, load
from backend.tasks import Task
from backend.tasks.base import MAX_SEED


def load_inputs(
    config: Config,
    task: Task,
    input_: Any,
    options: Mapping[str, Any],
    reading: Reading,
    *,
    repeat: int = 1,
) -> list[Any]:
    """The inputs of a call, each item of a list or else the one, their media read.

    Raises ``InvalidRequest`` for what is wrong, and for what the call would come to.
    """
    if is_deep(input_):
        raise InvalidRequest.of({"input": TOO_DEEP})
    batched = type(input_) is list
    given = input_ if batched else [input_]
    check_count(config, task, len(given), options, repeat)
    inputs: list[Any] = []
    faults: dict[str, str] = {}
    for index, one in enumerate(given):
        try:
            inputs.append(load(task.input, one, f"input[{index}]" if batched else "input"))
        except InvalidRequest as error:
            faults |= error.details
            if len(faults) >= MAX_FAULTS - 1 and index + 1 < len(given):
                faults[f"input[{index + 1}:]"] = UNCHECKED
                break
    if faults:
        raise InvalidRequest.of(faults)
    check_texts(config.max_text, task, inputs if batched else inputs[0], options, repeat)
    if batched:
        return list(reading.read(inputs, "input"))
    return [reading.read(inputs[0], "input")]


def check_count(
    config: Config, task: Task, count: int, options: Mapping[str, Any], repeat: int
) -> None:
    """Refuse a call with more inputs or outputs than ``max_batch``: ``InvalidRequest``."""
    most = config.max_batch
    if not 1 <= count * repeat <= most:
        shown = f"{count * repeat}" if repeat == 1 else f"{count * repeat} ({repeat} of each)"
        at = "input" if repeat == 1 else "repeat"
        raise InvalidRequest.of({at: f"must have 1 to {most} items as a batch, not {shown}"})
    if (outputs := count * repeat * task.outputs(options)) > most:
        fault = f"comes to {outputs} outputs with {count * repeat} inputs; at most {most} are made"
        raise InvalidRequest.of({"options.num_images": f"{fault} in a call"})


def check_texts(
    max_text: int, task: Task, loaded: Any, options: Mapping[str, Any], repeat: int
) -> None:
    """Refuse texts that are too long, also as the model reads them: ``InvalidRequest``."""
    if text_size(options) + text_size(loaded) > max_text:  # or none of them is longer
        found = [*long_texts(options, max_text, "options"), *long_texts(loaded, max_text, "input")]
        if faults := {at: f"has {length} characters; {_at_most(max_text)}" for at, length in found}:
            raise InvalidRequest.of(faults)
    total = 0
    for index, one in enumerate(loaded if type(loaded) is list else [loaded]):
        expanded = task.expand(one, options)
        if expanded.longest > max_text:
            fault = f"has {expanded.longest} characters as the model reads it, with all its texts "
            at = f"input[{index}]" if type(loaded) is list else "input"
            raise InvalidRequest.of({at: f"{fault}and its options'; {_at_most(max_text)}"})
        total += expanded.characters * repeat
    if total > MAX_TEXTS * max_text:
        fault = f"comes to {total} characters, each text counted as often as it is read or written"
        raise InvalidRequest.of({"input": f"{fault}; {_at_most(MAX_TEXTS * max_text)}"})


def _at_most(characters: int) -> str:
    return f"at most {characters} are allowed"


def draw_seeds(task: Task, options: dict[str, Any], count: int) -> list[int] | None:
    """A seed for each input: the caller's and those after it, or fresh ones; None if none is used.

    An input with several outputs has a seed for each, of which this is the first. The seed that
    was used is put into ``options``, so that the receipt's options repeat the call.
    """
    if not task.draws(options):
        return None
    if options["seed"] is None:
        options["seed"] = secrets.randbelow(MAX_SEED + 1)
    step = task.outputs(options)
    return [(options["seed"] + index * step) % (MAX_SEED + 1) for index in range(count)]
