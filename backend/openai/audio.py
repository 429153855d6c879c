"""POST /v1/audio/speech, /v1/audio/transcriptions and /v1/audio/translations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, validates_schema

from backend.openai.base import Body, File, Only, Option, Order, Page, Route
from backend.registry import ModelSpec
from backend.schemas import Choice, ListOf, Text

# OpenAI's names of what we write, where they are others: Opus is in an Ogg file for both.
_SOUNDS = {"mp3": "mp3", "opus": "ogg", "flac": "flac", "wav": "wav"}
# What a model is asked for by the parts of a recording whose times are told.
_TIMES = {"segment": "segments", "word": "words"}


class SpeechBody(Body):
    input = Text(blank=True, required=True)
    voice = Option("voice")
    speed = Option("speed")
    response_format = Choice(list(_SOUNDS), load_default="mp3")
    stream_format = Only("audio")


def ask_speech(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    return body["input"], {"format": _SOUNDS[body["response_format"]]}


def answer_speech(order: Order, output: Any, metadata: Mapping[str, Any]) -> Any:
    return output


class TranslationBody(Body):
    file = File(required=True)
    response_format = Choice(["json", "text", "srt", "verbose_json", "vtt"], load_default="json")
    temperature = Only(0, 0.0)


class TranscriptionBody(TranslationBody):
    language = Option("language")
    timestamp_granularities = ListOf(Choice(list(_TIMES)), low=1, high=1)
    chunking_strategy = Only("auto")
    stream = Only(False)

    @validates_schema
    def _agree(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "timestamp_granularities" in data and data["response_format"] != "verbose_json":
            fault = "is for a call with response_format verbose_json"
            raise ValidationError({"timestamp_granularities": [fault]})


def ask_transcription(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    [of] = body.get("timestamp_granularities", ["segment"])
    times = "none" if body["response_format"] in ("json", "text") else _TIMES[of]
    return body["file"], {"return_timestamps": times}


def ask_translation(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    input_, options = ask_transcription(body, spec)
    return input_, {"task": "translate", **options}


def answer_text(order: Order, output: Any, metadata: Mapping[str, Any]) -> Any:
    return _WRITERS[order.body["response_format"]](output, metadata)


def _json(output: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": output, "usage": _usage(metadata)}


def _verbose(output: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Times as the model tells them; there are no log probabilities to go with them."""
    answer = {
        "task": metadata["options"]["task"],
        "language": metadata.get("language"),
        "duration": metadata["usage"]["audio_seconds"],
        "text": output["text"],
        "usage": _usage(metadata),
    }
    if "segments" in output:
        answer["segments"] = [{"id": i, **one} for i, one in enumerate(output["segments"])]
    else:
        answer["words"] = [
            {"word": one["text"], "start": one["start"], "end": one["end"]}
            for one in output["words"]
        ]
    return answer


def _srt(output: Any, metadata: Mapping[str, Any]) -> Page:
    blocks = [
        f"{number}\n{_clock(one['start'], ',')} --> {_clock(one['end'], ',')}\n{one['text']}\n\n"
        for number, one in enumerate(output["segments"], 1)
    ]
    return Page("".join(blocks))


def _vtt(output: Any, metadata: Mapping[str, Any]) -> Page:
    blocks = [
        f"{_clock(one['start'], '.')} --> {_clock(one['end'], '.')}\n{one['text']}\n\n"
        for one in output["segments"]
    ]
    return Page("WEBVTT\n\n" + "".join(blocks), "text/vtt")


def _text(output: Any, metadata: Mapping[str, Any]) -> Page:
    return Page(output)


_WRITERS = {"json": _json, "text": _text, "verbose_json": _verbose, "srt": _srt, "vtt": _vtt}


def _clock(seconds: float, mark: str) -> str:
    """``01:02:03,456``"""
    whole, ms = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{ms:03}"


def _usage(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "duration", "seconds": metadata["usage"]["audio_seconds"]}


SPEECH = Route(
    path="/v1/audio/speech",
    types=("text-to-speech",),
    body=SpeechBody,
    main="input",
    ask=ask_speech,
    answer=answer_speech,
    names={"format": "response_format"},
)
TRANSCRIPTIONS = Route(
    path="/v1/audio/transcriptions",
    types=("automatic-speech-recognition",),
    body=TranscriptionBody,
    main="file",
    ask=ask_transcription,
    answer=answer_text,
    form=True,
    names={"return_timestamps": "response_format"},
)
TRANSLATIONS = Route(
    path="/v1/audio/translations",
    types=("automatic-speech-recognition",),
    body=TranslationBody,
    main="file",
    ask=ask_translation,
    answer=answer_text,
    form=True,
    names={"return_timestamps": "response_format", "task": "model"},
)
