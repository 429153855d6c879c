"""Films through the checkpoint's own diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.film_shapes import PASSED, Shape, ShapedAdapter
from backend.adapters.own_draws import own_draws
from backend.adapters.prompts import NOT_ASKED
from backend.adapters.vision_base import as_picture
from backend.errors import CraneError, DeadlineExceeded, InvalidRequest, ModelUnavailable
from backend.registry import ModelSpec

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# Pipelines whose films are the same alone and in a batch with a generator for each. Any other
# makes one at a time: it may draw from the global generator, or take a single picture only.
_BATCHED = ("CogVideoXPipeline", "LTXPipeline", "TextToVideoSDPipeline", "WanPipeline")

# Pipelines for the weights of a checkpoint that names another one: of Wan's, only those that keep
# a time for each frame (2.2 TI2V) can do both.
_ANIMATORS = {"LTXPipeline": "LTXImageToVideoPipeline", "WanPipeline": "WanImageToVideoPipeline"}


@dataclass(slots=True, kw_only=True)
class Film:
    """One film to make: for which input, of what, from which seed."""

    place: int
    seed: int
    prompt: str | None
    negative_prompt: str | None
    image: Image | None


class VideoGenerator(ShapedAdapter):
    """Makes films of texts."""

    auto_class = "DiffusionPipeline"

    @classmethod
    def weights_key(cls, spec: ModelSpec) -> str:
        return spec.id  # the checkpoint's own pipeline, and no other's

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        # 8 x 8 pixels are about as much work as a token; a guess until the model says more.
        width, height = options["width"] or 512, options["height"] or 512
        return int(width * height * (options["num_frames"] or 16)) // 64

    def suited(self, pipeline: Any) -> Any:
        import diffusers

        name = type(pipeline).__name__
        both = name != "WanPipeline" or pipeline.config.expand_timesteps
        if self.of_pictures and name in _ANIMATORS and both:
            pipeline = _with_parts_of(pipeline, getattr(diffusers, _ANIMATORS[name]))
        if name == "I2VGenXLPipeline":
            # It looks for a CLIP encoder's last norm where transformers 4 had it. Not by setattr:
            # a module that is its own part would never be done with moving to a device.
            encoder = pipeline.text_encoder
            vars(encoder).setdefault("text_model", encoder)
        takes = inspect.signature(pipeline.__call__).parameters
        if "num_frames" not in takes or ("image" in takes) != self.of_pictures:
            why = f"Its checkpoint is for a {name}, which does not do {self.spec.type}."
            raise ModelUnavailable(why)
        return pipeline

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        results: dict[int, Prediction | CraneError] = {}
        films: list[Film] = []
        try:
            shape = self.shape(batch.options)
        except InvalidRequest as error:
            return [error] * len(batch)
        for place in batch.pending(range(len(batch))):
            try:
                films.append(self._film(place, batch.inputs[place], batch))
            except InvalidRequest as error:
                results[place] = error
        runs = list(self._runs(films))
        for number, planned in enumerate(runs):
            places = batch.waited_for(film.place for film in planned)
            if not (run := [film for film in planned if film.place in places]):
                continue
            self.use_scheduler(None)
            try:
                # I2VGen-XL draws its picture's latents, and some of LTX's decoders their noise,
                # from the global generator, whatever generator they are given.
                draws = own_draws([run[0].seed], self.device)
                with draws, self.interruptible(batch, places):
                    output = self.pipeline(
                        **self._arguments(run, shape, batch.options),
                        **self.steps(batch, places, before=number, of=len(runs)),
                    )
            except DeadlineExceeded:
                continue
            for film, images in zip(run, output.frames, strict=True):
                frames = np.stack([np.asarray(image) for image in images])
                results[film.place] = Prediction(
                    {"frames": frames, "fps": shape.fps},
                    {
                        "video_frames": len(frames),
                        "video_seconds": round(len(frames) / shape.fps, 3),
                    },
                    applied=self._applied(frames, shape, batch.options),
                )
        return [results.get(place) or too_late() for place in range(len(batch))]

    def _film(self, place: int, value: dict[str, Any], batch: Batch) -> Film:
        """What to make of an input; raises ``InvalidRequest``."""
        prompt = value["prompt"]
        if prompt is not None and not self.takes("prompt"):
            raise InvalidRequest.of({"input.prompt": NOT_ASKED})
        if prompt is None and self.takes("prompt"):
            raise InvalidRequest.of({"input.prompt": "is missing, and this model needs one"})
        image = value.get("image")
        return Film(
            place=place,
            seed=batch.seeds[place] or 0,
            prompt=self.prompt(value, batch.options),
            negative_prompt=self.negative_prompt(value, batch.options),
            image=None if image is None else as_picture(image, "input.image"),
        )

    def _batches(self) -> bool:
        # Some of LTX's decoders draw noise of their own from the global generator.
        noise = getattr(self.pipeline.components["vae"].config, "decoder_inject_noise", ())
        return type(self.pipeline).__name__ in _BATCHED and not any(noise)

    def _runs(self, films: list[Film]) -> Iterator[list[Film]]:
        """Films that one run can make."""
        if not self._batches():
            yield from ([film] for film in films)
            return

        def alike(film: Film) -> bool:
            return film.negative_prompt is None

        for _, run in groupby(sorted(films, key=alike), key=alike):
            yield list(run)

    def _generator(self, seed: int) -> torch.Generator:
        import torch

        # The processor's random numbers: a seed starts alike on every device. But where LTX's
        # decoder is told a time, its noise is drawn on the device, from a generator that is there.
        vae = self.pipeline.components["vae"].config
        there = self.of_pictures and getattr(vae, "timestep_conditioning", False)
        return torch.Generator(self.device if there else "cpu").manual_seed(seed)

    def _arguments(self, run: list[Film], shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "generator": [self._generator(film.seed) for film in run],
            "prompt": [film.prompt for film in run],
            "negative_prompt": [film.negative_prompt for film in run],
        }
        if not self._batches():
            arguments = {name: values[0] for name, values in arguments.items()}
        for name in ("prompt", "negative_prompt"):
            if getattr(run[0], name) is None:
                del arguments[name]
        if run[0].image is not None:
            arguments["image"] = run[0].image
        told = {name: options[name] for name in PASSED if options.get(name) is not None}
        if self.takes("fps"):
            told["fps"] = shape.fps
        arguments |= {self.named(name): value for name, value in told.items()}
        size = {"width": shape.width, "height": shape.height, "num_frames": shape.num_frames}
        return arguments | size | {"output_type": "pil"}

    def _applied(self, frames: np.ndarray, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
        """What the options that were left to the model came to."""
        count, height, width = frames.shape[:3]
        applied = {name: self.own(options, name) for name in PASSED if name in options}
        applied |= {"fps": shape.fps, "width": width, "height": height}
        # A receipt's options repeat the call, and no call has both.
        return applied if options["duration"] is not None else {**applied, "num_frames": count}


class Animator(VideoGenerator):
    """Makes films of pictures."""

    of_pictures = True


def _with_parts_of(pipeline: Any, other: type[Any]) -> Any:
    """Another pipeline of the same parts and settings."""
    takes = inspect.signature(other).parameters
    settings = {name: value for name, value in pipeline.config.items() if name in takes}
    parts = {name: part for name, part in pipeline.components.items() if name in takes}
    return other(**{**settings, **parts})
