"""Text in, vectors, labels, spans and scores out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from backend.schemas import Boolean, Choice, Integer, ListOf, ObjectOf, StrictSchema, Text
from backend.tasks.base import TRUNCATE, Expansion, Options, Task, Template, about, expansion


class EmbeddingOptions(Options):
    normalize = Boolean(
        load_default=False,
        metadata=about("scale to length 1; models that do so by themselves always do"),
    )
    dimensions = Integer(
        low=1,
        high=65536,
        load_default=None,
        allow_none=True,
        metadata=about("keep the first so many, for models trained to be cut (Matryoshka)"),
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


MAX_DOCUMENTS = 1000  # of one call to rank


class RerankInput(StrictSchema):
    query = Text(required=True)
    documents = ListOf(Text(blank=True), low=1, high=MAX_DOCUMENTS, required=True)


class RerankOptions(Options):
    top_n = Integer(
        low=1,
        high=1000,
        load_default=None,
        allow_none=True,
        metadata=about("how many of the best to give; all if not set"),
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


class ClassificationOptions(Options):
    top_k = Integer(
        low=1,
        high=10000,
        load_default=None,
        allow_none=True,
        metadata=about("how many of the likeliest labels to give; all if not set"),
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


class ZeroShotInput(StrictSchema):
    text = Text(required=True)
    labels = ListOf(Text(), low=1, high=100, required=True)


class ZeroShotOptions(Options):
    multi_label = Boolean(
        load_default=False, metadata=about("score each label by itself; else they sum to 1")
    )
    hypothesis_template = Template("This example is {}.")
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


class TokenClassificationOptions(Options):
    aggregation = Choice(
        ["none", "simple", "first", "average", "max"],
        load_default="simple",
        metadata=about("how the tokens of one entity are joined"),
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


class QuestionInput(StrictSchema):
    question = Text(required=True)
    context = Text(required=True)


class QuestionOptions(Options):
    max_answer_tokens = Integer(
        low=1, high=512, load_default=15, metadata=about("longest answer, in tokens")
    )


class FillMaskOptions(Options):
    top_k = Integer(
        low=1, high=1000, load_default=5, metadata=about("how many tokens to give for a mask")
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


def pairs_with_labels(value: Any, options: Mapping[str, Any]) -> Expansion:
    """A text is read with each of its labels, in the template."""
    beside = len(value["text"]) + len(options["hypothesis_template"])
    return expansion([beside + len(label) for label in value["labels"]])


def pairs_with_documents(value: Any, options: Mapping[str, Any]) -> Expansion:
    """A query is read with each of its documents."""
    return expansion([len(value["query"]) + len(one) for one in value["documents"]])


def texts_of_guesses(value: Any, options: Mapping[str, Any]) -> Expansion:
    """Each guess at a mask comes back as a whole text."""
    guesses = max(1, len(re.findall(r"\[MASK\]|<mask>", value))) * options["top_k"]
    return Expansion(1, len(value), guesses * len(value))


EMBEDDINGS = Task(
    name="embeddings",
    input=Text(),
    options=EmbeddingOptions,
    output="the vector, a list of numbers",
    example=("The quick brown fox jumps over the lazy dog.", {}),
)
RERANK = Task(
    name="rerank",
    input=ObjectOf(RerankInput),
    options=RerankOptions,
    output='the documents best first, a list of {"index", "score"}',
    example=(
        {
            "query": "How tall is the Eiffel tower?",
            "documents": ["Paris is in France.", "The tower is 324 metres tall."],
        },
        {"top_n": 1},
    ),
    expand=pairs_with_documents,
)
TEXT_CLASSIFICATION = Task(
    name="text-classification",
    input=Text(),
    options=ClassificationOptions,
    output='the labels likeliest first, a list of {"label", "score"}',
    example=("I loved every minute of it.", {}),
)
ZERO_SHOT_CLASSIFICATION = Task(
    name="zero-shot-classification",
    input=ObjectOf(ZeroShotInput),
    options=ZeroShotOptions,
    output='the labels likeliest first, a list of {"label", "score"}',
    example=(
        {"text": "The match went to penalties.", "labels": ["sport", "politics"]},
        {"multi_label": False},
    ),
    expand=pairs_with_labels,
)
TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    input=Text(),
    options=TokenClassificationOptions,
    output='the entities in order, a list of {"label", "score", "text", "start", "end"}',
    example=("Ada Lovelace was born in London.", {}),
)
QUESTION_ANSWERING = Task(
    name="question-answering",
    input=ObjectOf(QuestionInput),
    options=QuestionOptions,
    output='the span of the context that answers, {"answer", "score", "start", "end"}',
    example=(
        {
            "question": "How tall is the tower?",
            "context": "The tower is 324 metres tall and stands in Paris.",
        },
        {},
    ),
)
FILL_MASK = Task(
    name="fill-mask",
    input=Text(),
    options=FillMaskOptions,
    output='for each mask its likeliest tokens, a list of {"mask", "token", "score", "text"}',
    example=("Paris is the [MASK] of France.", {"top_k": 3}),
    expand=texts_of_guesses,
)
