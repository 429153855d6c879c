"""Calls of pipelines that look at pictures and films."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.adapters.generic_base import Answer, check_labels
from backend.adapters.masks import best_boxes, mask_of
from backend.errors import InvalidRequest

# Of thresholds that let everything pass come a quarter of a million masks, each with a number or
# more for each of the picture's columns; and their boxes are all compared with each other.
MAX_MASKS = 3 * 64 * 64
MAX_RUNS = 2**24  # some 600 MB
MAX_MASK_PIXELS = 2**30  # a byte each, until they are PNG files


def classify_film(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    """Not through the pipeline's own decoding, which reads paths and URLs, and the first frames."""
    frames, wanted = value["frames"], pipeline.model.config.num_frames
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
    pixels = value.shape[0] * value.shape[1]
    runs: list[Any] = []
    found: dict[str, list[Any]] = {"iou_scores": [], "boxes": []}
    lengths = 0
    for inputs in pipeline.preprocess(
        picture(value),
        # Each point has 3 masks of the picture's size in float32: a gigabyte of them at most.
        points_per_batch=max(1, min(64, 2**28 // (3 * pixels))),
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
    if len(kept) > (most := max(1, MAX_MASK_PIXELS // pixels)):
        fault = f"leads to {len(kept)} masks; at most {most} of a picture so large are given"
        raise InvalidRequest.of({"options.top_k": fault})
    return [
        {
            "score": scores[index],
            "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), boxes[index].tolist(), strict=True)),
            "mask": mask_of(runs[index]),
        }
        for index in kept
    ], {}


def image_features(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    outputs = pipeline.forward(pipeline.preprocess(picture(value)))
    if options["pool"] and outputs.get("pooler_output") is None:
        raise InvalidRequest.of({"options.pool": "is not something this model can be asked"})
    return pipeline.postprocess(outputs, pool=options["pool"], return_tensors=True)[0], {}


def find_objects(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    check_labels(pipeline, value["labels"])
    found = pipeline(
        picture(value["image"]),
        candidate_labels=value["labels"],
        threshold=options["threshold"],
        top_k=options["top_k"],
    )
    return found, {}


def match_keypoints(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    pair = [picture(image) for image in value["images"]]
    return pipeline(pair, threshold=options["threshold"]), {}


def picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)
