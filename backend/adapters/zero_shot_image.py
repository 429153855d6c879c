"""Labels that the caller names, judged by how near their texts are to a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.transformers_base import TransformersAdapter
from backend.adapters.vision_base import as_picture, of_one_shape, process, stack
from backend.errors import CraneError, InvalidRequest

MAX_SENTENCES = 256  # of one run


class ZeroShotImageClassifier(TransformersAdapter):
    """Compares pictures with texts: CLIP, SigLIP and their kin.

    Not through transformers' pipeline, which takes one set of labels for a whole batch. These
    models read pictures and texts apart from each other and compare each with each, so here all
    callers' run together, a text that several have only once.
    """

    auto_class = "AutoModelForZeroShotImageClassification"

    def load(self) -> None:
        import transformers

        super().load()
        trust = {k: v for k, v in self.spec.load_kwargs.items() if k == "trust_remote_code"}
        weights, revision = self.weights
        self.processor = transformers.AutoImageProcessor.from_pretrained(
            weights, **revision, **trust
        )
        # SigLIP has learned to judge each text by itself, of 64 tokens with their padding.
        self._each_by_itself = "siglip" in self.model.config.model_type
        self._padding: dict[str, Any] = {"padding": True}
        if self._each_by_itself:
            self.window = 64
            self._padding = {"padding": "max_length", "max_length": self.window}

    def unload(self) -> None:
        del self.processor
        super().unload()

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return 256

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: dict[int, Prediction | CraneError] = {}
        features: dict[int, dict[str, Any]] = {}
        sentences: dict[int, list[str]] = {}
        # Not str.format, which would follow a template's {0.__class__} into our objects.
        template = batch.options["hypothesis_template"]
        for place, value in enumerate(batch.inputs):
            if batch.cancelled(place):
                results[place] = too_late()
                continue
            try:
                texts = [
                    self.readable(template.replace("{}", label), f"input.labels[{number}]")
                    for number, label in enumerate(value["labels"])
                ]
                result = self._fit(texts, batch.options["truncate"])
                picture = as_picture(value["image"], "input.image")
                features[place] = process(self.processor, picture, "input.image")
            except InvalidRequest as error:
                results[place] = error
            else:
                results[place], sentences[place] = result, texts
        for group in self._runs(features, sentences):
            if not (places := batch.waited_for(group)):
                continue
            scores = self._scores(
                [features[place] for place in places], [sentences[place] for place in places]
            )
            for place, mine in zip(places, scores, strict=True):
                pairs = zip(batch.inputs[place]["labels"], mine, strict=True)
                ranked = sorted(pairs, key=lambda pair: -pair[1])
                prediction = results[place]
                assert isinstance(prediction, Prediction)
                prediction.output = [{"label": label, "score": score} for label, score in ranked]
        return [results[place] for place in range(len(batch))]

    def _fit(self, texts: list[str], truncate: bool) -> Prediction:
        """A prediction still without output; raises ``InvalidRequest`` for a label too long."""
        counts = self.count_tokens(texts)
        window = self.window or max(counts)
        if max(counts) <= window:
            return Prediction(None, {"images": 1, "input_tokens": sum(counts)})
        if not truncate:
            longest = counts.index(max(counts))
            raise self.too_long(counts[longest], f"input.labels[{longest}]")
        used = sum(min(count, window) for count in counts)
        return Prediction(None, {"images": 1, "input_tokens": used}, {"truncated": True})

    def _runs(
        self, features: Mapping[int, Any], sentences: Mapping[int, list[str]]
    ) -> Iterator[list[int]]:
        """Places that run together: of one shape, and with no more texts than a run takes."""
        for places in of_one_shape(features):
            run: list[int] = []
            texts: set[str] = set()
            for place in places:
                if run and len(texts | set(sentences[place])) > MAX_SENTENCES:
                    yield run
                    run, texts = [], set()
                run.append(place)
                texts |= set(sentences[place])
            yield run

    def _scores(
        self, pictures: list[Mapping[str, Any]], sentences: list[list[str]]
    ) -> list[list[float]]:
        import torch

        distinct = {text: 0 for texts in sentences for text in texts}
        columns = {text: column for column, text in enumerate(distinct)}
        encoded = self.tokenizer(
            list(distinct),
            truncation=self.window is not None,
            return_tensors="pt",
            **self._padding,
        ).to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**encoded, **stack(pictures, self.model)).logits_per_image
        logits = logits.float().cpu()
        scores = []
        for row, texts in zip(logits, sentences, strict=True):
            mine = row[[columns[text] for text in texts]]
            scores.append((mine.sigmoid() if self._each_by_itself else mine.softmax(-1)).tolist())
        return scores
