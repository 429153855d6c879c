"""Masks of what is in a picture: of its kinds, of single things, or of both."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from backend.adapters.base import Prediction
from backend.adapters.masks import enlarged, within
from backend.adapters.vision import PictureModel
from backend.errors import InvalidRequest, ModelUnavailable
from backend.tasks.vision import SUBTASKS

# Scores of each of 150 kinds at each pixel are 2.5 GB at this size: a larger picture's map is made
# at it, then enlarged. What the models themselves give has some hundred pixels a side.
MAX_MAP = 2**22
# As the pipeline has them.
THRESHOLDS = {"threshold": 0.9, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.5}


class Segmenter(PictureModel):
    """Makes one map of a picture; which segments it has depends on the ``subtask``."""

    def choose_class(self, weights: str, how: dict[str, Any]) -> str:
        from transformers import AutoConfig
        from transformers.models.auto import modeling_auto

        kind = AutoConfig.from_pretrained(weights, **how).model_type
        for name in ("Universal", "Instance", "Semantic", "Image"):
            table = f"MODEL_FOR_{name.upper()}_SEGMENTATION_MAPPING_NAMES"
            if kind in getattr(modeling_auto, table):
                return f"AutoModelFor{name}Segmentation"
        raise ModelUnavailable(f"It is a {kind} model, which does not segment pictures.")

    def load(self) -> None:
        super().load()
        found = {name: self._post_process(name) for name in SUBTASKS}
        self._subtasks = {name: way for name, way in found.items() if way is not None}
        if not self._subtasks:
            raise ModelUnavailable("Its image processor makes no masks of what the model gives.")

    def _post_process(self, subtask: str) -> Any:
        return getattr(self.processor, f"post_process_{subtask}_segmentation", None)

    def applied(self, options: dict[str, Any]) -> dict[str, Any]:
        subtask = options["subtask"] or next(iter(self._subtasks))
        if subtask not in self._subtasks:
            can = " and ".join(self._subtasks)
            fault = f"is {subtask!r}, and this model can do {can} segmentation only"
            raise InvalidRequest.of({"options.subtask": fault})
        takes = inspect.signature(self._subtasks[subtask]).parameters
        faults = {
            f"options.{name}": f"is not used in this model's {subtask} segmentation"
            for name in THRESHOLDS
            if name not in takes and options[name] is not None
        }
        if faults:
            raise InvalidRequest.of(faults)
        chosen = {
            name: default if options[name] is None else options[name]
            for name, default in THRESHOLDS.items()
            if name in takes
        }
        return {"subtask": subtask, **chosen}

    def answer(self, outputs: Any, size: tuple[int, int], options: dict[str, Any]) -> Prediction:
        post_process = self._subtasks[options["subtask"]]
        takes = inspect.signature(post_process).parameters
        how = {name: options[name] for name in THRESHOLDS if name in takes}
        if "label_ids_to_fuse" in takes:
            how["label_ids_to_fuse"] = set()  # as without, less a warning for each picture
        [found] = post_process(outputs, target_sizes=[within(size, MAX_MAP)], **how)
        names = self.model.config.id2label
        if options["subtask"] == "semantic":
            numbers = found.numpy().astype(np.int16)
            segments = [
                {"id": number, "label": names[number], "score": None}
                for number in np.unique(numbers).tolist()
            ]
        else:
            numbers = found["segmentation"].numpy().astype(np.int16)
            segments = [
                {"id": one["id"], "label": names[one["label_id"]], "score": one["score"]}
                for one in found["segments_info"]
            ]
        return Prediction({"map": enlarged(numbers, size), "segments": segments}, {"images": 1})
