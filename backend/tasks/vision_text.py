"""Pictures in, texts out: captions, replies to messages with pictures, answers to questions."""

from __future__ import annotations

from typing import Any

from backend.media.parts import ImageField
from backend.schemas import (
    Boolean,
    ByType,
    Choice,
    Integer,
    ListOf,
    ObjectOf,
    StrictSchema,
    StringOr,
    Text,
)
from backend.tasks import usage
from backend.tasks.base import TRUNCATE, Options, Task, about
from backend.tasks.examples import PICTURE
from backend.tasks.text import GenerationOptions, Message, ThinkingOptions, ToolsInput


class PictureTextOptions(GenerationOptions):
    """A picture cannot be cut as a text can, so there is no ``truncate``."""

    class Meta(StrictSchema.Meta):
        exclude = ("truncate",)


class PictureChatOptions(PictureTextOptions, ThinkingOptions):
    pass


class TextPart(StrictSchema):
    type = Choice(["text"], required=True)
    text = Text(blank=True, required=True)


class ImagePart(StrictSchema):
    type = Choice(["image"], required=True)
    image = ImageField(required=True)


class ContentField(StringOr):
    """A text by itself or a list of parts; either way loaded as the list."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        return [{"type": "text", "text": value}] if type(value) is str else value


class PictureMessage(Message):
    content = ContentField(
        ListOf(ByType({"text": TextPart, "image": ImagePart}), low=1, high=100),
        expected="a string, or a list of parts of type text or image",
    )


class PictureChatInput(ToolsInput):
    messages = ListOf(ObjectOf(PictureMessage), low=1, high=1000, required=True)


class QuestionInput(StrictSchema):
    image = ImageField(required=True)
    question = Text(required=True)


class QuestionOptions(Options):
    """A model either chooses among the answers it knows, or writes one."""

    top_k = Integer(
        low=1,
        high=1000,
        load_default=None,
        allow_none=True,
        metadata=about("how many answers a model that chooses gives; 5 if not set"),
    )
    max_tokens = Integer(
        low=1,
        high=512,
        load_default=None,
        allow_none=True,
        metadata=about("most tokens for a model that writes; 20 if not set"),
    )
    truncate = Boolean(load_default=False, metadata=TRUNCATE)


IMAGE_TO_TEXT = Task(
    name="image-to-text",
    makes=usage.seen_completion,
    input=ImageField(),
    options=PictureTextOptions,
    output="the caption, a string",
    example=(PICTURE, {"max_tokens": 30}),
)
IMAGE_TEXT_TO_TEXT = Task(
    name="image-text-to-text",
    makes=usage.seen_completion,
    input=ObjectOf(PictureChatInput),
    options=PictureChatOptions,
    output="the reply, a string",
    example=(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": PICTURE},
                        {"type": "text", "text": "Which colours are these?"},
                    ],
                }
            ]
        },
        {"max_tokens": 60},
    ),
)
VISUAL_QUESTION_ANSWERING = Task(
    name="visual-question-answering",
    makes=usage.completion,
    input=ObjectOf(QuestionInput),
    options=QuestionOptions,
    output=(
        'the answers likeliest first, a list of {"answer", "score"}; '
        "an answer that was written has no score: null"
    ),
    example=({"image": PICTURE, "question": "Which colour is on the left?"}, {}),
)
