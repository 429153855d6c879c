"""The tasks on offer. A new one is one ``Task``, one line here and one adapter."""

from __future__ import annotations

from backend.tasks.base import Options, Task
from backend.tasks.echo import ECHO
from backend.tasks.images import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE
from backend.tasks.text import (
    CHAT,
    SUMMARIZATION,
    TEXT2TEXT_GENERATION,
    TEXT_GENERATION,
    TRANSLATION,
)
from backend.tasks.understanding import (
    EMBEDDINGS,
    FILL_MASK,
    QUESTION_ANSWERING,
    RERANK,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    ZERO_SHOT_CLASSIFICATION,
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
    )
}
