"""What every diffusers adapter shares: a pipeline on its device, its schedule, its steps."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import wraps
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backend.adapters.base import Adapter, Batch
from backend.adapters.hub import pick_device
from backend.adapters.interruption import interruptible
from backend.adapters.memory import compile_module, dtype_name, fit, offload, quantize
from backend.adapters.numbers import check_numbers
from backend.adapters.packing import keep_packed
from backend.adapters.previews import Previewer
from backend.adapters.transformers_base import quiet
from backend.engine import libraries
from backend.errors import InvalidRequest, ModelUnavailable
from backend.registry import ModelSpec

if TYPE_CHECKING:
    import torch

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class DiffusersAdapter(Adapter):
    """Loads a checkpoint as ``auto_class`` has it, or takes over one that is loaded."""

    auto_class: ClassVar[str]
    spares_cores = False  # a step is long: a core less costs more than being interrupted
    memory_ways = frozenset(
        ("quantize", "offload", "vae_tiling", "vae_slicing", "attention_slicing", "compile")
    )

    @classmethod
    def weights_key(cls, spec: ModelSpec) -> str:
        how = [spec.weights(), spec.revision, spec.dtype, spec.device, spec.compile]
        return "diffusers " + json.dumps([*how, dict(spec.load_kwargs), dict(spec.memory)])

    def load(self) -> None:
        diffusers = _import_quietly()
        folder, _ = self.weights
        self.device = pick_device(self.device)
        dtype = self.wanted_dtype(self.device)
        kwargs = self.spec.load_kwargs
        pipeline = getattr(diffusers, self.auto_class).from_pretrained(
            folder, dtype=dtype, **kwargs
        )
        pipeline = self.suited(pipeline)
        self._settle(pipeline, pipeline.scheduler)
        quantize(self._learned(), self.spec.memory, self.device)
        self.dtype = dtype_name(dtype, self.spec.memory)
        fit(pipeline, self.spec.memory)
        if "offload" in self.spec.memory:
            offload(pipeline, self.spec.memory["offload"], self.device)
        elif "device_map" not in kwargs:  # which has placed the parts already
            pipeline.to(self.device)
        if self.spec.compile:
            compile_module(self.denoiser, self.device)
        else:
            self.pack()
        decoder = getattr(pipeline.components.get("vae"), "decoder", None)
        if decoder is not None:
            decoder.register_forward_hook(_check_decoded)

    def download(self, repository: str) -> Path:
        with libraries.alone.hold(self.spec.id):
            diffusers = _import_quietly()
        how = {
            name: self.spec.load_kwargs[name]
            for name in ("variant", "use_safetensors")
            if name in self.spec.load_kwargs
        }
        if self.spec.revision:
            how["revision"] = self.spec.revision
        return Path(diffusers.DiffusionPipeline.download(repository, **how))

    def pack(self) -> None:
        """Have the linear layers as a processor's kernels want them: a pixel may differ by 1."""
        for part in self._learned():
            keep_packed(part)

    def suited(self, pipeline: Any) -> Any:
        """The pipeline that does the task with what a checkpoint's own was loaded with.

        Raises ``ModelUnavailable`` where there is none.
        """
        return pipeline

    def wanted_dtype(self, device: str) -> torch.dtype:
        """As for others, but diffusers knows no ``auto``, and would load float32 everywhere."""
        import torch

        dtype = super().wanted_dtype(device)
        if isinstance(dtype, torch.dtype):
            return dtype
        return torch.float32 if device == "cpu" else torch.float16

    def load_beside(self, loaded: Adapter) -> None:
        import diffusers

        assert isinstance(loaded, DiffusersAdapter)
        try:
            pipeline = getattr(diffusers, self.auto_class).from_pipe(loaded.pipeline)
        except ValueError:
            why = f"Its checkpoint has no pipeline for {self.spec.type}."
            raise ModelUnavailable(why) from None
        self.device, self.dtype, self.revision = loaded.device, loaded.dtype, loaded.revision
        self._settle(pipeline, loaded._scheduler)
        if "offload" in self.spec.memory:
            offload(pipeline, self.spec.memory["offload"], self.device)

    def _settle(self, pipeline: Any, scheduler: Any) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self._scheduler = scheduler  # as it was loaded; a run gets one made of its settings

    def unload(self) -> None:
        del self.pipeline, self._scheduler

    @property
    def denoiser(self) -> torch.nn.Module:
        """The part that runs at each step."""
        parts = self.pipeline.components
        module: torch.nn.Module = parts.get("unet") or parts["transformer"]
        return module

    def _learned(self) -> list[torch.nn.Module]:
        """The denoisers and the text encoders: nearly all of a pipeline's weights."""
        parts = self.pipeline.components
        # Some have a second denoiser, for the last steps.
        others = [
            parts[name] for name in parts if name.startswith(("text_encoder", "transformer_"))
        ]
        return [self.denoiser, *(other for other in others if other is not None)]

    def applied(self, options: dict[str, Any], name: str) -> Any:
        """An option's value, the pipeline's own where it is left to it; None if it has none."""
        if options.get(name) is not None or name not in self.parameters:
            return options.get(name)
        default = self.parameters[name].default
        return None if default is inspect.Parameter.empty else default

    def use_scheduler(self, name: str | None) -> None:
        """Give the pipeline a scheduler without a past; raises ``InvalidRequest``."""
        wanted = {
            known: scheduler
            for scheduler in self._scheduler.compatibles
            for known, class_name in SCHEDULERS.items()
            if scheduler.__name__ == class_name
        }
        if name is not None and name not in wanted:
            takes = f"it takes {', '.join(sorted(wanted))}" if wanted else "it takes its own only"
            fault = f"is {name!r}, which does not suit this model; {takes}"
            raise InvalidRequest.of({"options.scheduler": fault})
        scheduler = wanted[name] if name is not None else type(self._scheduler)
        self.pipeline.scheduler = scheduler.from_config(self._scheduler.config)

    def own_scheduler(self) -> str | None:
        """The name of the checkpoint's own scheduler, where it has one here."""
        own = type(self._scheduler).__name__
        return next((name for name, class_name in SCHEDULERS.items() if class_name == own), None)

    def interruptible(
        self, batch: Batch, places: Collection[int], pixels: int = 0
    ) -> AbstractContextManager[None]:
        """Have a run for ``places`` end within its parts too, as ``steps`` does between steps."""
        return interruptible(self.pipeline, lambda: batch.check(places), pixels=pixels)

    def steps(
        self, batch: Batch, places: Collection[int], *, before: int, of: int
    ) -> dict[str, Any]:
        """The keywords that let a run for ``places`` report its steps.

        It ends with ``DeadlineExceeded`` once nobody waits for any of them. ``before`` of ``of``
        equal runs are done.
        """

        # Of an input's pictures the first is shown.
        rows = {place: row for row, place in reversed(list(enumerate(places)))}
        listening = {place: row for place, row in rows.items() if batch.listens(place)}
        previewer = Previewer(self.pipeline) if "offload" not in self.spec.memory else None

        def step(index: int, latents: Any = None) -> None:
            total = getattr(self.pipeline, "num_timesteps", None)
            total = total or len(self.pipeline.scheduler.timesteps)
            previews = None
            if latents is not None and listening and previewer and previewer.due():
                previews = previewer.see(latents, listening)
            batch.progress(before * total + index + 1, of * total, previews)
            batch.check(places)

        def on_step_end(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step(index, tensors.get("latents"))
            return tensors

        if "callback_on_step_end" in self.parameters:
            return {"callback_on_step_end": on_step_end}
        if "callback" in self.parameters:  # as older pipelines say it
            return {"callback": lambda index, *_: step(index)}
        self._watch_scheduler(step)
        return {}

    def _watch_scheduler(self, step: Callable[[int], None]) -> None:
        """Tell of the steps of a pipeline that has no word for it, by those of its scheduler."""
        scheduler = self.pipeline.scheduler
        own = type(scheduler).step.__get__(scheduler)
        indices = count()

        @wraps(own)  # pipelines look at what it takes
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            step(next(indices))
            return result

        scheduler.step = watched


def _check_decoded(_: Any, __: Any, decoded: Any) -> None:
    """Some overflow in float16, and what came of it would pass for a black picture."""
    # Those of films have their cache beside the pixels.
    check_numbers(decoded[0] if isinstance(decoded, tuple) else decoded)


def _import_quietly() -> Any:
    """diffusers, without what it says about packages that are not there, and about prompts.

    Where a prompt is cut it would write the cut text into the log.
    """
    import transformers

    quiet()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    importlib.import_module("diffusers.pipelines.auto_pipeline")
    transformers.utils.logging.set_verbosity(level)
    return diffusers
