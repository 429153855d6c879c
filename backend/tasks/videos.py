"""Films out: drawn from a text, or made of a picture that is its first frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, post_load, validates_schema

from backend.media import Media
from backend.media.parts import ImageField
from backend.media.video import VIDEO_FORMATS, encode_video
from backend.schemas import Choice, Integer, Number, ObjectOf, StrictSchema, Text
from backend.tasks import usage
from backend.tasks.base import Check, Options, Task, about
from backend.tasks.diffusion import cut_prompt, denoising_steps, first_seed, guidance, side, without
from backend.tasks.examples import PICTURE
from backend.tasks.images import PromptField

_SIDE = "in pixels, a multiple of what the model asks for; if not set, the model's own"


class VideoOptions(Options):
    """Every film model's options. What is not set is as the model's own pipeline has it."""

    width = side(_SIDE)
    height = side(_SIDE)
    num_frames = Integer(
        low=1,
        high=1000,
        load_default=None,
        allow_none=True,
        metadata=about("how many frames; a model that makes only some numbers of them says which"),
    )
    duration = Number(
        low=0.1,
        high=60.0,
        load_default=None,
        allow_none=True,
        metadata=about("in seconds, instead of num_frames: the nearest number the model makes"),
    )
    fps = Integer(
        low=1,
        high=60,
        load_default=None,
        allow_none=True,
        metadata=about("frames a second; a model that minds is told, and moves accordingly"),
    )
    num_inference_steps = denoising_steps()
    guidance_scale = guidance("how closely the prompt, or else the picture, is followed")
    negative_prompt = without("film")
    seed = first_seed("input i of a call")
    format = Choice(
        list(VIDEO_FORMATS), load_default="mp4", metadata=about("how the film is written")
    )
    truncate = cut_prompt()

    @validates_schema(pass_original=True)
    def _one_length(self, data: dict[str, Any], original: Any, **kwargs: Any) -> None:
        if original.get("num_frames") is not None and original.get("duration") is not None:
            raise ValidationError({"duration": ["is for a call without num_frames"]})

    @post_load(pass_original=True)
    def _callers_length(self, data: dict[str, Any], original: Any, **kwargs: Any) -> dict[str, Any]:
        """Let what a caller says take the place of the other one in a model's entry."""
        for name, other in (("num_frames", "duration"), ("duration", "num_frames")):
            if original.get(name) is not None:
                data = {**data, other: None}
        return data


class AnimationOptions(VideoOptions):
    motion_bucket_id = Integer(
        low=0,
        high=255,
        load_default=None,
        allow_none=True,
        metadata=about("how much moves, for Stable Video Diffusion"),
    )


class AnimationInput(StrictSchema):
    image = ImageField(required=True)
    prompt = Text(load_default=None, allow_none=True)
    negative_prompt = Text(blank=True, load_default=None, allow_none=True)


def dump_video(film: Mapping[str, Any], options: Mapping[str, Any], check: Check) -> Media:
    return encode_video(film["frames"], film["fps"], check)


_OUTPUT = 'the film, {"mime_type", "data"}'

TEXT_TO_VIDEO = Task(
    name="text-to-video",
    makes=usage.video,
    input=PromptField(),
    options=VideoOptions,
    output=_OUTPUT,
    example=("A crane flies over a lake in the morning mist.", {"seed": 7}),
    formats=VIDEO_FORMATS,
    dump=dump_video,
)
IMAGE_TO_VIDEO = Task(
    name="image-to-video",
    makes=usage.video,
    input=ObjectOf(AnimationInput),
    options=AnimationOptions,
    output=_OUTPUT,
    example=({"image": PICTURE}, {"num_frames": 14, "seed": 7}),
    formats=VIDEO_FORMATS,
    dump=dump_video,
)
