"""Calls of pipelines that look at pictures and films."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.adapters.generic_base import Answer, check_labels
from backend.adapters.masks import best_boxes, enlarged, mask_of, within
from backend.adapters.vision_base import as_picture
from backend.errors import InvalidRequest

# Of thresholds that let everything pass come a quarter of a million masks, each with a number or
# more for each of the picture's columns; and their boxes are all compared with each other.
MAX_MASKS = 3 * 64 * 64
MAX_RUNS = 2**24  # some 600 MB
MAX_MASK_PIXELS = 2**30  # a byte each, until they are PNG files
# In which masks are made, twice as many for each layer of crops: SAM sees a picture, or a crop, at
# 1024 x 1024. At 25 megapixels the 3 masks of 32 x 32 points were minutes of resizing.
MAX_SEEN = 2**20


def classify_film(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    """Not through the pipeline's own decoding, which reads paths and URLs, and the first frames."""
    frames, wanted = value["frames"], pipeline.model.config.num_frames
    as_picture(frames[0], "input")
    frames = frames[np.linspace(0, len(frames) - 1, wanted).round().astype(int)]
    if pipeline.video_processor is None:
        inputs = pipeline.image_processor(list(frames), return_tensors="pt")
    else:
        inputs = pipeline.video_processor(frames, do_sample_frames=False, return_tensors="pt")
    return pipeline.postprocess(
        pipeline.forward(inputs.to(pipeline.dtype)),
        top_k=options["top_k"] or pipeline.model.config.num_labels,
        function_to_apply=options["function_to_apply"],
    ), {}


def cut_out(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    """All but the pipeline's last step, which would need torchvision to compare boxes."""
    import torch

    names = ("pred_iou_thresh", "stability_score_thresh", "stability_score_offset")
    thresholds = {name: options[name] for name in (*names, "mask_threshold")}
    whole = as_picture(value, "input")
    seen = whole.resize(within(whole.size, MAX_SEEN << options["crops_n_layers"]))
    runs: list[Any] = []
    found: dict[str, list[Any]] = {"iou_scores": [], "boxes": []}
    lengths = 0
    for inputs in pipeline.preprocess(
        seen,
        # Each point has 3 masks of the picture's size in float32: half a gigabyte of them at most.
        points_per_batch=max(1, min(64, 2**27 // (3 * seen.width * seen.height))),
        points_per_crop=options["points_per_crop"],
        crops_n_layers=options["crops_n_layers"],
    ):
        chunk = pipeline.forward(inputs, **thresholds)
        runs += chunk["masks"]
        for name, parts in found.items():
            parts.append(chunk[name])
        lengths += sum(len(one["counts"]) for one in chunk["masks"])
        if len(runs) > MAX_MASKS or lengths > MAX_RUNS:
            fault = "leads to more masks than are compared here; ask about fewer points, or raise"
            fault += " pred_iou_thresh or stability_score_thresh"
            raise InvalidRequest.of({"options.points_per_crop": fault})
    scores, boxes = (torch.cat(parts).float().numpy() for parts in found.values())
    kept = best_boxes(boxes, scores, options["crops_nms_thresh"])[: options["top_k"]]
    if len(kept) > (most := max(1, MAX_MASK_PIXELS // (whole.width * whole.height))):
        fault = f"leads to {len(kept)} masks; at most {most} of a picture so large are given"
        raise InvalidRequest.of({"options.top_k": fault})
    sides = ("xmin", "ymin", "xmax", "ymax")
    scale = np.array([whole.width / seen.width, whole.height / seen.height] * 2)
    return [
        {
            "score": scores[index],
            "box": dict(zip(sides, np.rint(boxes[index] * scale).tolist(), strict=True)),
            "mask": enlarged(mask_of(runs[index]), value.shape[:2]),
        }
        for index in kept
    ], {}


def image_features(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    outputs = pipeline.forward(pipeline.preprocess(as_picture(value, "input")))
    if options["pool"] and outputs.get("pooler_output") is None:
        raise InvalidRequest.of({"options.pool": "is not something this model can be asked"})
    return pipeline.postprocess(outputs, pool=options["pool"], return_tensors=True)[0], {}


def find_objects(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    check_labels(pipeline, value["labels"])
    found = pipeline(
        as_picture(value["image"], "input.image"),
        candidate_labels=value["labels"],
        threshold=options["threshold"],
        top_k=options["top_k"],
    )
    return found, {}


def match_keypoints(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    pair = [
        as_picture(image, f"input.images[{number}]") for number, image in enumerate(value["images"])
    ]
    return pipeline(pair, threshold=options["threshold"]), {}
