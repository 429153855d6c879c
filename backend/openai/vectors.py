"""POST /v1/embeddings, and POST /v1/rerank in the shape of Jina's and Cohere's."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.openai.base import Body, Nullable, Option, Order, Route, TextOrTexts, each
from backend.registry import ModelSpec
from backend.schemas import Boolean, Choice, ListOf, ObjectOf, StrictField, Text
from backend.tasks.understanding import MAX_DOCUMENTS


class EmbeddingBody(Body):
    input = TextOrTexts(required=True)
    encoding_format = Choice(["float", "base64"], load_default="float")
    dimensions = Option("dimensions")


def ask_embeddings(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    return body["input"], {}


def answer_embeddings(order: Order, output: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    encode = _ENCODINGS[order.body["encoding_format"]]
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(each(order, output))
    ]
    return {"object": "list", "data": data, "model": order.spec.id, "usage": _usage(metadata)}


def _base64(vector: Any) -> str:
    """Little-endian float32, which OpenAI's client asks for and unpacks by itself."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


_ENCODINGS = {"float": lambda vector: vector, "base64": _base64}


def _usage(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = metadata["usage"].get("input_tokens", 0)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


class Document(Nullable):
    text = Text(blank=True, required=True)


class DocumentField(StrictField):
    """A text, or an object with one; either way loaded as the text."""

    type_name = "string or object"
    expected = "a string, or an object with a text"
    schema = ObjectOf(Document)

    def accepts(self, value: Any) -> bool:
        return type(value) in (str, dict)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        return value if type(value) is str else self.schema.deserialize(value)["text"]


class RerankBody(Body):
    query = Text(blank=True, required=True)
    documents = ListOf(DocumentField(), low=1, high=MAX_DOCUMENTS, required=True)
    top_n = Option("top_n")
    return_documents = Boolean(load_default=False)


def ask_rerank(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    return {"query": body["query"], "documents": body["documents"]}, {}


def answer_rerank(order: Order, output: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    documents = order.body["documents"]
    shown = order.body["return_documents"]
    results = [
        {"index": one["index"], "relevance_score": one["score"]}
        | ({"document": {"text": documents[one["index"]]}} if shown else {})
        for one in output
    ]
    return {
        "id": f"rerank-{metadata['request_id']}",
        "model": order.spec.id,
        "results": results,
        "usage": _usage(metadata),
    }


EMBEDDINGS = Route(
    path="/v1/embeddings",
    types=("embeddings",),
    body=EmbeddingBody,
    main="input",
    ask=ask_embeddings,
    answer=answer_embeddings,
)
RERANK = Route(
    path="/v1/rerank",
    types=("rerank",),
    body=RerankBody,
    main="query",
    ask=ask_rerank,
    answer=answer_rerank,
)
