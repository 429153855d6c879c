"""How each generic task's input becomes a call of its pipeline, and what is checked before.

Each function takes the pipeline, an input and the options; it gives what the pipeline gave, in the
task's words, and facts for the receipt. It raises ``InvalidRequest``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backend.adapters.generic_base import Answer
from backend.adapters.generic_pictures import (
    classify_film,
    cut_out,
    find_objects,
    image_features,
    match_keypoints,
)
from backend.adapters.generic_sounds import classify_sound, judge_sound
from backend.adapters.generic_texts import ask_document, ask_table, decide, text_features


@dataclass(frozen=True)
class Call:
    """How to ask; the packages that the task needs, and those that some checkpoints need.

    ``model_types`` are the kinds of models that can be asked so, where not all are.
    """

    ask: Callable[[Any, Any, Mapping[str, Any]], Answer]
    needs: tuple[str, ...] = ()
    may_need: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


CALLS = {
    "audio-classification": Call(classify_sound, may_need=("torchaudio",)),
    "zero-shot-audio-classification": Call(judge_sound, may_need=("torchaudio", "torchvision")),
    "video-classification": Call(classify_film, may_need=("torchvision",)),
    "mask-generation": Call(cut_out, may_need=("torchvision",)),
    "image-feature-extraction": Call(image_features, may_need=("torchvision", "timm")),
    "feature-extraction": Call(text_features),
    "zero-shot-object-detection": Call(find_objects, may_need=("torchvision", "timm")),
    "keypoint-matching": Call(match_keypoints, may_need=("torchvision",)),
    "document-question-answering": Call(ask_document, may_need=("torchvision", "pytesseract")),
    "table-question-answering": Call(ask_table, needs=("pandas",), model_types=("tapas",)),
    "decision": Call(decide, may_need=("torchvision", "peft")),
}
