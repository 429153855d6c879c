"""Labels, boxes and depths of pictures, many callers' in one batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from backend.adapters.base import Adapter, Batch, Prediction, too_late
from backend.adapters.hub import pick_device
from backend.adapters.memory import dtype_name, quantize
from backend.adapters.numbers import check_numbers
from backend.adapters.packing import keep_packed
from backend.adapters.transformers_base import quiet
from backend.adapters.vision_base import as_picture, of_one_shape, process, row_of, stack
from backend.errors import CraneError, InvalidRequest

TOKENS = 512  # of a picture of up to a megapixel: 64 megapixels or less are run together


class PictureModel(Adapter):
    """A model that answers a picture in one pass.

    Pictures whose features have one shape run together: all of them where the processor resizes to
    one size, else those of like sides. Nothing is padded.
    """

    auto_class: ClassVar[str]
    memory_ways = frozenset(("quantize",))

    def load(self) -> None:
        import transformers

        quiet()
        weights, revision = self.weights
        self.device = pick_device(self.device)
        trust = {k: v for k, v in self.spec.load_kwargs.items() if k == "trust_remote_code"}
        self.processor = transformers.AutoImageProcessor.from_pretrained(
            weights, **revision, **trust
        )
        how = {"dtype": self.wanted_dtype(self.device), **revision, **self.spec.load_kwargs}
        auto = getattr(transformers, self.choose_class(weights, {**revision, **trust}))
        model = auto.from_pretrained(weights, **how)
        quantize([model], self.spec.memory, self.device)
        # A device map in the entry's `load` has placed the model already.
        self.model = model if "device_map" in how else model.to(self.device)
        self.model.eval()
        keep_packed(self.model)
        self.dtype = dtype_name(self.model.dtype, self.spec.memory)

    def choose_class(self, weights: str, how: dict[str, Any]) -> str:
        """Transformers' name of the class that loads the model."""
        return self.auto_class

    def unload(self) -> None:
        del self.model, self.processor

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        # The model sees all of them at about one size, but each is resized to that, and answered
        # at its own. Few steps: those of different sizes run apart.
        megapixels = value.shape[0] * value.shape[1] / 2**20
        return TOKENS << max(0, math.ceil(math.log2(megapixels)))

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        import torch

        results: dict[int, Prediction | CraneError] = {}
        features: dict[int, dict[str, Any]] = {}
        try:
            applied = self.applied(batch.options)
        except InvalidRequest as error:
            return [error] * len(batch)
        for place in batch.pending(range(len(batch))):
            try:
                picture = as_picture(batch.inputs[place], "input")
                features[place] = process(self.processor, picture, "input")
            except InvalidRequest as error:
                results[place] = error
        for group in of_one_shape(features):
            if not (places := batch.waited_for(group)):
                continue
            inputs = stack([features[place] for place in places], self.model)
            with torch.inference_mode():
                outputs = self.model(**inputs)
                rows = {place: row for row, place in enumerate(places)}
                for place in batch.pending(places):
                    mine = row_of(outputs, rows[place], len(places))
                    check_numbers(*mine.values())
                    size = batch.inputs[place].shape[:2]
                    prediction = self.answer(mine, size, {**batch.options, **applied})
                    prediction.applied = applied
                    results[place] = prediction
        return [results.get(place) or too_late() for place in range(len(batch))]

    def applied(self, options: dict[str, Any]) -> dict[str, Any]:
        """What options that were left open come to; ``InvalidRequest`` for one that cannot be."""
        return {}

    @abstractmethod
    def answer(self, outputs: Any, size: tuple[int, int], options: dict[str, Any]) -> Prediction:
        """What the model's outputs for one picture say; ``size`` is its height and width."""


class ImageClassifier(PictureModel):
    auto_class = "AutoModelForImageClassification"

    def answer(self, outputs: Any, size: tuple[int, int], options: dict[str, Any]) -> Prediction:
        config, logits = self.model.config, outputs.logits[0]
        several = config.problem_type == "multi_label_classification"
        if config.problem_type == "regression":
            scores = logits
        elif several or len(logits) == 1:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(dim=-1)
        best = scores.topk(min(options["top_k"] or len(scores), len(scores)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        labels = [{"label": config.id2label[index], "score": score} for index, score in found]
        return Prediction(labels, {"images": 1})


class ObjectDetector(PictureModel):
    auto_class = "AutoModelForObjectDetection"

    def answer(self, outputs: Any, size: tuple[int, int], options: dict[str, Any]) -> Prediction:
        [found] = self.processor.post_process_object_detection(
            outputs, threshold=options["threshold"], target_sizes=[size]
        )
        rows = zip(
            found["labels"].tolist(),
            found["scores"].tolist(),
            found["boxes"].int().tolist(),
            strict=True,
        )
        sides = ("xmin", "ymin", "xmax", "ymax")
        objects = [
            {
                "label": self.model.config.id2label[label],
                "score": score,
                "box": dict(zip(sides, box, strict=True)),
            }
            for label, score, box in rows
        ]
        return Prediction(objects, {"images": 1})


class DepthEstimator(PictureModel):
    auto_class = "AutoModelForDepthEstimation"

    def answer(self, outputs: Any, size: tuple[int, int], options: dict[str, Any]) -> Prediction:
        # By position: it is the size of what was sent, and ZoeDepth has another name for it.
        [found] = self.processor.post_process_depth_estimation(outputs, [size])
        depth = found["predicted_depth"].float().numpy().reshape(size)
        low, high = float(depth.min()), float(depth.max())
        shades = np.zeros_like(depth) if high == low else (depth - low) / (high - low)
        facts = {"min_depth": low, "max_depth": high}
        return Prediction((shades * 255).astype(np.uint8), {"images": 1}, facts)
