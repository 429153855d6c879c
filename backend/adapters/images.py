"""Pictures through diffusers' image pipelines, many callers' in one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.prompts import PromptedAdapter
from backend.errors import CraneError, DeadlineExceeded, InvalidRequest
from backend.tasks.base import MAX_SEED

# Options that go to the pipeline by their own names. One that it does not know is refused.
_PASSED = ("num_inference_steps", "guidance_scale", "strength", "negative_prompt")


@dataclass(slots=True, kw_only=True)
class Picture:
    """One picture to make: for which input, from what, how large, from which seed."""

    place: int
    seed: int
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    media: dict[str, Any] = field(default_factory=dict)  # Pillow's images, by the pipeline's names


class ImageGenerator(PromptedAdapter):
    """Draws pictures from texts."""

    auto_class = "AutoPipelineForText2Image"

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        # 8 x 8 pixels are about as much work as a token; 512 x 512 until the model says more.
        width, height = options["width"] or 512, options["height"] or 512
        return int(options["num_images"] * width * height) // 64

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: dict[int, Prediction | CraneError] = {}
        pictures: list[Picture] = []
        try:
            self._check_options(batch.options)
            self.use_scheduler(batch.options["scheduler"])
        except InvalidRequest as error:
            return [error] * len(batch)
        for place in batch.pending(range(len(batch))):
            try:
                pictures += self._pictures(place, batch.inputs[place], batch)
            except InvalidRequest as error:
                results[place] = error
        made: dict[int, list[np.ndarray]] = defaultdict(list)
        flagged: set[int] = set()
        runs = list(self._runs(pictures))
        for number, planned in enumerate(runs):
            places = batch.waited_for(picture.place for picture in planned)
            if not (run := [picture for picture in planned if picture.place in places]):
                continue
            try:
                with self.interruptible(batch, places, run[0].width * run[0].height):
                    output = self.pipeline(
                        **self._arguments(run, batch.options),
                        **self.steps(batch, places, before=number, of=len(runs)),
                    )
            except DeadlineExceeded:
                continue
            flags = getattr(output, "nsfw_content_detected", None) or [False] * len(run)
            for picture, image, flag in zip(run, output.images, flags, strict=True):
                made[picture.place].append(np.asarray(image))
                flagged |= {picture.place} if flag else set()
        for place, images in made.items():
            results[place] = Prediction(
                images,
                {"images": len(images)},
                {"flagged": True} if place in flagged else {},
                self._applied(images[0], batch.options),
            )
        return [results.get(place) or too_late() for place in range(len(batch))]

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse what this pipeline cannot be asked; raises ``InvalidRequest``."""
        faults = self.not_taken(options, _PASSED)
        strength, steps = (self.applied(options, n) for n in ("strength", "num_inference_steps"))
        if strength is not None and steps is not None and int(steps * strength) < 1:
            faults["options.strength"] = (
                f"is {strength:g}, which leaves none of {steps} num_inference_steps to do"
            )
        multiple = self._multiple()
        for name in ("width", "height"):
            if (options[name] or 0) % multiple:
                faults[f"options.{name}"] = (
                    f"must be a multiple of {multiple} for this model, not {options[name]}"
                )
        if faults:
            raise InvalidRequest.of(faults)

    def _multiple(self) -> int:
        """What a picture's sides are multiples of: a transformer's patch is 2 x 2 latents."""
        factor = int(getattr(self.pipeline, "vae_scale_factor", 8))
        return factor if self.pipeline.components.get("unet") is not None else 2 * factor

    def _pictures(self, place: int, value: dict[str, Any], batch: Batch) -> list[Picture]:
        """What to make of an input; raises ``InvalidRequest``."""
        options = batch.options
        prompt = self.prompt(value, options) or ""
        negative = self.negative_prompt(value, options)
        width, height, media = self._prepare(value, options)
        return [
            Picture(
                place=place,
                seed=((batch.seeds[place] or 0) + number) % (MAX_SEED + 1),
                prompt=prompt,
                negative_prompt=negative,
                width=width,
                height=height,
                media=media,
            )
            for number in range(options["num_images"])
        ]

    def _prepare(
        self, value: dict[str, Any], options: dict[str, Any]
    ) -> tuple[int, int, dict[str, Any]]:
        """The width and height of an input's pictures, and the media that the pipeline gets."""
        own = getattr(self.pipeline, "default_sample_size", None)
        own = own or getattr(self.denoiser.config, "sample_size", None)
        sides = own if isinstance(own, list | tuple) else (own or 64, own or 64)
        height, width = (side * int(self.pipeline.vae_scale_factor) for side in sides)
        return options["width"] or width, options["height"] or height, {}

    def _runs(self, pictures: list[Picture]) -> Iterator[list[Picture]]:
        """Pictures that one run can make: of one size, and no more than memory is meant for."""

        def alike(picture: Picture) -> tuple[int, int, bool]:
            # No negative prompt is not the same as an empty one: SDXL then leaves its vector zero.
            return picture.width, picture.height, picture.negative_prompt is None

        for (width, height, _), group in groupby(sorted(pictures, key=alike), key=alike):
            most = max(1, self.max_batch_tokens * 64 // (width * height))
            run = list(group)
            yield from (run[start : start + most] for start in range(0, len(run), most))

    def _arguments(self, run: list[Picture], options: dict[str, Any]) -> dict[str, Any]:
        import torch

        arguments: dict[str, Any] = {
            "prompt": [picture.prompt for picture in run],
            # The processor's random numbers: a seed starts alike on every device.
            "generator": [torch.Generator("cpu").manual_seed(picture.seed) for picture in run],
            "output_type": "pil",
        }
        for name in run[0].media:
            arguments[name] = [picture.media[name] for picture in run]
        arguments |= {name: options[name] for name in _PASSED if options.get(name) is not None}
        if run[0].negative_prompt is not None:
            arguments["negative_prompt"] = [picture.negative_prompt for picture in run]
        sides = {"width": run[0].width, "height": run[0].height}
        return arguments | {name: side for name, side in sides.items() if name in self.parameters}

    def _applied(self, pixels: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
        """What the options that were left to the model came to."""
        height, width = pixels.shape[:2]
        names = [name for name in _PASSED if name in options and name != "negative_prompt"]
        return {
            **{name: self.applied(options, name) for name in names},
            "width": width,
            "height": height,
            "scheduler": options["scheduler"] or self.own_scheduler(),
        }


class ImageEditor(ImageGenerator):
    """Makes pictures of pictures."""

    auto_class = "AutoPipelineForImage2Image"

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        height, width = value["image"].shape[:2]
        width, height = options["width"] or width, options["height"] or height
        return int(options["num_images"] * width * height) // 64

    def _prepare(
        self, value: dict[str, Any], options: dict[str, Any]
    ) -> tuple[int, int, dict[str, Any]]:
        from PIL import Image

        image = Image.fromarray(value["image"])
        multiple = self._multiple()
        width, height = (
            options[name] or side - side % multiple
            for name, side in zip(("width", "height"), image.size, strict=True)
        )
        most = [self.spec.options_schema.bounds(name)[1] for name in ("width", "height")]
        if not (multiple <= width <= most[0] and multiple <= height <= most[1]):
            fault = (
                f"is {image.width} x {image.height} pixels, and this model makes {multiple} x "
                f"{multiple} to {most[0]} x {most[1]}: set options.width and options.height, "
                "or send another size"
            )
            raise InvalidRequest.of({"input.image": fault})
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        return width, height, {"image": image}


class Inpainter(ImageEditor):
    """Repaints what a mask has in white."""

    auto_class = "AutoPipelineForInpainting"

    def _prepare(
        self, value: dict[str, Any], options: dict[str, Any]
    ) -> tuple[int, int, dict[str, Any]]:
        from PIL import Image

        mask = Image.fromarray(value["mask"])
        height, width = value["image"].shape[:2]
        if mask.size != (width, height):
            fault = f"is {mask.width} x {mask.height} pixels, and the image {width} x {height}"
            raise InvalidRequest.of({"input.mask": f"{fault}: they must be of one size"})
        width, height, media = super()._prepare(value, options)
        if mask.size != (width, height):
            mask = mask.resize((width, height), Image.Resampling.NEAREST)
        return width, height, {**media, "mask_image": mask}
