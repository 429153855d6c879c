"""How each generic task's input becomes a call of its pipeline, and what is checked before.

Each function takes the pipeline, an input and the options; it gives what the pipeline gave, in the
task's words, and facts for the receipt. It raises ``InvalidRequest``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.adapters.masks import best_boxes, mask_of
from backend.adapters.transformers_base import model_window, too_long
from backend.errors import InvalidRequest
from backend.media.audio import resample

Facts = dict[str, Any]
Answer = tuple[Any, Facts]

SHORTEST_S = 0.025  # what wav2vec 2.0 and spectrograms make their first frame of


@dataclass(frozen=True)
class Call:
    """How to ask; the packages that the task needs, and those that some checkpoints need."""

    ask: Callable[[Any, Any, Mapping[str, Any]], Answer]
    needs: tuple[str, ...] = ()
    may_need: tuple[str, ...] = ()


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


def classify_film(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    """Not through the pipeline's own decoding, which reads paths and URLs, and the first frames."""
    frames, wanted = value["frames"], pipeline.model.config.num_frames
    frames = frames[np.linspace(0, len(frames) - 1, wanted).round().astype(int)]
    if pipeline.video_processor is None:
        inputs = pipeline.image_processor(list(frames), return_tensors="pt")
    else:
        inputs = pipeline.video_processor(frames, do_sample_frames=False, return_tensors="pt")
    return pipeline.postprocess(
        pipeline.forward(inputs.to(pipeline.dtype)),
        top_k=options["top_k"] or pipeline.model.config.num_labels,
        function_to_apply=options["function_to_apply"],
    ), {}


