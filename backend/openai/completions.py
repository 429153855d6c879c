"""POST /v1/completions: texts in, what follows them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from backend.engine.calls import Event
from backend.openai.base import Only, Order, Route, TextOrTexts, each
from backend.openai.streaming import Style, chunks_of
from backend.openai.writing import Writing, facts, head, usage
from backend.registry import ModelSpec
from backend.schemas import Integer


class CompletionBody(Writing):
    prompt = TextOrTexts(required=True)
    logprobs = Integer(low=0, high=20)
    best_of = Only(1)
    echo = Only(False)
    suffix = Only("")
    logit_bias = Only({})


def ask(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    return body["prompt"], {"top_logprobs": body["logprobs"]} if "logprobs" in body else {}


def logprobs(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """In the shape that this route had before chats had theirs."""
    if told["logprobs"] is None:
        return None
    tokens = [one["token"] for one in told["logprobs"]]
    return {
        "tokens": tokens,
        "token_logprobs": [one["logprob"] for one in told["logprobs"]],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in one["top"]} for one in told["logprobs"]
        ],
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }


def answer(order: Order, output: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    choices = []
    for index, text in enumerate(each(order, output)):
        told = facts(metadata, index, batched=order.batched)
        reason = told["finish_reason"]
        found = {"index": index, "text": text, "logprobs": logprobs(told)}
        choices.append({**found, "finish_reason": reason})
    begun = head("text_completion", order.spec.id, metadata["request_id"])
    return {**begun, "choices": choices, "usage": usage(metadata)}


def _more(text: str, kind: str | None) -> dict[str, Any]:
    return {"text": text, "logprobs": None, "finish_reason": None}


def _last(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"text": "", "logprobs": logprobs(told), "finish_reason": told["finish_reason"]}


_STYLE = Style(kind="text_completion", first=None, more=_more, last=_last)


def chunks(order: Order, events: Iterable[Event | None], request_id: str) -> Iterator[str]:
    return chunks_of(_STYLE, order, events, request_id)


COMPLETIONS = Route(
    path="/v1/completions",
    types=("text-generation",),
    body=CompletionBody,
    main="prompt",
    ask=ask,
    answer=answer,
    names={"top_logprobs": "logprobs"},
    chunks=chunks,
    repeats=True,
)
