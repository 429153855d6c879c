"""Calls of pipelines that listen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.adapters.generic_base import Answer, Facts, check_labels
from backend.errors import InvalidRequest
from backend.media.audio import resample

SHORTEST_S = 0.025  # what wav2vec 2.0 and spectrograms make their first frame of
# Frames of a model that sets no limit of its own: 655 s for wav2vec 2.0, which makes 50 a second.
# A layer compares each with each other one: for twice as many it takes minutes on a CPU, and a run
# can only be broken off between two layers.
MAX_FRAMES = 2**15


def classify_sound(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    samples, facts = sound(pipeline, value, "input", options["truncate"])
    how = {"top_k": options["top_k"], "function_to_apply": options["function_to_apply"]}
    return pipeline(samples, **how), facts


def judge_sound(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    samples, facts = sound(pipeline, value["audio"], "input.audio", options["truncate"])
    # Not by the pipeline's str.format, which would follow a template's {0.__class__}.
    said = [options["hypothesis_template"].replace("{}", label) for label in value["labels"]]
    check_labels(pipeline, said)
    numbers = list(range(len(said)))
    found = pipeline(samples, candidate_labels=numbers, hypothesis_template=_Said(said))
    labels = value["labels"]
    return [{"label": labels[one["label"]], "score": one["score"]} for one in found], facts


class _Said:
    """Sentences by number, for a pipeline that formats a template with each label."""

    def __init__(self, sentences: list[str]) -> None:
        self.sentences = sentences

    def format(self, number: int) -> str:
        return self.sentences[number]


def sound(pipeline: Any, value: Any, at: str, truncate: bool) -> tuple[np.ndarray, Facts]:
    """Samples at the model's rate, and no more of them than it hears."""
    samples, rate = value["samples"], value["rate"]
    extractor = pipeline.feature_extractor
    if len(samples) < SHORTEST_S * rate:
        fault = f"lasts {len(samples) / rate:.3g} s; the shortest that is heard is {SHORTEST_S} s"
        raise InvalidRequest.of({at: fault})
    if rate != extractor.sampling_rate:
        samples = resample(samples, rate, extractor.sampling_rate)
    most = longest(extractor, pipeline.model)
    if most is None or len(samples) <= most:
        return samples, {}
    if not truncate:
        seconds = (count / extractor.sampling_rate for count in (len(samples), most))
        fault = "lasts {:.4g} s and the model hears {:.4g} s; ".format(*seconds)
        raise InvalidRequest.of({at: f"{fault}shorten it, or set options.truncate to true"})
    return samples[:most], {"truncated": True}


def longest(extractor: Any, model: Any) -> int | None:
    """The most samples that a model takes; what is beyond its extractor leaves, CLAP's by lot."""
    for name in ("nb_max_samples", "n_samples"):  # CLAP's, Whisper's
        if (samples := getattr(extractor, name, None)) is not None:
            return int(samples)
    if type(extractor).__name__.startswith("AST"):
        # Frames of 25 ms, a new one each 10 ms.
        return int((extractor.max_length * 10 + 15) * extractor.sampling_rate // 1000)
    samples_a_frame = getattr(model.config, "inputs_to_logits_ratio", None)
    return None if samples_a_frame is None else MAX_FRAMES * int(samples_a_frame)