def cut_out(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    """All but the pipeline's last step, which would need torchvision to compare boxes."""
    import torch

    names = ("pred_iou_thresh", "stability_score_thresh", "stability_score_offset")
    thresholds = {name: options[name] for name in (*names, "mask_threshold")}
    pixels = value.shape[0] * value.shape[1]
    chunks = [
        pipeline.forward(inputs, **thresholds)
        for inputs in pipeline.preprocess(
            picture(value),
            # Each point has 3 masks of the picture's size in float32: a gigabyte of them at most.
            points_per_batch=max(1, min(64, 2**28 // (3 * pixels))),
            points_per_crop=options["points_per_crop"],
            crops_n_layers=options["crops_n_layers"],
        )
    ]
    runs = [run for chunk in chunks for run in chunk["masks"]]
    scores = torch.cat([chunk["iou_scores"] for chunk in chunks]).float().numpy()
    boxes = torch.cat([chunk["boxes"] for chunk in chunks]).float().numpy()
    kept = best_boxes(boxes, scores, options["crops_nms_thresh"])[: options["top_k"]]
    return [
        {
            "score": scores[index],
            "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), boxes[index].tolist(), strict=True)),
            "mask": mask_of(runs[index]),
        }
        for index in kept
    ], {}


def image_features(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    outputs = pipeline.forward(pipeline.preprocess(picture(value)))
    if options["pool"] and outputs.get("pooler_output") is None:
        raise InvalidRequest.of({"options.pool": "is not something this model can be asked"})
    return pipeline.postprocess(outputs, pool=options["pool"], return_tensors=True)[0], {}


def text_features(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    window = model_window(pipeline.model, pipeline.tokenizer)
    tokens = count_tokens(pipeline, value)
    if window is None or tokens <= window:
        return pipeline(value, return_tensors=True)[0], {}
    if not options["truncate"]:
        raise too_long(tokens, window)
    how = {"truncation": True, "max_length": window}
    return pipeline(value, return_tensors=True, tokenize_kwargs=how)[0], {"truncated": True}


def find_objects(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    check_labels(pipeline, value["labels"])
    found = pipeline(
        picture(value["image"]),
        candidate_labels=value["labels"],
        threshold=options["threshold"],
        top_k=options["top_k"],
    )
    return found, {}


def match_keypoints(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    pair = [picture(image) for image in value["images"]]
    return pipeline(pair, threshold=options["threshold"]), {}


def ask_document(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    height, width = value["image"].shape[:2]
    words = value["words"]
    asked = {"image": picture(value["image"]), "question": value["question"]}
    if "VISION" in pipeline.model_type.name.upper():  # Donut, which reads for itself
        if words is not None:
            raise InvalidRequest.of({"input.words": "is not something this model can be asked"})
        return pipeline(asked, top_k=options["top_k"]), {}
    if words is None and importlib.util.find_spec("pytesseract") is None:
        fault = "is missing: this model is told the words of the picture, and where they are"
        raise InvalidRequest.of({"input.words": fault})
    window = model_window(pipeline.model, pipeline.tokenizer)
    stride = min((window or 512) // 2, 256)
    if window is not None:
        # Beside the question, a part of the words must go in that goes past the last part's end.
        special = pipeline.tokenizer.num_special_tokens_to_add(pair=True)
        bare = len(pipeline.tokenizer(value["question"], add_special_tokens=False)["input_ids"])
        if bare > (most := window - special - stride - 1):
            fault = f"has {bare} tokens and the model reads {most} of a question; shorten it"
            raise InvalidRequest.of({"input.question": fault})
    if words is not None:
        asked["word_boxes"] = [
            (word["text"], _thousandths(word["box"], width, height, place))
            for place, word in enumerate(words)
        ]
    names = ("top_k", "max_answer_len", "handle_impossible_answer")
    how = {name: options[name] for name in names}
    return pipeline(asked, max_seq_len=window or 512, doc_stride=stride, **how), {}


def _thousandths(box: list[float], width: int, height: int, place: int) -> list[int]:
    if box[2] > width or box[3] > height:
        fault = f"is beyond the picture, which is {width} x {height} pixels"
        raise InvalidRequest.of({f"input.words[{place}].box": fault})
    sides = (width, height, width, height)
    return [int(1000 * at / side) for at, side in zip(box, sides, strict=True)]


def ask_table(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    pandas = importlib.import_module("pandas")
    table = pandas.DataFrame(value["table"]["rows"], columns=value["table"]["columns"])
    window = model_window(pipeline.model, pipeline.tokenizer)
    encoded = pipeline.tokenizer(table, value["question"], truncation="do_not_truncate")
    tokens = len(encoded["input_ids"])
    over = window is not None and tokens > window
    if over and not options["truncate"]:
        raise too_long(tokens, window or 0, "input.table")
    how = "drop_rows_to_fit" if over else "do_not_truncate"
    answer = pipeline({"table": table, "query": value["question"]}, truncation=how)
    return answer, {"truncated": True} if over else {}


def decide(pipeline: Any, value: Any, options: Mapping[str, Any]) -> Answer:
    questions = {}
    for place, question in enumerate(value["questions"]):
        kind, choices = question["type"], question["options"]
        known = pipeline.decision_config.labels.get(kind)
        most = len(known) if known else 26
        if choices is not None and len(choices) > most:
            fault = f"must have {most} items at most for this model, not {len(choices)}"
            raise InvalidRequest.of({f"input.questions[{place}].options": fault})
        asked = {"type": kind, "instructions": question["instructions"]}
        if kind == "choice":
            asked["criteria"] = dict.fromkeys(choices)
        elif kind == "score":
            asked["criteria"] = choices
        questions[question["name"]] = asked
    inputs = pipeline.preprocess({"state": value["state"], "questions": questions})
    window = model_window(pipeline.model, pipeline.tokenizer)
    tokens = max(prompt["input_ids"].shape[-1] for prompt, _ in inputs["prompts"])
    if window is not None and tokens > window:
        fault = f"has {tokens} tokens with its longest question and the model's window is {window}"
        raise InvalidRequest.of({"input.state": f"{fault}; shorten it"})
    return pipeline.postprocess(pipeline.forward(inputs)), {}


def picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def sound(pipeline: Any, value: Any, at: str, truncate: bool) -> tuple[np.ndarray, Facts]:
    """Samples at the model's rate, and no more of them than it hears."""
    samples, rate = value["samples"], value["rate"]
    extractor = pipeline.feature_extractor
    if len(samples) < SHORTEST_S * rate:
        fault = f"lasts {len(samples) / rate:.3g} s; the shortest that is heard is {SHORTEST_S} s"
        raise InvalidRequest.of({at: fault})
    if rate != extractor.sampling_rate:
        samples = resample(samples, rate, extractor.sampling_rate)
    most = longest(extractor)
    if most is None or len(samples) <= most:
        return samples, {}
    if not truncate:
        seconds = (count / extractor.sampling_rate for count in (len(samples), most))
        fault = "lasts {:.4g} s and the model hears {:.4g} s; ".format(*seconds)
        raise InvalidRequest.of({at: f"{fault}shorten it, or set options.truncate to true"})
    return samples[:most], {"truncated": True}


def longest(extractor: Any) -> int | None:
    """The most samples that a model hears; what is beyond its extractor leaves, CLAP's by lot."""
    for name in ("nb_max_samples", "n_samples"):  # CLAP's, Whisper's
        if (samples := getattr(extractor, name, None)) is not None:
            return int(samples)
    if type(extractor).__name__.startswith("AST"):
        # Frames of 25 ms, a new one each 10 ms.
        return int((extractor.max_length * 10 + 15) * extractor.sampling_rate // 1000)
    return None


def check_labels(pipeline: Any, sentences: list[str]) -> None:
    """Refuse labels that do not fit the model's window, with the template around them."""
    window = model_window(pipeline.model, pipeline.tokenizer)
    if window is None:
        return
    tokens = [count_tokens(pipeline, sentence) for sentence in sentences]
    faults = {
        f"input.labels[{place}]": f"has {count} tokens and the model's window is {window}"
        for place, count in enumerate(tokens)
        if count > window
    }
    if faults:
        raise InvalidRequest.of(faults)


def count_tokens(pipeline: Any, text: str) -> int:
    return len(pipeline.tokenizer(text, verbose=False)["input_ids"])


CALLS = {
    "audio-classification": Call(classify_sound, may_need=("torchaudio",)),
    "zero-shot-audio-classification": Call(judge_sound, may_need=("torchaudio", "torchvision")),
    "video-classification": Call(classify_film, may_need=("torchvision",)),
    "mask-generation": Call(cut_out, may_need=("torchvision",)),
    "image-feature-extraction": Call(image_features, may_need=("torchvision", "timm")),
    "feature-extraction": Call(text_features),
    "zero-shot-object-detection": Call(find_objects, may_need=("torchvision", "timm")),
    "keypoint-matching": Call(match_keypoints, may_need=("torchvision",)),
    "document-question-answering": Call(ask_document, may_need=("torchvision", "pytesseract")),
    "table-question-answering": Call(ask_table, needs=("pandas",)),
    "decision": Call(decide, may_need=("torchvision", "peft")),
}
