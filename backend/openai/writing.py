"""What /v1/chat/completions and /v1/completions share: options, usage, facts of a reply."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, validates_schema

from backend.openai.base import Body, Nullable, Only, Option, Stop
from backend.schemas import Boolean, Integer, ObjectOf

MAX_COPIES = 128


class StreamOptions(Nullable):
    include_usage = Boolean()
    include_obfuscation = Only(False)


class Writing(Body):
    n = Integer(low=1, high=MAX_COPIES, load_default=1)
    max_tokens = Option("max_tokens")
    temperature = Option("temperature")
    top_p = Option("top_p")
    stop = Stop("stop")
    seed = Option("seed")
    frequency_penalty = Option("frequency_penalty", idle=(0,))
    presence_penalty = Option("presence_penalty", idle=(0,))
    stream = Boolean(load_default=False)
    stream_options = ObjectOf(StreamOptions)

    @validates_schema
    def _streams(self, data: dict[str, Any], **kwargs: Any) -> None:
        if "stream_options" in data and not data["stream"]:
            raise ValidationError({"stream_options": ["are for a call with stream: true"]})


def head(kind: str, model_id: str, request_id: str) -> dict[str, Any]:
    """What an answer, and each chunk of a stream, begins with."""
    prefix = {"chat.completion": "chatcmpl", "chat.completion.chunk": "chatcmpl"}.get(kind, "cmpl")
    return {
        "id": f"{prefix}-{request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model_id,
    }


def usage(metadata: Mapping[str, Any]) -> dict[str, Any]:
    used = metadata["usage"]
    read, wrote = used.get("input_tokens", 0), used.get("output_tokens", 0)
    counted: dict[str, Any] = {
        "prompt_tokens": read,
        "completion_tokens": wrote,
        "total_tokens": read + wrote,
    }
    if "cached_tokens" in used:
        counted["prompt_tokens_details"] = {"cached_tokens": used["cached_tokens"]}
    if "reasoning_tokens" in used:
        counted["completion_tokens_details"] = {"reasoning_tokens": used["reasoning_tokens"]}
    return counted


def facts(metadata: Mapping[str, Any], place: int, *, batched: bool) -> dict[str, Any]:
    """The receipt's facts of one reply; those that it does not tell are None."""
    names = ("finish_reason", "reasoning_content", "tool_calls", "logprobs")
    found = {name: metadata.get(name) for name in names}
    if batched:
        found = {name: None if one is None else one[place] for name, one in found.items()}
    return found
