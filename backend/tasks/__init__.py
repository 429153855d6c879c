"""The tasks on offer. A new one is one ``Task``, one line here and one adapter."""

from __future__ import annotations

from backend.tasks.base import Options, Task
from backend.tasks.echo import ECHO
from backend.tasks.generic import GENERIC
from backend.tasks.images import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE
from backend.tasks.recognition import AUTOMATIC_SPEECH_RECOGNITION
from backend.tasks.speech import TEXT_TO_AUDIO, TEXT_TO_SPEECH
from backend.tasks.text import (
    CHAT,
    SUMMARIZATION,
    TEXT2TEXT_GENERATION,
    TEXT_GENERATION,
    TRANSLATION,
)
from backend.tasks.three_d import TEXT_TO_3D
from backend.tasks.understanding import (
    EMBEDDINGS,
    FILL_MASK,
    QUESTION_ANSWERING,
    RERANK,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    ZERO_SHOT_CLASSIFICATION,
)
from backend.tasks.videos import IMAGE_TO_VIDEO, TEXT_TO_VIDEO
from backend.tasks.vision import (
    DEPTH_ESTIMATION,
    IMAGE_CLASSIFICATION,
    IMAGE_SEGMENTATION,
    OBJECT_DETECTION,
    ZERO_SHOT_IMAGE_CLASSIFICATION,
)
from backend.tasks.vision_text import (
    IMAGE_TEXT_TO_TEXT,
    IMAGE_TO_TEXT,
    VISUAL_QUESTION_ANSWERING,
)

__all__ = ["TASKS", "Options", "Task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ECHO,
        TEXT_GENERATION,
        CHAT,
        SUMMARIZATION,
        TRANSLATION,
        TEXT2TEXT_GENERATION,
        EMBEDDINGS,
        RERANK,
        TEXT_CLASSIFICATION,
        ZERO_SHOT_CLASSIFICATION,
        TOKEN_CLASSIFICATION,
        QUESTION_ANSWERING,
        FILL_MASK,
        TEXT_TO_IMAGE,
        IMAGE_TO_IMAGE,
        INPAINTING,
        TEXT_TO_VIDEO,
        IMAGE_TO_VIDEO,
        TEXT_TO_3D,
        TEXT_TO_SPEECH,
        TEXT_TO_AUDIO,
        AUTOMATIC_SPEECH_RECOGNITION,
        IMAGE_CLASSIFICATION,
        ZERO_SHOT_IMAGE_CLASSIFICATION,
        OBJECT_DETECTION,
        IMAGE_SEGMENTATION,
        DEPTH_ESTIMATION,
        IMAGE_TO_TEXT,
        IMAGE_TEXT_TO_TEXT,
        VISUAL_QUESTION_ANSWERING,
        *GENERIC,
    )
}
