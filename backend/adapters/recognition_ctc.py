"""Speech to text with models that say a letter, or none, for each 20 ms of sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from backend.adapters.base import Batch, Prediction
from backend.adapters.numbers import check_numbers
from backend.errors import CraneError

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK_S = 30  # of a long sound; a sixth at either side is heard for the sake of what is between
MOST_S = 120  # of sound in a run; its first layer is 7 MB a second
MOST_PADDING = 1.25  # times the shortest sound of a run is its longest


class Chunk(NamedTuple):
    """A piece of a sound; ``stride`` is its samples, and how many left and right are others'."""

    values: torch.Tensor
    stride: tuple[int, int, int]


class CtcListener:
    """Answers as ``pipeline(…, chunk_length_s=30)`` does, many sounds in a run.

    Sounds of different lengths share a run only where the checkpoint wants a mask of what is no
    padding: a model without one hears it, and would answer otherwise than alone.
    """

    auto_class: ClassVar[str] = "AutoModelForCTC"

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._model = pipeline.model
        self._name: str = self._model.main_input_name
        self._rate: int = pipeline.feature_extractor.sampling_rate
        self._pads = bool(pipeline.feature_extractor.return_attention_mask)
        self._least = fewest_samples(self._model.config)

    def faults(self, options: Mapping[str, Any]) -> dict[str, str]:
        faults = {}
        if options["language"] is not None:
            faults["language"] = "cannot be chosen: this model writes what it hears as it hears it"
        if options["task"] != "transcribe":
            faults["task"] = f"is {options['task']!r}, and this model can only transcribe"
        if options["return_timestamps"] == "segments":
            faults["return_timestamps"] = "is 'segments', and this model tells 'words' apart only"
        if options["max_tokens"] is not None:
            faults["max_tokens"] = "cannot be set: this model writes as much as it hears"
        if options["num_beams"] != 1:
            faults["num_beams"] = "must be 1: this model does not search"
        return faults

    def fault(self, samples: np.ndarray, options: Mapping[str, Any]) -> str | None:
        if len(samples) >= self._least:
            return None
        least_ms, ms = (1e3 * count / self._rate for count in (self._least, len(samples)))
        return f"lasts {ms:.2f} ms, and this model needs at least {least_ms:.2f} ms"

    def listen(
        self, sounds: Mapping[int, np.ndarray], batch: Batch
    ) -> Mapping[int, Prediction | CraneError]:
        from transformers.pipelines.automatic_speech_recognition import rescale_stride

        # Without the masks, which would be twice as large as an hour of sound itself.
        chunks = [
            (place, Chunk(chunk[self._name], chunk["stride"]))
            for place, samples in sounds.items()
            if not batch.cancelled(place)
            for chunk in self._pipeline.preprocess(samples, chunk_length_s=CHUNK_S)
        ]
        ratio = 1 / self._model.config.inputs_to_logits_ratio
        heard: dict[int, list[dict[str, Any]]] = {place: [] for place in sounds}
        done = 0
        for planned in self._runs([chunk.values.shape[1] for _, chunk in chunks]):
            run = [index for index in planned if not batch.cancelled(chunks[index][0])]
            if not run:
                continue
            batch.progress(done, len(chunks))
            for index, letters in zip(run, self._letters([chunks[i][1] for i in run]), strict=True):
                place, chunk = chunks[index]
                [stride] = rescale_stride([chunk.stride], ratio)
                heard[place].append({"at": index, "tokens": letters, "stride": stride})
            done += len(planned)
        return {
            place: self._prediction(sounds[place], parts, batch.options)
            for place, parts in heard.items()
            if not batch.cancelled(place)
        }

    def _runs(self, lengths: list[int]) -> list[list[int]]:
        """Which chunks run together, by their places, given the samples of each."""
        runs: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            length = lengths[index]
            shortest = lengths[runs[-1][0]] if runs else 0
            longest = shortest * (MOST_PADDING if self._pads else 1)
            if not runs or length > longest or (len(runs[-1]) + 1) * length > MOST_S * self._rate:
                runs.append([])
            runs[-1].append(index)
        return runs

    def _letters(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """The likeliest letter of each place of each chunk, ``(1, places)``."""
        import torch
        from torch.nn.functional import pad

        lengths = torch.tensor([chunk.values.shape[1] for chunk in chunks])
        width = int(lengths.max())
        values = torch.cat([pad(one.values, (0, width - one.values.shape[1])) for one in chunks])
        mask = (torch.arange(width) < lengths[:, None]).long()
        device = self._model.device
        with torch.inference_mode():
            how = {self._name: values.to(device), "attention_mask": mask.to(device)}
            logits = self._model(**how).logits
        check_numbers(logits[..., 0])
        letters = logits.argmax(-1).cpu()
        if int(lengths.min()) == width:
            return list(letters.split(1))
        real = self._model._get_feat_extract_output_lengths(lengths)
        return [row[None, :count] for row, count in zip(letters, real.tolist(), strict=True)]

    def _prediction(
        self, samples: np.ndarray, parts: list[dict[str, Any]], options: Mapping[str, Any]
    ) -> Prediction:
        parts = sorted(parts, key=lambda part: int(part.pop("at")))
        timed = options["return_timestamps"] == "words"
        answer = self._pipeline.postprocess(parts, return_timestamps="word" if timed else None)
        usage = {"audio_seconds": round(len(samples) / self._rate, 3)}
        if not timed:
            return Prediction(answer["text"], usage)
        words = [
            {"text": word["text"], "start": round(float(start), 3), "end": round(float(end), 3)}
            for word in answer["chunks"]
            for start, end in [word["timestamp"]]
        ]
        return Prediction({"text": answer["text"], "words": words}, usage)


def fewest_samples(config: Any) -> int:
    """How many samples the first layers need to make one place of them."""
    needed = 1
    for kernel, step in zip(
        reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
    ):
        needed = (needed - 1) * step + kernel
    return needed
