"""POST /v1/images/generations and /v1/images/edits: pictures out, in base64."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from marshmallow import ValidationError

from backend.errors import InvalidRequest, echoed
from backend.openai.base import Body, File, Only, Option, Order, Route
from backend.registry import ModelSpec
from backend.schemas import Text


class Size(Text):
    """``1024x768``, loaded as the pair; ``auto`` as None."""

    expected = "a size such as 1024x1024, or auto"

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        value = super()._deserialize(value, attr, data, **kwargs)
        if value == "auto":
            return None
        found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value, re.ASCII)
        if found is None:
            raise ValidationError(f"must be {self.expected}, not {echoed(value)}")
        return int(found[1]), int(found[2])


class GenerationBody(Body):
    prompt = Text(blank=True, required=True)
    n = Option("num_images")
    size = Size()
    output_format = Option("format")
    response_format = Only("b64_json")
    quality = Only("auto")
    background = Only("auto")
    moderation = Only("auto")
    stream = Only(False)


class EditBody(GenerationBody):
    image = File(required=True)
    mask = File()


def ask_generation(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    return body["prompt"], _sides(body)


def ask_edit(body: dict[str, Any], spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    input_ = {"prompt": body["prompt"], "image": body["image"]}
    if "mask" in body:
        if spec.type != "inpainting":
            fault = f"is for models of type inpainting, and this one's is {spec.type}"
            raise InvalidRequest.of({"mask": fault})
        # OpenAI's masks are see-through where to paint, ours are white there.
        input_["mask"] = replace(body["mask"], see_through_is_white=True)
    return input_, _sides(body)


def _sides(body: Mapping[str, Any]) -> dict[str, Any]:
    size = body.get("size")
    return {"width": size[0], "height": size[1]} if size else {}


def answer(order: Order, output: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    applied = metadata["options"]
    pictures = output if type(output) is list else [output]
    # OpenAI has no word for a picture that the checkpoint's own checker blacked out.
    flagged = {"flagged": True} if metadata.get("flagged") else {}
    return {
        "created": int(time.time()),
        "data": [{"b64_json": picture.to_json()["data"]} for picture in pictures],
        "output_format": applied["format"],
        "size": f"{applied['width']}x{applied['height']}",
        **flagged,
    }


_SIDES = {"width": "size", "height": "size"}

GENERATIONS = Route(
    path="/v1/images/generations",
    types=("text-to-image",),
    body=GenerationBody,
    main="prompt",
    ask=ask_generation,
    answer=answer,
    names=_SIDES,
)
EDITS = Route(
    path="/v1/images/edits",
    types=("image-to-image", "inpainting"),
    body=EditBody,
    main="image",
    ask=ask_edit,
    answer=answer,
    form=True,
    names=_SIDES,
)
