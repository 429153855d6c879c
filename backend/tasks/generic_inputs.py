"""What a caller may send to the tasks of ``backend.tasks.generic``, and ask of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, validates, validates_schema
from marshmallow.validate import Length

from backend.bounds import text_size
from backend.media.parts import AudioField, ImageField
from backend.schemas import Boolean, Choice, Integer, ListOf, Number, ObjectOf, StrictSchema, Text
from backend.tasks.base import TRUNCATE, Expansion, Options, Template, about, expansion

# What a checkpoint's scores are made of, where it does not say so itself.
ACTIVATIONS = ["softmax", "sigmoid", "none"]


def _labels() -> ListOf:
    return ListOf(Text(), low=1, high=100, required=True)


def _top_k(default: int | None, what: str) -> Integer:
    about_it = about(f"how many {what} to give; all if null")
    return Integer(low=1, high=100_000, load_default=default, allow_none=True, metadata=about_it)


def _share(default: float, what: str) -> Number:
    return Number(low=0.0, high=1.0, load_default=default, metadata=about(what))


class LabelOptions(Options):
    top_k = _top_k(5, "of the likeliest labels")
    function_to_apply = Choice(
        ACTIVATIONS,
        load_default=None,
        allow_none=True,
        metadata=about("what makes scores of the model's numbers; as the model says if not set"),
    )


class SoundOptions(LabelOptions):
    truncate = Boolean(
        load_default=False,
        metadata=about("hear the beginning of a sound that is too long, instead of refusing it"),
    )


class SoundLabelsInput(StrictSchema):
    audio = AudioField(rate=None, required=True)
    labels = _labels()


class SoundLabelsOptions(Options):
    hypothesis_template = Template("This is a sound of {}.")
    truncate = Boolean(
        load_default=False,
        metadata=about("hear the beginning of a sound that is too long, instead of refusing it"),
    )


class MaskOptions(Options):
    points_per_crop = Integer(
        low=1, high=64, load_default=32, metadata=about("points that are asked about, each way")
    )
    crops_n_layers = Integer(
        low=0,
        high=2,
        load_default=0,
        metadata=about("how often the picture is looked at in 4 times as many crops"),
    )
    pred_iou_thresh = _share(0.88, "the least score that a mask must have")
    stability_score_thresh = _share(
        0.95, "how little a mask must change where its border is drawn a little off"
    )
    stability_score_offset = Number(
        low=0.0, high=100.0, load_default=1.0, metadata=about("how far off that is")
    )
    mask_threshold = Number(
        low=-100.0, high=100.0, load_default=0.0, metadata=about("from where on a pixel is in")
    )
    crops_nms_thresh = _share(0.7, "how much of two masks' boxes may be the same")
    top_k = _top_k(None, "of the best masks")


class ImageFeatureOptions(Options):
    pool = Boolean(load_default=False, metadata=about("one vector for the whole picture"))


class TextFeatureOptions(Options):
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


class FindInput(StrictSchema):
    image = ImageField(required=True)
    labels = _labels()


class FindOptions(Options):
    threshold = _share(0.1, "the least score that a box must have")
    top_k = _top_k(None, "of the likeliest boxes")


class ImagePair(StrictSchema):
    images = ListOf(ImageField(), low=2, high=2, required=True)


class MatchOptions(Options):
    threshold = _share(0.0, "the least score that a match must have")


class Word(StrictSchema):
    text = Text(required=True)
    box = ListOf(Number(low=0.0, high=1e6), low=4, high=4, required=True)

    @validates("box")
    def _is_upright(self, value: list[float], **kwargs: Any) -> None:
        left, top, right, bottom = value
        if left > right or top > bottom:
            raise ValidationError("must be [left, top, right, bottom]")


class DocumentInput(StrictSchema):
    image = ImageField(required=True)
    question = Text(required=True)
    words = ListOf(ObjectOf(Word), low=1, high=10_000, load_default=None, allow_none=True)


class DocumentOptions(Options):
    top_k = Integer(low=1, high=100, load_default=1, metadata=about("how many answers to give"))
    max_answer_len = Integer(
        low=1, high=512, load_default=15, metadata=about("longest answer, in tokens")
    )
    handle_impossible_answer = Boolean(
        load_default=False, metadata=about("give the empty answer too, with its score")
    )


def _cell() -> Text:
    # A longer one is no cell, and takes minutes to be cut.
    brief = Length(max=10_000, error="must have {max} characters at most")
    return Text(blank=True, validate=brief)


class Table(StrictSchema):
    columns = ListOf(_cell(), low=1, high=1000, required=True)
    rows = ListOf(ListOf(_cell(), low=1, high=1000), low=1, high=100_000, required=True)

    @validates_schema
    def _is_even(self, data: dict[str, Any], **kwargs: Any) -> None:
        columns = len(data["columns"])
        uneven = {
            index: [f"must have {columns} items, one for each column, not {len(row)}"]
            for index, row in enumerate(data["rows"])
            if len(row) != columns
        }
        if uneven:
            raise ValidationError({"rows": uneven})


class TableInput(StrictSchema):
    table = ObjectOf(Table, required=True)
    question = Text(required=True)


class TableOptions(Options):
    truncate = Boolean(
        load_default=False,
        metadata=about("leave the last rows of a table that is too long, instead of refusing it"),
    )


class Question(StrictSchema):
    name = Text(required=True)
    type = Choice(["choice", "score", "noul"], required=True)
    instructions = Text(load_default=None, allow_none=True)
    options = ListOf(Text(), low=1, high=100, load_default=None, allow_none=True)

    @validates_schema
    def _has_options(self, data: dict[str, Any], **kwargs: Any) -> None:
        options = data["options"]
        if data["type"] == "noul" and options is not None:
            raise ValidationError({"options": ["must not be there: noul is true or false"]})
        if data["type"] != "noul" and options is None:
            raise ValidationError({"options": [f"is missing, which a {data['type']} is made of"]})
        if data["type"] == "choice" and len(set(options)) < len(options):
            raise ValidationError({"options": ["must differ from each other"]})


class DecisionInput(StrictSchema):
    state = Text(required=True)
    questions = ListOf(ObjectOf(Question), low=1, high=100, required=True)

    @validates("questions")
    def _have_names(self, value: list[dict[str, Any]], **kwargs: Any) -> None:
        names = [question["name"] for question in value]
        if len(set(names)) < len(names):
            raise ValidationError("must have names that differ from each other")


def a_thousand_points(value: Any, options: Mapping[str, Any]) -> Expansion:
    """Masks are made at 32 x 32 points, if not told otherwise; each so many more are as long."""
    crops = sum(4**layer for layer in range(options["crops_n_layers"] + 1))
    return expansion([0] * math.ceil(crops * options["points_per_crop"] ** 2 / 32**2))


def state_for_each_question(value: Any, options: Mapping[str, Any]) -> Expansion:
    """What is to be decided on is read with each question."""
    return expansion([len(value["state"]) + text_size(one) for one in value["questions"]])
