"""Text out of speech."""

from __future__ import annotations

from backend.media.parts import AudioField
from backend.schemas import Choice, Integer, Text
from backend.tasks.base import Options, Task, about


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


# 30 ms of A above middle C: WAV, 8 bits, 8 kHz.
_SOUND = (
    "UklGRhQBAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YfAAAACAob/W4uLXwqSDYUIrHhwmO1h5m7rS4OPaxq"
    "qJZ0cvHxwkN1JzlbXP3+Pcy7CPbU0yIRwhMk1tj7DL3OPfz7WVc1I3JBwfL0dniarG2uPg0rqbeVg7JhweK0Jhg6TC1+Li"
    "1r+hf15AKR0dKD1bfJ691OHj2cSnhmRFLR8cJTlVdpi40ODj28itjGpKMCAcIzRPcJKyzd7k3s2yknBPNCMcIDBKaoytyN"
    "vj4NC4mHZVOSUcHy1FZIanxNnj4dS9nnxbPSgdHSlAXoChv9bi4tfCpINhQiseHCY7WHmbutLg49rGqolnRy8fHCQ3UnOV"
    "tc8="
)

AUTOMATIC_SPEECH_RECOGNITION = Task(
    name="automatic-speech-recognition",
    input=AudioField(),
    options=RecognitionOptions,
    output=(
        'the text; with return_timestamps {"text", "segments"} or {"text", "words"}, '
        'each of them {"text", "start", "end"}, in seconds'
    ),
    example=(_SOUND, {"language": "en"}),
)
