"""What the calls of generic tasks have in common."""

from __future__ import annotations

from typing import Any

from backend.adapters.long_texts import or_more, readable
from backend.adapters.transformers_base import model_window
from backend.errors import InvalidRequest

Facts = dict[str, Any]
Answer = tuple[Any, Facts]


def check_labels(pipeline: Any, sentences: list[str]) -> None:
    """Refuse labels that do not fit the model's window, with the template around them."""
    window = model_window(pipeline.model, pipeline.tokenizer)
    if window is None:
        return
    tokens = [
        count_tokens(
            pipeline, readable(sentence, window, pipeline.tokenizer, at=f"input.labels[{place}]")
        )
        for place, sentence in enumerate(sentences)
    ]
    faults = {
        f"input.labels[{place}]": (
            f"has {or_more(count, window)} tokens and the model's window is {window}"
        )
        for place, count in enumerate(tokens)
        if count > window
    }
    if faults:
        raise InvalidRequest.of(faults)


def count_tokens(pipeline: Any, text: str) -> int:
    return len(pipeline.tokenizer(text, verbose=False)["input_ids"])
