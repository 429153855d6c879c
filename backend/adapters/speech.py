"""Speech and other sound through transformers' models, each of which has its own way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from backend.adapters.base import Adapter, Batch, Prediction, too_late
from backend.adapters.hub import fetch_snapshot, pick_device
from backend.adapters.own_draws import own_draws
from backend.adapters.sound_models import (
    VOCODER,
    Bark,
    MusicGen,
    Prompt,
    SoundModel,
    SpeechT5,
    Vits,
)
from backend.adapters.transformers_base import quiet, too_long
from backend.adapters.unlocked import unlocked_property
from backend.errors import (
    CraneError,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    did_you_mean,
    echoed,
)

if TYPE_CHECKING:
    import torch


class SoundMaker(Adapter):
    """Says or plays texts with the kind of model that the checkpoint is."""

    kinds: ClassVar[dict[str, type[SoundModel]]]  # by transformers' model_type
    asked: ClassVar[tuple[str, ...]]  # options that not every kind of model has

    spares_cores = False  # as for pictures: one input takes long

    def fetch(self) -> None:
        super().fetch()
        _ = self._load_kwargs

    @unlocked_property
    def _load_kwargs(self) -> dict[str, Any]:
        """An entry's ``load``, with the vocoder that SpeechT5 needs on this machine."""
        kwargs = dict(self.spec.load_kwargs)
        config = json.loads((self.folder / "config.json").read_text())
        if config.get("model_type") == "speecht5":
            vocoder = kwargs.get("vocoder", VOCODER)
            local = Path(vocoder).is_dir()
            kwargs["vocoder"] = vocoder if local else str(fetch_snapshot(vocoder))
        return kwargs

    def load(self) -> None:
        import transformers

        quiet()
        weights, revision = self.weights
        self.device = pick_device(self.device)
        dtype = self.wanted_dtype(self.device)
        trust = {k: v for k, v in self.spec.load_kwargs.items() if k == "trust_remote_code"}
        config = transformers.AutoConfig.from_pretrained(weights, **revision, **trust)
        kind = self.kinds.get(config.model_type)
        if kind is None:
            raise ModelUnavailable(
                f"Its checkpoint is of the kind {config.model_type}, and {self.spec.type} takes "
                f"{', '.join(self.kinds)}."
            )
        self.model = kind(
            weights, revision, dtype, self.device, dict(self._load_kwargs), self._check_callers
        )
        self.window = self.model.window
        self.dtype = str(dtype).removeprefix("torch.")

    def wanted_dtype(self, device: str) -> torch.dtype:
        import torch

        # A wave in bfloat16 has eight bits and hisses, and VITS counts its samples in it wrongly.
        dtype: torch.dtype = getattr(torch, self.dtype if self.dtype != "auto" else "float32")
        return dtype

    def unload(self) -> None:
        del self.model

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        try:
            self._check(batch.options)
        except InvalidRequest as error:
            return [error] * len(batch)
        results: dict[int, Prediction | CraneError] = {}
        prompts: dict[int, Prompt] = {}
        for place in batch.pending(range(len(batch))):
            try:
                prompts[place] = self._prompt(batch.inputs[place], batch.options)
            except InvalidRequest as error:
                results[place] = error
        places = list(prompts)
        max_inputs = self.model.max_inputs(batch.options) or max(1, len(places))
        runs = math.ceil(len(places) / max_inputs)
        for start in range(0, len(places), max_inputs):
            run = places[start : start + max_inputs]
            try:
                with self._drawing(run, batch, start // max_inputs, runs):
                    made = self.model.make([prompts[place] for place in run], batch.options)
            except (DeadlineExceeded, InvalidRequest) as error:
                results |= dict.fromkeys(run, error)
                continue
            for place, samples in zip(run, made, strict=True):
                results[place] = self._prediction(samples, prompts[place], batch.options)
            if not self.model.batches:
                batch.progress(start + 1, len(places))
        return [results.get(place) or too_late() for place in range(len(batch))]

    def _check_callers(self) -> None:
        if all(self._cancelled(place) for place in self._run):
            raise too_late()

    def _check(self, options: dict[str, Any]) -> None:
        """Refuse what this model cannot be asked; raises ``InvalidRequest``."""
        model = self.model
        faults = {
            f"options.{name}": "is not something this model can be asked"
            for name in self.asked
            if options[name] is not None and name not in model.takes
        }
        voice = options.get("voice")
        if voice is not None and voice not in model.voices:
            faults["options.voice"] = (
                f"is {echoed(voice)}: {did_you_mean(voice, model.voices)}"
                if model.voices
                else "is not something this model can be asked: it has one voice"
            )
        faults |= {} if faults else model.faults(options)
        if faults:
            raise InvalidRequest.of(faults)

    def _prompt(self, text: str, options: dict[str, Any]) -> Prompt:
        prompt = self.model.prompt(text, options)
        if not prompt.tokens:
            raise InvalidRequest.of({"input": "has nothing that this model can read"})
        if prompt.cut and not options["truncate"]:
            raise too_long(prompt.tokens, self.model.window or 0)
        return prompt

    @contextmanager
    def _drawing(self, run: list[int], batch: Batch, runs_done: int, runs: int) -> Iterator[None]:
        """Draws from the inputs' own seeds, and an end once nobody waits for any of them."""
        import torch

        steps = 0
        self._run, self._cancelled = run, batch.cancelled

        def step() -> None:
            nonlocal steps
            steps += 1
            self._check_callers()
            if self.model.batches:
                total = self.model.steps(batch.options)
                batch.progress(runs_done * total + min(steps, total), runs * total)

        seeds = [batch.seeds[place] or 0 for place in run]
        with torch.inference_mode(), own_draws(seeds, self.device, step):
            step()
            yield

    def _prediction(
        self, samples: np.ndarray, prompt: Prompt, options: dict[str, Any]
    ) -> Prediction:
        seconds = len(samples) / self.model.rate
        own = self.model.own()
        return Prediction(
            {"samples": samples, "rate": self.model.rate},
            {"input_tokens": len(prompt.ids), "audio_seconds": round(seconds, 6)},
            {"truncated": True} if prompt.cut else {},
            {name: value for name, value in own.items() if options[name] is None},
        )


class Speaker(SoundMaker):
    kinds = {"vits": Vits, "speecht5": SpeechT5, "bark": Bark}
    asked = ("speed", "max_tokens", "temperature", "top_k")


class Composer(SoundMaker):
    kinds = {"musicgen": MusicGen}
    asked = ("duration", "guidance_scale", "temperature", "top_k")

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        return int(50 * (options["duration"] or 30))  # MusicGen's tokens
