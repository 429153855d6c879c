"""Embeddings and reranking through sentence-transformers, with the model's own pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.adapters.base import Adapter, Batch, Prediction, too_late
from backend.adapters.hub import pick_device
from backend.adapters.long_texts import readable
from backend.adapters.packing import keep_packed
from backend.adapters.transformers_base import MAX_TOKENS, quiet, too_long
from backend.adapters.words import bound_words
from backend.errors import CraneError, DeadlineExceeded, InvalidRequest, ModelUnavailable


class SentenceTransformersAdapter(Adapter):
    """Loads ``class_name`` from the entry's weights."""

    class_name: str
    max_cpu_tokens = 4096

    def load(self) -> None:
        quiet()
        import sentence_transformers

        weights, revision = self.weights
        self.device = pick_device(self.device)
        how = {"dtype": self.wanted_dtype(self.device), **self.spec.load_kwargs}
        self.model: Any = getattr(sentence_transformers, self.class_name)(
            weights, device=self.device, model_kwargs=how, **revision
        )
        self.model.eval()
        bound_words(self.model.tokenizer)
        transformer = self.model.transformers_model
        if transformer is None:
            raise ModelUnavailable("Its first module is no transformer, which Crane needs.")
        keep_packed(transformer, runs=self.model)
        self.dtype = str(transformer.dtype).removeprefix("torch.")
        self.window = self.model.max_seq_length
        if self.window is None or self.window >= 10**9:  # which is a tokenizer's "unknown"
            self.window = self.model.max_seq_length = MAX_TOKENS
        self.prompt: str | None = self.model.prompts.get(self.model.default_prompt_name)

    def unload(self) -> None:
        del self.model

    def readable(self, text: str, at: str = "input") -> str:
        """A text, or as much of a long one as tells that it does not fit; see ``long_texts``."""
        tokenizer = self.model.tokenizer
        from_end = tokenizer.truncation_side == "left"
        return readable(text, self.window, tokenizer, at=at, from_end=from_end)

    def forward(self, inputs: list[Any]) -> tuple[dict[str, Any], list[int]]:
        """Run the model once on all inputs; return its outputs and each input's tokens."""
        import torch

        features = self.model.preprocess(inputs, prompt=self.prompt)
        tokens: list[int] = features["attention_mask"].sum(dim=1).tolist()
        features = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        with torch.inference_mode():
            return self.model(features), tokens

    def overlong(self, inputs: list[Any], tokens: list[int]) -> dict[int, int]:
        """The tokens of each input that was cut to the window.

        Only an input that fills the window can have been cut, so only those are counted again.
        """
        if self.window is None:
            return {}
        full = {i: inputs[i] for i, count in enumerate(tokens) if count >= self.window}
        counts = {}
        for index, value in full.items():
            first, *second = value if isinstance(value, list) else [value]
            texts = [(self.prompt or "") + first, *second]
            ids = self.model.tokenizer(*texts, truncation=False, verbose=False)["input_ids"]
            counts[index] = len(ids)
        return {index: count for index, count in counts.items() if count > self.window}


class Embedder(SentenceTransformersAdapter):
    class_name = "SentenceTransformer"

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        import torch

        wanted, width = batch.options["dimensions"], self.model.get_embedding_dimension()
        if wanted is not None and width is not None and wanted > width:
            return [_too_wide(wanted, width)] * len(batch)
        inputs = [""] * len(batch)
        refused: dict[int, CraneError] = {}
        for place in batch.pending(range(len(batch))):
            try:
                inputs[place] = self.readable(batch.inputs[place])
            except InvalidRequest as error:
                refused[place] = error
        outputs, tokens = self.forward(inputs)
        vectors = outputs["sentence_embedding"].float()[:, :wanted]
        if batch.options["normalize"]:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        rows = vectors.cpu().numpy()
        cut = self.overlong(inputs, tokens)
        truncate = batch.options["truncate"]
        if not truncate:
            refused |= {place: too_long(count, self.window or 0) for place, count in cut.items()}
        return [
            refused.get(index)
            or Prediction(row, {"input_tokens": tokens[index]}, _cut_or_not(index in cut))
            for index, row in enumerate(rows)
        ]


class Reranker(SentenceTransformersAdapter):
    class_name = "CrossEncoder"

    def load(self) -> None:
        super().load()
        if self.model.num_labels != 1:
            raise ModelUnavailable(
                f"It gives {self.model.num_labels} scores for a pair; a reranker gives one."
            )

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return sum(super(Reranker, self).size(text, options) for text in value["documents"])

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: dict[int, Prediction | CraneError] = {}
        owners: list[int] = []
        pairs: list[list[str]] = []
        for place in batch.pending(range(len(batch))):
            try:
                mine = self._pairs(batch, place)
            except (DeadlineExceeded, InvalidRequest) as error:
                results[place] = error
            else:
                owners += [place] * len(mine)
                pairs += mine
        # Pairs of like length run together, whoever asked; at most as many as an entry allows.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        scores, tokens, cut = [0.0] * len(pairs), [0] * len(pairs), dict[int, int]()
        for share in batch.shares([owners[i] for i in order], self.spec.max_batch_size):
            indices = [order[i] for i in share]
            some = [pairs[i] for i in indices]
            outputs, counts = self.forward(some)
            values = self._activate(outputs["scores"])
            for i, score, count in zip(indices, values, counts, strict=True):
                scores[i], tokens[i] = score, count
            cut |= {indices[i]: count for i, count in self.overlong(some, counts).items()}
        for place in dict.fromkeys(owners):
            start, count = owners.index(place), len(batch.inputs[place]["documents"])
            span = range(start, start + count)
            results[place] = self._rank(span, scores, tokens, cut, batch.options)
        return [results.get(place) or too_late() for place in range(len(batch))]

    def _pairs(self, batch: Batch, place: int) -> list[list[str]]:
        """An input's query with each document; raises ``DeadlineExceeded``, ``InvalidRequest``."""
        query = self.readable(batch.inputs[place]["query"], "input.query")
        pairs = []
        for number, document in enumerate(batch.inputs[place]["documents"]):
            batch.check([place])
            pairs.append([query, self.readable(document, f"input.documents[{number}]")])
        return pairs

    def _activate(self, logits: Any) -> list[float]:
        # In float32 as CrossEncoder.predict does it, or close scores would tie.
        scores: list[float] = self.model.activation_fn(logits.float()).flatten().tolist()
        return scores

    def _rank(
        self,
        span: range,
        scores: list[float],
        tokens: list[int],
        cut: dict[int, int],
        options: dict[str, Any],
    ) -> Prediction | CraneError:
        long = [i for i in span if i in cut]
        if long and not options["truncate"]:
            what = f"input.documents[{long[0] - span.start}]"
            return too_long(cut[long[0]], self.window or 0, what)
        best = sorted(span, key=lambda i: -scores[i])[: options["top_n"]]
        output = [{"index": i - span.start, "score": scores[i]} for i in best]
        usage = {"input_tokens": sum(tokens[i] for i in span)}
        return Prediction(output, usage, _cut_or_not(bool(long)))


def _cut_or_not(cut: bool) -> dict[str, Any]:
    return {"truncated": True} if cut else {}


def _too_wide(wanted: int, width: int) -> InvalidRequest:
    return InvalidRequest.of({"options.dimensions": f"must be at most {width}, not {wanted}"})
