"""Sound out: speech from a text, music and other sound from a description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.media import Media
from backend.media.audio import AUDIO_FORMATS, encode_audio
from backend.schemas import Boolean, Choice, Integer, Number, Text
from backend.tasks import usage
from backend.tasks.base import MAX_SEED, TRUNCATE, Check, Options, Task, about


class SoundOptions(Options):
    """What every task that makes sound has. What is not set is as the model's own settings are."""

    temperature = Number(
        low=0.0,
        high=2.0,
        load_default=None,
        allow_none=True,
        metadata=about("0 is greedy; above 0 draws; for models that write tokens"),
    )
    top_k = Integer(
        low=0,
        high=10_000,
        load_default=None,
        allow_none=True,
        metadata=about("likeliest tokens to draw from; 0 is all; likewise"),
    )
    seed = Integer(
        low=0,
        high=MAX_SEED,
        load_default=None,
        allow_none=True,
        metadata=about("the same sound again with it; input i of a batch uses seed + i"),
    )
    format = Choice(
        list(AUDIO_FORMATS), load_default="wav", metadata=about("how the sound is written")
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


class SpeechOptions(SoundOptions):
    voice = Text(
        load_default=None,
        allow_none=True,
        metadata=about("who speaks, by a name that the model knows"),
    )
    speed = Number(
        low=0.25,
        high=4.0,
        load_default=None,
        allow_none=True,
        metadata=about("1 is the model's own; for models that can change it"),
    )
    max_tokens = Integer(
        low=1,
        high=32768,
        load_default=None,
        allow_none=True,
        metadata=about("most tokens of speech; for models that write tokens"),
    )


class AudioOptions(SoundOptions):
    duration = Number(
        low=0.1, high=600.0, load_default=None, allow_none=True, metadata=about("in seconds")
    )
    guidance_scale = Number(
        low=1.0,
        high=50.0,
        load_default=None,
        allow_none=True,
        metadata=about("how closely the text is followed"),
    )


def dump_sound(sound: Mapping[str, Any], options: Mapping[str, Any], check: Check) -> Media:
    """Samples as a file."""
    return encode_audio(sound["samples"], sound["rate"], options["format"], check)


@dataclass(frozen=True, kw_only=True)
class SoundTask(Task):
    """A task whose models draw unless they are told not to."""

    def draws(self, options: Mapping[str, Any]) -> bool:
        return bool(options["temperature"] != 0)


_OUTPUT = 'the sound, {"mime_type", "data"}'

TEXT_TO_SPEECH = SoundTask(
    name="text-to-speech",
    makes=usage.speech,
    input=Text(),
    options=SpeechOptions,
    output=_OUTPUT,
    example=("Cranes are large birds with long legs.", {"speed": 1.1, "seed": 7}),
    formats=AUDIO_FORMATS,
    dump=dump_sound,
)
TEXT_TO_AUDIO = SoundTask(
    name="text-to-audio",
    makes=usage.sound,
    input=Text(),
    options=AudioOptions,
    output=_OUTPUT,
    example=("A slow waltz on an old piano.", {"duration": 5.0, "seed": 7}),
    formats=AUDIO_FORMATS,
    dump=dump_sound,
)
