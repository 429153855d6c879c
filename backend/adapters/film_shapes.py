"""Which films a diffusers pipeline can make: how large, how long, at which rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from backend.adapters.prompts import PromptedAdapter
from backend.errors import InvalidRequest

# Options that go to the pipeline as they are. One that it does not know is refused.
PASSED = ("num_inference_steps", "guidance_scale", "motion_bucket_id")

# What some pipelines call an option.
_NAMES = {
    "fps": ("frame_rate", "target_fps"),  # LTX, I2VGen-XL
    "guidance_scale": ("max_guidance_scale",),  # Stable Video Diffusion: the last frame's
}

# Frames a second of models that are not told, as their authors write them.
_USUAL_FPS = {"WanPipeline": 16, "WanImageToVideoPipeline": 16}
_OTHERS_FPS = 8

# Width x height x frames; ten seconds of 1920 x 1080. A film is kept in float32 for a while.
MAX_FILM_PIXELS = 2**29


@dataclass(slots=True, kw_only=True)
class Shape:
    """What the films of a batch have in common."""

    width: int
    height: int
    num_frames: int
    fps: int


class ShapedAdapter(PromptedAdapter):
    """A pipeline of films; a size or a length that it does not make is refused, never rounded."""

    of_pictures: ClassVar[bool] = False

    def takes(self, name: str) -> bool:
        return super().takes(self.named(name))

    def named(self, option: str) -> str:
        """What the pipeline calls an option."""
        return next((name for name in _NAMES.get(option, ()) if name in self.parameters), option)

    def own(self, options: dict[str, Any], option: str) -> Any:
        """An option's value, the pipeline's own where it is left to it; None if it has none."""
        value = options.get(option)
        return value if value is not None else self.applied({}, self.named(option))

    def shape(self, options: dict[str, Any]) -> Shape:
        """What options lead to; raises ``InvalidRequest``."""
        faults = self.not_taken(options, (*PASSED, "negative_prompt"))
        sides = {name: self._own_side(name) for name in ("width", "height")}
        multiple = self._multiple()
        only = getattr(self.denoiser.config, "use_learned_positional_embeddings", False)
        for name, own in sides.items():
            asked = options[name]
            if asked is None:
                continue
            if asked % multiple:
                fault = f"must be a multiple of {multiple} for this model, not {asked}"
                faults[f"options.{name}"] = fault
            elif only and asked != own:
                faults[f"options.{name}"] = f"must be {own} for this model, not {asked}"
            sides[name] = asked
        if faults:
            raise InvalidRequest.of(faults)
        usual = _USUAL_FPS.get(type(self.pipeline).__name__, _OTHERS_FPS)
        fps = self.own(options, "fps") or usual
        return Shape(**sides, num_frames=self._length(options, fps, **sides), fps=fps)

    def _multiple(self) -> int:
        """What sides are multiples of: the pixels of a latent times the latents of a patch."""
        patch = getattr(self.denoiser.config, "patch_size", None) or 1
        return self._spatial() * int(patch[-1] if isinstance(patch, list | tuple) else patch)

    def _spatial(self) -> int:
        names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
        return self._first_of(names, 8)

    def _first_of(self, names: tuple[str, ...], otherwise: int) -> int:
        """A number that pipelines call differently."""
        found = (getattr(self.pipeline, name) for name in names if hasattr(self.pipeline, name))
        return int(next(found, otherwise))

    def _own_side(self, name: str) -> int:
        """The model's own, within what its entry allows."""
        config = self.denoiser.config
        own = self.applied({}, name)
        if own is None:
            own = (getattr(config, f"sample_{name}", None) or config.sample_size) * self._spatial()
        most = int(self.spec.options_schema.bounds(name)[1])
        return min(int(own), most - most % self._multiple())

    def _length(self, options: dict[str, Any], fps: int, *, width: int, height: int) -> int:
        """How many frames options lead to; raises ``InvalidRequest``."""
        by = "options.num_frames" if options["duration"] is None else "options.duration"
        step = self._frame_step()
        # Of a text, a single frame can be made; of a picture, it would be that picture.
        least = 1 if step == 1 or not self.of_pictures else step + 1
        most = int(self.spec.options_schema.bounds("num_frames")[1])
        if options["duration"] is not None:
            wanted: float = options["duration"] * fps
            frames = max(least, 1 + math.floor((wanted - 1) / step + 0.5) * step)
        elif options["num_frames"] is not None:
            frames = int(options["num_frames"])
        else:
            frames = min(self._own_length(), most - (most - 1) % step)
        fault = None
        if frames < least or (frames - 1) % step:
            low = max(least, frames - (frames - 1) % step)
            near = f"{low} or {low + step}" if low < frames else f"{low}"
            fault = f"must be {step}k + 1 for this model, such as {near}, not {frames}"
        elif frames > most:
            fault = f"is {frames} frames at {fps} a second; at most {most} are allowed"
        elif width * height * frames > MAX_FILM_PIXELS:
            most = MAX_FILM_PIXELS // (width * height)
            fault = f"leads to {frames} frames; at most {most} of {width} x {height} are made"
        if fault is not None:
            raise InvalidRequest.of({by: fault})
        return frames

    def _own_length(self) -> int:
        config = self.denoiser.config
        own = self.own({}, "num_frames") or getattr(config, "num_frames", 0)
        return int(own or getattr(config, "sample_frames", 16))

    def _frame_step(self) -> int:
        """A film has a multiple of it and one frame more, as latents are of several frames each."""
        step = self._first_of(("vae_scale_factor_temporal", "vae_temporal_compression_ratio"), 1)
        # CogVideoX decodes its latents in pairs, and an even number of them to other lengths.
        return 2 * step if type(self.pipeline).__name__.startswith("CogVideoX") else step
