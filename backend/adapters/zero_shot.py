"""Labels that the caller names, judged by a model of entailment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.transformers_base import TransformersAdapter
from backend.errors import CraneError, InvalidRequest, ModelUnavailable

if TYPE_CHECKING:
    pass


class ZeroShotClassifier(TransformersAdapter):
    """Scores labels by whether the text entails a sentence with the label in it.

    Not through transformers' pipeline, which takes one set of labels for a whole batch: here the
    pairs of all callers run together.
    """

    auto_class = "AutoModelForSequenceClassification"

    def load(self) -> None:
        super().load()
        labels = {name.lower(): index for name, index in self.model.config.label2id.items()}
        entails = [index for name, index in labels.items() if name.startswith("entail")]
        if not entails:
            raise ModelUnavailable("It has no label 'entailment', so it cannot judge new labels.")
        self._entailment = entails[0]
        self._contradiction = 0 if self._entailment else -1

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return super().size(value["text"], options) * len(value["labels"])

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: list[Prediction | CraneError] = []
        pairs: list[tuple[str, str]] = []
        owners: list[int] = []
        for place, value in enumerate(batch.inputs):
            # Not str.format, which would follow a template's {0.__class__} into our objects.
            if batch.cancelled(place):
                results.append(too_late())
                continue
            template = batch.options["hypothesis_template"]
            try:
                text = self.readable(value["text"], "input.text")
                hypotheses = [
                    self.readable(template.replace("{}", label), f"input.labels[{number}]")
                    for number, label in enumerate(value["labels"])
                ]
            except InvalidRequest as error:
                results.append(error)
                continue
            result = self._fit(text, hypotheses, batch.options["truncate"])
            results.append(result)
            if isinstance(result, Prediction):
                pairs += [(text, hypothesis) for hypothesis in hypotheses]
                owners += [place] * len(hypotheses)
        if not pairs:
            return results
        logits, start = self._logits(pairs, batch, owners), 0
        for value, result in zip(batch.inputs, results, strict=True):
            if isinstance(result, Prediction):
                span = slice(start, start := start + len(value["labels"]))
                scores = self._scores(logits[span], batch.options["multi_label"])
                ranked = sorted(zip(value["labels"], scores, strict=True), key=lambda p: -p[1])
                result.output = [{"label": label, "score": score} for label, score in ranked]
        return results

    def _fit(self, text: str, hypotheses: list[str], truncate: bool) -> Prediction | CraneError:
        """A prediction still without output, or why there can be none."""
        bare = [
            len(ids)
            for ids in self.tokenizer([text, *hypotheses], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        ]
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        tokens = [bare[0] + count + special for count in bare[1:]]
        if self.window is None or max(tokens) <= self.window:
            return Prediction(None, {"input_tokens": sum(tokens)})
        longest = max(range(len(hypotheses)), key=lambda i: bare[1 + i])
        if bare[1 + longest] + special >= self.window:
            fault = f"leaves no room for the text in the model's window of {self.window} tokens"
            return InvalidRequest.of({f"input.labels[{longest}]": fault})
        if not truncate:
            return self.too_long(max(tokens), "input.text")
        used = sum(min(count, self.window) for count in tokens)
        return Prediction(None, {"input_tokens": used}, {"truncated": True})

    def _logits(self, pairs: list[tuple[str, str]], batch: Batch, owners: list[int]) -> Any:
        """Of each pair; what its owner has left before is zeros."""
        import torch

        logits = torch.zeros(len(pairs), self.model.config.num_labels)
        for rows in batch.shares(owners, self.spec.max_batch_size):
            features = self.tokenizer(
                *map(list, zip(*(pairs[row] for row in rows), strict=True)),
                padding=True,
                truncation="only_first" if self.window else False,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                logits[rows] = self.model(**features).logits.float().cpu()
        return logits

    def _scores(self, logits: Any, multi_label: bool) -> list[float]:
        if multi_label or len(logits) == 1:
            pair = logits[:, [self._contradiction, self._entailment]]
            scores: list[float] = pair.softmax(dim=1)[:, 1].tolist()
        else:
            scores = logits[:, self._entailment].softmax(dim=0).tolist()
        return scores
