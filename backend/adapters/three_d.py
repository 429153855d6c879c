"""Meshes from texts through diffusers' Shap-E pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.adapters.base import Batch, Prediction, too_late
from backend.adapters.diffusers_base import DiffusersAdapter
from backend.adapters.long_texts import or_more, readable
from backend.errors import CraneError, DeadlineExceeded, InvalidRequest, ModelUnavailable
from backend.registry import ModelSpec

if TYPE_CHECKING:
    import torch


class MeshMaker(DiffusersAdapter):
    """Makes meshes one by one.

    In a batch the last bits of a latent differ, and where the surface's sign hangs on those a
    mesh has other vertices: alone, a seed gives the very same mesh each time.
    """

    auto_class = "DiffusionPipeline"

    @classmethod
    def weights_key(cls, spec: ModelSpec) -> str:
        return spec.id  # the checkpoint's own pipeline, which no other task can take over

    @property
    def denoiser(self) -> torch.nn.Module:
        module: torch.nn.Module = self.pipeline.prior
        return module

    def suited(self, pipeline: Any) -> Any:
        parameters = inspect.signature(pipeline.__call__).parameters
        if not hasattr(pipeline, "shap_e_renderer") or "prompt" not in parameters:
            raise ModelUnavailable("Its checkpoint has no pipeline for text-to-3d.")
        return pipeline

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return 1  # nothing is padded

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        return [self._mesh(batch, place) for place in range(len(batch))]

    def _mesh(self, batch: Batch, place: int) -> Prediction | CraneError:
        import torch

        if batch.cancelled(place):
            return too_late()
        prompt, options = batch.inputs[place], batch.options
        try:
            tokens, window = self._tokens(prompt)
        except InvalidRequest as error:
            return error
        if tokens > window and not options["truncate"]:
            fault = f"has {or_more(tokens, window)} tokens and the model reads {window}; "
            return InvalidRequest.of(
                {"input": f"{fault}shorten it, or set options.truncate to true"}
            )
        names = ("num_inference_steps", "guidance_scale")
        try:
            with self._watched(batch, place):
                [mesh] = self.pipeline(
                    prompt,
                    # The processor's random numbers: a seed starts alike on every device.
                    generator=torch.Generator("cpu").manual_seed(batch.seeds[place] or 0),
                    output_type="mesh",
                    **{name: options[name] for name in names if options[name] is not None},
                    **self.steps(batch, [place], before=place, of=len(batch)),
                ).images
        except (DeadlineExceeded, InvalidRequest) as error:
            return error
        return Prediction(
            arrays(mesh),
            {"meshes": 1},
            {"truncated": True} if tokens > window else {},
            {name: self.applied(options, name) for name in names},
        )

    def pack(self) -> None:
        """No layer is: the same seed would not give the very same mesh before it and after."""

    def _tokens(self, prompt: str) -> tuple[int, int]:
        tokenizer = self.pipeline.tokenizer
        window = int(tokenizer.model_max_length)
        ids = tokenizer(readable(prompt, window, tokenizer), verbose=False)["input_ids"]
        return len(ids), window

    @contextmanager
    def _watched(self, batch: Batch, place: int) -> Iterator[None]:
        """End a run of which nobody waits for the mesh, and refuse a mesh without faces."""
        renderer = self.pipeline.shap_e_renderer

        def stop_if_cancelled(*_: Any) -> None:
            if batch.cancelled(place):
                raise too_late()

        def refuse_nothing(_: Any, __: Any, mesh: Any) -> None:
            # The renderer itself stumbles over a mesh without vertices.
            if not len(mesh.faces):
                fault = "gave a mesh without a surface; another seed, or more steps, may give one"
                raise InvalidRequest.of({"input": fault})

        hooks = [
            *(
                part.register_forward_pre_hook(stop_if_cancelled)
                for part in (self.denoiser, renderer.mlp)
            ),
            renderer.mesh_decoder.register_forward_hook(refuse_nothing),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def arrays(mesh: Any) -> dict[str, np.ndarray]:
    """A mesh as the renderer makes it, as arrays."""
    channels = [mesh.vertex_channels[name].float().cpu().numpy() for name in "RGB"]
    return {
        "vertices": mesh.verts.float().cpu().numpy(),
        "faces": mesh.faces.cpu().numpy().astype(np.uint32),
        "colors": np.stack(channels, axis=1),
    }
