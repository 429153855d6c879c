"""Pictures out: drawn from a text, made of another picture, repainted where a mask says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, validates_schema

from backend.media import Media
from backend.media.images import IMAGE_FORMATS, encode_image
from backend.media.parts import ImageField
from backend.schemas import (
    Choice,
    Integer,
    Number,
    ObjectOf,
    StrictField,
    StrictSchema,
    Text,
)
from backend.tasks import usage
from backend.tasks.base import Check, Options, Task, about
from backend.tasks.diffusion import cut_prompt, denoising_steps, first_seed, guidance, side, without
from backend.tasks.examples import PICTURE

SCHEDULERS = [
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "heun",
    "pndm",
    "unipc",
]

_SIDE = "in pixels, a multiple of 8; if not set, as the picture that is sent or the model's own"


class ImageOptions(Options):
    """Every picture model's options. What is not set is as the model's own pipeline has it."""

    width = side(_SIDE)
    height = side(_SIDE)
    num_inference_steps = denoising_steps()
    guidance_scale = guidance()
    negative_prompt = without("picture")
    num_images = Integer(
        low=1,
        high=16,
        load_default=1,
        metadata=about("pictures for each input; above 1 the output is a list"),
    )
    scheduler = Choice(
        SCHEDULERS,
        load_default=None,
        allow_none=True,
        metadata=about("the denoising schedule; the model's own if not set"),
    )
    seed = first_seed("picture i of a call")
    format = Choice(
        list(IMAGE_FORMATS), load_default="png", metadata=about("how the pictures are written")
    )
    truncate = cut_prompt()

    @validates_schema
    def _eighths(self, data: dict[str, Any], **kwargs: Any) -> None:
        faults = {
            name: [f"must be a multiple of 8, not {data[name]}"]
            for name in ("width", "height")
            if (data[name] or 0) % 8
        }
        if faults:
            raise ValidationError(faults)


class EditOptions(ImageOptions):
    strength = Number(
        low=0.01,
        high=1.0,
        load_default=None,
        allow_none=True,
        metadata=about("how much of the input is drawn anew; 1 is all of it"),
    )


class Prompt(StrictSchema):
    prompt = Text(required=True)
    negative_prompt = Text(blank=True, load_default=None, allow_none=True)


class PromptField(StrictField):
    """A prompt by itself, or an object with a prompt; either way loaded as the object."""

    type_name = "string or object"
    expected = "a prompt, or an object with a prompt"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schema = Prompt()

    def accepts(self, value: Any) -> bool:
        return type(value) in (str, dict)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if type(value) is str:
            return {"prompt": Text().deserialize(value), "negative_prompt": None}
        return self.schema.load(value)


class EditInput(Prompt):
    image = ImageField(required=True)


class InpaintingInput(EditInput):
    mask = ImageField(mode="L", required=True)


def dump_images(
    pictures: list[Any], options: Mapping[str, Any], check: Check
) -> Media | list[Media]:
    """Pixels of each picture as files: one by itself, several as a list."""
    files = []
    for pixels in pictures:
        check()
        files.append(encode_image(pixels, options["format"]))
    return files[0] if len(files) == 1 else files


_OUTPUT = 'the picture, {"mime_type", "data"}; with num_images above 1, a list'
# The mask of the red half of PICTURE.
_MASK = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQAAAAA3iMLMAAAAD0lEQVR42mP4z8DEQAICADHRAR4LC8lgAAAAAElFTkSu"
    "QmCC"
)

TEXT_TO_IMAGE = Task(
    name="text-to-image",
    makes=usage.images,
    input=PromptField(),
    options=ImageOptions,
    output=_OUTPUT,
    example=("A crane in the morning mist, watercolour.", {"seed": 7}),
    formats=IMAGE_FORMATS,
    dump=dump_images,
)
IMAGE_TO_IMAGE = Task(
    name="image-to-image",
    makes=usage.images,
    input=ObjectOf(EditInput),
    options=EditOptions,
    output=_OUTPUT,
    example=(
        {"prompt": "A lake under a red sky.", "image": PICTURE},
        {"width": 512, "height": 512, "strength": 0.6, "seed": 7},
    ),
    formats=IMAGE_FORMATS,
    dump=dump_images,
)
INPAINTING = Task(
    name="inpainting",
    makes=usage.images,
    input=ObjectOf(InpaintingInput),
    options=EditOptions,
    output=_OUTPUT,
    example=(
        {"prompt": "A red sail.", "image": PICTURE, "mask": _MASK},
        {"width": 512, "height": 512, "seed": 7},
    ),
    formats=IMAGE_FORMATS,
    dump=dump_images,
)
