"""Speech to text: what Whisper and CTC models share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from backend.adapters.base import Adapter, Batch, Prediction, too_late
from backend.adapters.hub import pick_device
from backend.adapters.memory import dtype_name, quantize
from backend.adapters.packing import keep_packed
from backend.adapters.recognition_ctc import CtcListener
from backend.adapters.recognition_whisper import WhisperListener
from backend.adapters.transformers_base import quiet
from backend.errors import CraneError, InvalidRequest, ModelUnavailable


class Listener(Protocol):
    """Writes down sounds, in the way of one family of models."""

    auto_class: ClassVar[str]

    def faults(self, options: Mapping[str, Any]) -> dict[str, str]:
        """What the model cannot be asked, by option."""

    def fault(self, samples: Any, options: Mapping[str, Any]) -> str | None:
        """Why the model cannot hear a sound, if it cannot."""

    def listen(
        self, sounds: Mapping[int, Any], batch: Batch
    ) -> Mapping[int, Prediction | CraneError]:
        """Write down each sound that is waited for, its samples by its place in the batch."""


class SpeechRecognizer(Adapter):
    """Loads a Whisper or a CTC checkpoint, whichever its configuration says it is.

    Beside the model there is transformers' own pipeline, which makes the features of one sound
    and words of tokens; what is run together, and until when, is decided here.
    """

    memory_ways = frozenset(("quantize",))
    spares_cores = False  # encoding a window is long: a core less costs more than interruptions

    def load(self) -> None:
        import transformers

        quiet()
        weights, revision = self.weights
        self.device = pick_device(self.device)
        trust = {k: v for k, v in self.spec.load_kwargs.items() if k == "trust_remote_code"}
        config = transformers.AutoConfig.from_pretrained(weights, **revision, **trust)
        listener = listener_for(config)
        how = {"dtype": self.wanted_dtype(self.device), **revision, **self.spec.load_kwargs}
        model = getattr(transformers, listener.auto_class).from_pretrained(weights, **how)
        quantize([model], self.spec.memory, self.device)
        # A device map in the entry's `load` has placed the model already; else without a device
        # the pipeline would move it to the first GPU.
        placed = "device_map" in how
        model = model if placed else model.to(self.device)
        model.eval()
        keep_packed(model)
        self.dtype = dtype_name(model.dtype, self.spec.memory)
        pipeline = transformers.pipeline(
            "automatic-speech-recognition",
            model=model,
            tokenizer=transformers.AutoTokenizer.from_pretrained(weights, **revision, **trust),
            feature_extractor=transformers.AutoFeatureExtractor.from_pretrained(
                weights, **revision, **trust
            ),
            **({} if placed else {"device": model.device}),
        )
        self._listener: Listener = listener(pipeline)

    def unload(self) -> None:
        del self._listener

    def predict(self, batch: Batch) -> list[Prediction | CraneError]:
        if faults := self._listener.faults(batch.options):
            return [InvalidRequest.of({f"options.{k}": v for k, v in faults.items()})] * len(batch)
        results: dict[int, Prediction | CraneError] = {}
        sounds: dict[int, Any] = {}
        for place, value in enumerate(batch.inputs):
            if fault := self._listener.fault(value["samples"], batch.options):
                results[place] = InvalidRequest.of({"input": fault})
            else:
                sounds[place] = value["samples"]
        results |= self._listener.listen(sounds, batch) if sounds else {}
        return [results.get(place) or too_late() for place in range(len(batch))]

    def size(self, value: Any, options: Mapping[str, Any]) -> int:
        # A window of 30 s is 1,500 tokens to Whisper's encoder, and to CTC likewise.
        return 1500 * max(1, -(-len(value["samples"]) // (30 * int(value["rate"]))))


def listener_for(config: Any) -> type[WhisperListener] | type[CtcListener]:
    """The way of a checkpoint's family; ``ModelUnavailable`` where it has none here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

    if config.model_type == "whisper":
        return WhisperListener
    # Those that hear samples, not features, say how many of them are one letter's time.
    if config.model_type in MODEL_FOR_CTC_MAPPING_NAMES and hasattr(
        config, "inputs_to_logits_ratio"
    ):
        return CtcListener
    raise ModelUnavailable(
        f"It is a {config.model_type} model, and speech is recognized by Whisper models and by "
        "CTC models that hear samples, such as wav2vec2 and hubert."
    )
