"""Pictures in; labels, boxes, masks and depths out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.media import Media
from backend.media.images import IMAGE_FORMATS, encode_image
from backend.media.parts import ImageField
from backend.schemas import Boolean, Choice, Integer, ListOf, Number, ObjectOf, StrictSchema, Text
from backend.tasks.base import (
    TRUNCATE,
    Check,
    Expansion,
    Options,
    Task,
    Template,
    about,
    expansion,
)
from backend.tasks.examples import PICTURE

SUBTASKS = ["panoptic", "instance", "semantic"]


class ImageClassificationOptions(Options):
    top_k = Integer(
        low=1,
        high=100_000,
        load_default=5,
        allow_none=True,
        metadata=about("how many of the likeliest labels to give; all if null"),
    )


class ZeroShotImageInput(StrictSchema):
    image = ImageField(required=True)
    labels = ListOf(Text(), low=1, high=100, required=True)


class ZeroShotImageOptions(Options):
    hypothesis_template = Template("This is a photo of {}.")
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


class DetectionOptions(Options):
    threshold = Number(
        low=0.0, high=1.0, load_default=0.5, metadata=about("the least score that a box must have")
    )


def _share(what: str) -> Number:
    return Number(low=0.0, high=1.0, load_default=None, allow_none=True, metadata=about(what))


class SegmentationOptions(Options):
    """A semantic map has no scores, so the three thresholds are not for it."""

    subtask = Choice(
        SUBTASKS,
        load_default=None,
        allow_none=True,
        metadata=about("what is told apart; the first of these that the model can if not set"),
    )
    threshold = _share("the least score that a segment must have; 0.9 if not set")
    mask_threshold = _share("the least share of belief that makes a pixel a mask's; 0.5 if not set")
    overlap_mask_area_threshold = _share(
        "the least share of a mask that those over it must leave; 0.5 if not set"
    )


class DepthOptions(Options):
    format = Choice(
        list(IMAGE_FORMATS), load_default="png", metadata=about("how the picture is written")
    )


def dump_segments(
    found: dict[str, Any], options: Mapping[str, Any], check: Check
) -> list[dict[str, Any]]:
    """A mask for each segment: white where the map of the whole picture has its number."""
    segments = []
    for segment in found["segments"]:
        check()
        mask = np.where(found["map"] == segment["id"], np.uint8(255), np.uint8(0))
        rest = {"label": segment["label"], "score": segment["score"]}
        segments.append({**rest, "mask": encode_image(mask, "png")})
    return segments


def dump_depth(pixels: np.ndarray, options: Mapping[str, Any], check: Check) -> Media:
    return encode_image(pixels, options["format"])


def labels_in_templates(value: Any, options: Mapping[str, Any]) -> Expansion:
    """Each label is read in the template, where there is one."""
    around = len(options.get("hypothesis_template", ""))
    return expansion([around + len(label) for label in value["labels"]])


IMAGE_CLASSIFICATION = Task(
    name="image-classification",
    input=ImageField(),
    options=ImageClassificationOptions,
    output='the labels likeliest first, a list of {"label", "score"}',
    example=(PICTURE, {"top_k": 3}),
)
ZERO_SHOT_IMAGE_CLASSIFICATION = Task(
    name="zero-shot-image-classification",
    input=ObjectOf(ZeroShotImageInput),
    options=ZeroShotImageOptions,
    output='the labels likeliest first, a list of {"label", "score"}',
    example=({"image": PICTURE, "labels": ["a flag", "a cat"]}, {}),
    expand=labels_in_templates,
)
OBJECT_DETECTION = Task(
    name="object-detection",
    input=ImageField(),
    options=DetectionOptions,
    output=(
        "the objects, boxed in pixels of the image, a list of "
        '{"label", "score", "box": {"xmin", "ymin", "xmax", "ymax"}}'
    ),
    example=(PICTURE, {"threshold": 0.7}),
)
IMAGE_SEGMENTATION = Task(
    name="image-segmentation",
    input=ImageField(),
    options=SegmentationOptions,
    output=(
        "the segments, each mask a PNG of the image's size, a list of "
        '{"label", "score", "mask": {"mime_type", "data"}}'
    ),
    example=(PICTURE, {}),
    dump=dump_segments,
)
DEPTH_ESTIMATION = Task(
    name="depth-estimation",
    input=ImageField(),
    options=DepthOptions,
    output='the depths as a grey picture of the image\'s size, {"mime_type", "data"}',
    example=(PICTURE, {}),
    formats=IMAGE_FORMATS,
    dump=dump_depth,
)
