"""Tasks that transformers has a pipeline for and that need no adapter of their own.

Each is an entry of the table at the end; ``backend.adapters.generic`` serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.media.images import encode_image
from backend.media.parts import AudioField, ImageField, VideoField
from backend.schemas import ObjectOf, Text
from backend.tasks.base import Check, Options, Task, one_sequence
from backend.tasks.examples import PICTURE, SOUND
from backend.tasks.generic_inputs import (
    DecisionInput,
    DocumentInput,
    DocumentOptions,
    FindInput,
    FindOptions,
    ImageFeatureOptions,
    ImagePair,
    LabelOptions,
    MaskOptions,
    MatchOptions,
    SoundLabelsInput,
    SoundLabelsOptions,
    SoundOptions,
    TableInput,
    TableOptions,
    TextFeatureOptions,
    a_thousand_points,
    state_for_each_question,
)
from backend.tasks.vision import labels_in_templates

# Tasks of transformers' pipelines that no model of this service can have, and why.
NOT_SERVED = {
    "any-to-any": "its input is a chat in the library's own form with any number of pictures, "
    "sounds and films; chat and image-text-to-text take what of it can be said here",
}


def dump_generic(output: Any, options: Mapping[str, Any], check: Check) -> Any:
    """Pictures and masks, which are the arrays of uint8, as PNG files."""
    if isinstance(output, np.ndarray):
        check()
        return encode_image(output, "png") if output.dtype == np.uint8 else output
    if isinstance(output, dict):
        return {key: dump_generic(value, options, check) for key, value in output.items()}
    if isinstance(output, list):
        return [dump_generic(value, options, check) for value in output]
    return output


# 1 s of 16 x 16 pixels, of which more and more are red: WebM, 4 frames.
_FILM = (
    "GkXfo59ChoEBQveBAULygQRC84EIQoKEd2VibUKHgQJChYECGFOAZwEAAAAAAAHSEU2bdLpNu4tTq4QVSalmU6yBoU27i1"
    "OrhBZUrmtTrIHGTbuMU6uEElTDZ1OsggEJTbuMU6uEHFO7a1OsggG87AEAAAAAAABZAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAVSa"
    "lmoCrXsYMPQkBNgIRMYXZmV0GETGF2ZkSJiECPQAAAAAAAFlSua76uAQAAAAAAADXXgQFzxYgAAAAAAAAAAZyBACK1nIN1"
    "bmSIgQCGhVZfVlA5g4EBI+ODhA7msoDghrCBELqBEBJUw2e1c3OyY8CLY8WIAAAAAAAAAAFnyKFFo4hEVVJBVElPTkSHkz"
    "AwOjAwOjAxLjAwMDAwMDAwMAAfQ7Z19OeBAKOvgQAAgIJJg0IAAPAA9gA4JBwY9gAAICAATIf/q/T9G0Zjrf6nhlXqUv97"
    "CvxpNLCjlIEA+gCGAECSHABZAAADIAAAS6Amo5OBAfQAhgBAkpwAWAAAAyAAAEJAo5OBAu4AhgBAkhwAWQAAAyAAAEJAHF"
    "O7a5G7j7OBALeK94EB8YIBQ/CBAw=="
)
_LABELS = 'the labels likeliest first, a list of {"label", "score"}'

_EXPAND = {
    "zero-shot-audio-classification": labels_in_templates,
    "zero-shot-object-detection": labels_in_templates,
    "decision": state_for_each_question,
    "mask-generation": a_thousand_points,
}

GENERIC = [
    Task(
        name=name,
        input=input_,
        options=options,
        output=output,
        example=example,
        dump=dump_generic,
        expand=_EXPAND.get(name, one_sequence),
    )
    for name, input_, options, output, example in (
        (
            "audio-classification",
            AudioField(rate=None),
            SoundOptions,
            _LABELS,
            (SOUND, {"top_k": 3}),
        ),
        (
            "zero-shot-audio-classification",
            ObjectOf(SoundLabelsInput),
            SoundLabelsOptions,
            _LABELS,
            ({"audio": SOUND, "labels": ["a flute", "rain"]}, {}),
        ),
        (
            "video-classification",
            VideoField(max_frames=64),
            LabelOptions,
            f"{_LABELS}; of frames that are evenly spaced over the film",
            (_FILM, {"top_k": 3}),
        ),
        (
            "mask-generation",
            ImageField(),
            MaskOptions,
            'all that can be cut out, best first, a list of {"score", "box", "mask"}; a mask is '
            'a PNG of the picture\'s size, {"mime_type", "data"}',
            (PICTURE, {"points_per_crop": 8}),
        ),
        (
            "image-feature-extraction",
            ImageField(),
            ImageFeatureOptions,
            "a vector for each patch, a list of lists of numbers; with pool one vector",
            (PICTURE, {"pool": True}),
        ),
        (
            "feature-extraction",
            Text(),
            TextFeatureOptions,
            "a vector for each token, a list of lists of numbers",
            ("The quick brown fox jumps over the lazy dog.", {}),
        ),
        (
            "zero-shot-object-detection",
            ObjectOf(FindInput),
            FindOptions,
            'the boxes likeliest first, a list of {"label", "score", "box"} in pixels of the '
            "picture that was sent",
            ({"image": PICTURE, "labels": ["a cat", "a sofa"]}, {"threshold": 0.2}),
        ),
        (
            "keypoint-matching",
            ObjectOf(ImagePair),
            MatchOptions,
            'the matches likeliest first, a list of {"keypoint_image_0", "keypoint_image_1", '
            '"score"}; a keypoint is {"x", "y"} in pixels',
            ({"images": [PICTURE, PICTURE]}, {"threshold": 0.5}),
        ),
        (
            "document-question-answering",
            ObjectOf(DocumentInput),
            DocumentOptions,
            'the answers likeliest first, a list of {"answer"}; of a model that reads words also '
            '{"score", "start", "end"}, the first and the last word of it',
            (
                {
                    "image": PICTURE,
                    "question": "What is the total?",
                    "words": [
                        {"text": "Total", "box": [1, 2, 7, 6]},
                        {"text": "$42", "box": [8, 2, 14, 6]},
                    ],
                },
                {},
            ),
        ),
        (
            "table-question-answering",
            ObjectOf(TableInput),
            TableOptions,
            '{"answer"}; of a model that points at cells also {"cells", "coordinates", '
            '"aggregator"}',
            (
                {
                    "table": {
                        "columns": ["Tower", "Metres"],
                        "rows": [["Eiffel", "324"], ["Tokyo", "333"]],
                    },
                    "question": "How tall is the Eiffel tower?",
                },
                {},
            ),
        ),
        (
            "decision",
            ObjectOf(DecisionInput),
            Options,
            "the answer to each question by its name; a choice and a score have the probability "
            "of each option, a noul that of true",
            (
                {
                    "state": "I was charged twice and want my money back.",
                    "questions": [
                        {"name": "refund", "type": "noul", "instructions": "Is it about money?"},
                        {"name": "tone", "type": "choice", "options": ["calm", "angry"]},
                    ],
                },
                {},
            ),
        ),
    )
]
