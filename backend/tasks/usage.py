"""How much a call may use at most, known from its inputs and options before it runs.

Where only the model knows, it is a guess, which decides whether a call is let in and no more: what
is charged in the end is what was used. The names are those of receipts: ``input_tokens``,
``output_tokens``, ``images``, ``audio_seconds`` and ``video_seconds``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.bounds import text_size
from backend.errors import InvalidRequest
from backend.messages import OBJECT_BYTES

if TYPE_CHECKING:
    from backend.tasks.base import Task

Usage = Mapping[str, float]
# What is made of one input; the input's media are read.
Makes = Callable[[Any, Mapping[str, Any]], Usage]

# What a template or a tokenizer adds: to a text, a message, a tool.
EXTRA_TOKENS = 16
# LLaVA-NeXT makes up to 2,880 tokens of a picture; Qwen2-VL one of each 28 x 28 pixels.
IMAGE_TOKENS = 3072
PIXELS_PER_TOKEN = 28 * 28
# Characters; slow speech has some ten a second. Bark speaks 15 s at most, and may do so for a word.
SPOKEN_PER_S = 4
SPOKEN_S = 16.0
WHISPER_WINDOW_S = 30
WHISPER_TOKENS = 448  # at most, for each window
SOUND_S = 60.0  # of what is composed, where nobody says how long
FILM_S = 10.0  # likewise; today's models make 2 to 8 s
FILM_FRAMES = 161  # LTX's; others make fewer
LEAST_FPS = 5.0  # of a film whose number of frames alone is known
LOGPROB_BYTES = OBJECT_BYTES + 64  # of one token and its log probability, as ``weight`` has it
ANSWER_TOKENS = 20  # of visual question answering, where nobody says how many


def nothing(input_: Any, options: Mapping[str, Any]) -> Usage:
    return {}


def completion(input_: Any, options: Mapping[str, Any]) -> Usage:
    return {"output_tokens": options["max_tokens"] or ANSWER_TOKENS}


def seen_completion(input_: Any, options: Mapping[str, Any]) -> Usage:
    """A completion of a prompt that has pictures in it, each of many tokens."""
    tokens = sum(max(IMAGE_TOKENS, pixels // PIXELS_PER_TOKEN) for pixels in _pixels(input_))
    return {**completion(input_, options), "input_tokens": tokens}


def transcript(input_: Any, options: Mapping[str, Any]) -> Usage:
    windows = math.ceil(measured(input_)["audio_seconds"] / WHISPER_WINDOW_S)
    return {"output_tokens": windows * (options["max_tokens"] or WHISPER_TOKENS)}


def images(input_: Any, options: Mapping[str, Any]) -> Usage:
    return {"images": options["num_images"]}


def video(input_: Any, options: Mapping[str, Any]) -> Usage:
    seconds, frames, fps = options["duration"], options["num_frames"], options["fps"]
    if seconds is None and frames is None and fps is None:
        seconds = FILM_S
    elif seconds is None:
        seconds = (frames or FILM_FRAMES) / (fps or LEAST_FPS)
    return {"video_seconds": seconds}


def speech(input_: Any, options: Mapping[str, Any]) -> Usage:
    pace = SPOKEN_PER_S * min(options["speed"] or 1.0, 1.0)
    return {"audio_seconds": SPOKEN_S + text_size(input_) / pace}


def sound(input_: Any, options: Mapping[str, Any]) -> Usage:
    return {"audio_seconds": options["duration"] or SOUND_S}


def sequences(task: Task, inputs: list[Any], options: Mapping[str, Any], repeat: int = 1) -> int:
    """How many inputs a model has to run.

    What one input comes to, as ``Task.expand`` says, are as many, and so is each of several
    outputs.
    """
    each = repeat * task.outputs(options)
    return each * sum(task.sequences(one, options) for one in inputs)


def most_usage(
    task: Task,
    inputs: list[Any],
    options: Mapping[str, Any],
    repeat: int = 1,
    window: int | None = None,
) -> tuple[int, dict[str, float]]:
    """How many inputs a model has to run, and the most that they may use.

    ``inputs`` and ``options`` are loaded, and the media read. ``window`` is how many tokens each
    text is cut to, if it is.
    """
    total = dict[str, float]()
    for one in inputs:
        expanded = task.expand(one, options)
        extra = EXTRA_TOKENS * max(expanded.sequences, _texts(one))
        width = _bytes_per_character([one, dict(options)])
        read = math.ceil(expanded.characters * width) + extra
        if window is not None:
            read = min(read, expanded.sequences * window)
        _add(total, {"input_tokens": read})
        _add(total, {**measured(one), **task.makes(one, options)})
    count = sequences(task, inputs, options, repeat)
    return count, {name: repeat * used for name, used in total.items()}


def check_logprobs(
    task: Task, inputs: list[Any], options: Mapping[str, Any], repeat: int, max_output: int
) -> None:
    """Refuse more log probabilities than an answer has room for: ``InvalidRequest``."""
    if (tops := options.get("top_logprobs")) is None:
        return
    tokens = repeat * sum(int(task.makes(one, options)["output_tokens"]) for one in inputs)
    if (comes_to := tokens * (tops + 1) * LOGPROB_BYTES) > max_output:
        fault = f"comes to {comes_to} bytes with {tokens} tokens in all, and {max_output} are the "
        fault += "most (CRANE_MAX_OUTPUT); lower it, max_tokens, or the number of completions"
        raise InvalidRequest.of({"options.top_logprobs": fault})


def measured(value: Any) -> dict[str, float]:
    """The pictures, and the seconds of sounds and films, that an input has."""
    if isinstance(value, np.ndarray):
        return {"images": 1}
    found: dict[str, float] = {}
    if isinstance(value, dict):
        if isinstance(value.get("samples"), np.ndarray):
            return {"audio_seconds": len(value["samples"]) / value["rate"]}
        if isinstance(value.get("frames"), np.ndarray):
            return {"video_seconds": len(value["frames"]) / value["fps"]}
        value = list(value.values())
    for one in value if isinstance(value, list) else []:
        _add(found, measured(one))
    return found


def _add(total: dict[str, float], more: Usage) -> None:
    for name, count in more.items():
        total[name] = total.get(name, 0) + count


def _pixels(value: Any) -> Iterator[int]:
    """The pixels of each picture that an input has."""
    if isinstance(value, np.ndarray):
        yield value.shape[0] * value.shape[1]
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _pixels(one)


def _bytes_per_character(value: Any) -> float:
    """That of the text of all which has most; no tokenizer makes more tokens than bytes of one."""
    if isinstance(value, str):
        return 1.0 if value.isascii() else len(value.encode()) / len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return max(map(_bytes_per_character, value), default=1.0) if isinstance(value, list) else 1.0


def _texts(value: Any) -> int:
    """How many texts and objects there are in a value, such as messages and their contents."""
    if isinstance(value, dict):
        return 1 + sum(map(_texts, value.values()))
    if isinstance(value, list):
        return sum(map(_texts, value))
    return 1 if isinstance(value, str) else 0
