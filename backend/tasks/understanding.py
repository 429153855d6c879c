"""Text in, vectors, labels, spans and scores out."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, validates

from backend.schemas import Boolean, Choice, Integer, ListOf, ObjectOf, StrictSchema, Text
from backend.tasks.base import TRUNCATE, Options, Task, about


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
    hypothesis_template = Text(
        load_default="This example is {}.", metadata=about("a sentence with {} for the label")
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)

    @validates("hypothesis_template")
    def _has_a_place(self, value: str, **kwargs: Any) -> None:
        if "{}" not in value:
            raise ValidationError("must have {} where the label goes")


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
)
