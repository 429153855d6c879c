"""Text out of speech."""

from __future__ import annotations

from backend.media.parts import AudioField
from backend.schemas import Choice, Integer, Text
from backend.tasks import usage
from backend.tasks.base import Options, Task, about
from backend.tasks.examples import SOUND


class RecognitionOptions(Options):
    language = Text(
        load_default=None,
        allow_none=True,
        metadata=about("spoken language, de or german; if not set, what the model hears"),
    )
    task = Choice(
        ["transcribe", "translate"],
        load_default="transcribe",
        metadata=about("translate writes in English"),
    )
    return_timestamps = Choice(
        ["none", "segments", "words"],
        load_default="none",
        metadata=about("whose times to tell; if any, the output is an object"),
    )
    max_tokens = Integer(
        low=1,
        high=4096,
        load_default=None,
        allow_none=True,
        metadata=about("most tokens to write for each 30 s; if not set, as many as fit the model"),
    )
    num_beams = Integer(low=1, high=16, load_default=1, metadata=about("beams to search"))


AUTOMATIC_SPEECH_RECOGNITION = Task(
    name="automatic-speech-recognition",
    makes=usage.transcript,
    input=AudioField(),
    options=RecognitionOptions,
    output=(
        'the text; with return_timestamps {"text", "segments"} or {"text", "words"}, '
        'each of them {"text", "start", "end"}, in seconds'
    ),
    example=(SOUND, {"language": "en"}),
)
