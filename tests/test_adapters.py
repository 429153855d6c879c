"""What every adapter owes its callers: weights that are the right ones, windows, clear refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import checkpoint, sentence
from tests.conftest import run

__all__ = ["checkpoint"]


@pytest.fixture
def serve(make_app, checkpoint):
    """A function that asks one model: ``serve("fill-mask", "masked_lm")("a [MASK]", top_k=1)``."""

    def serve(task, name, **entry):
        entry = {"id": "m", "type": task, "hf_model": checkpoint(name)} | entry
        client = make_app([entry]).test_client()
        return lambda input, **options: run(client, "m", input, options=options)

    return serve


def details(response) -> dict:
    assert response.status_code == 400, response.json
    assert response.json["error"]["code"] == "VALIDATION_ERROR"
    return response.json["error"]["details"]


def refusal(response) -> str:
    assert response.status_code == 503, response.json
    assert response.json["error"]["code"] == "MODEL_UNAVAILABLE"
    return response.json["error"]["message"]


def output(response):
    assert response.status_code == 200, response.json
    return response.json["output"]


TEXT = sentence(6)
LONG = sentence(90)


@pytest.mark.parametrize(
    ("task", "name", "short", "long", "where"),
    [
        ("text-classification", "bert_classifier", TEXT, LONG, ""),
        ("text-classification", "roberta_classifier", TEXT, LONG, ""),
        ("text-classification", "gpt2_classifier", TEXT, LONG, ""),
        ("token-classification", "token_classifier", TEXT, LONG, ""),
        ("fill-mask", "masked_lm", f"[MASK] {TEXT}", f"[MASK] {LONG}", ""),
        ("embeddings", "masked_lm", TEXT, LONG, ""),
        (
            "rerank",
            "cross_encoder",
            {"query": TEXT, "documents": [TEXT, TEXT]},
            {"query": TEXT, "documents": [TEXT, LONG]},
            ".documents[1]",
        ),
        (
            "zero-shot-classification",
            "nli",
            {"text": TEXT, "labels": ["sport", "music"]},
            {"text": LONG, "labels": ["sport", "music"]},
            ".text",
        ),
    ],
)
def test_what_is_longer_than_the_window_is_refused_or_cut_and_the_receipt_says_so(
    serve, caplog, task, name, short, long, where
):
    ask = serve(task, name)
    wanted = output(ask(short))
    found = details(ask(long))
    assert list(found) == [f"input{where}"]
    assert "the model's window is 64" in found[f"input{where}"]
    assert list(details(ask([short, long, short]))) == [f"input[1]{where}"]
    cut = ask([short, long, short], truncate=True)
    if task == "embeddings":
        assert output(cut)[0] == pytest.approx(wanted, abs=1e-5)
    assert cut.json["metadata"]["truncated"] == [None, True, None]
    assert "truncated" not in ask(short, truncate=True).json["metadata"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier", "gpt2_classifier"])
def test_a_text_that_just_fits_the_window_is_read_whole(serve, checkpoint, name):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint(name))
    words = 1
    while len(tokenizer("tower" + " tower" * words)["input_ids"]) < 64:
        words += 1
    ask = serve("text-classification", name)
    fits = ask("tower" + " tower" * words)
    assert output(fits)
    assert fits.json["metadata"]["usage"]["input_tokens"] == 64
    assert details(ask("tower" + " tower" * (words + 1)))


@pytest.mark.parametrize(
    ("task", "name", "why"),
    [
        ("chat", "llama_without_template", "no chat template"),
        ("zero-shot-classification", "bert_classifier", "no label 'entailment'"),
        ("rerank", "nli", "3 scores"),
        ("fill-mask", "masked_lm_without_mask", "no mask token"),
    ],
)
def test_a_checkpoint_that_cannot_do_its_task_is_refused_with_the_reason(serve, task, name, why):
    inputs = {
        "chat": {"messages": [{"role": "user", "content": "hello"}]},
        "zero-shot-classification": {"text": TEXT, "labels": ["sport"]},
        "rerank": {"query": TEXT, "documents": [TEXT]},
        "fill-mask": "a [MASK]",
    }
    assert why in refusal(serve(task, name)(inputs[task]))


def test_a_mirror_is_loaded_before_the_hub_is_asked(serve, checkpoint):
    ask = serve(
        "text-classification",
        "bert_classifier",
        hf_model="nobody/not-there",
        mirror=checkpoint("bert_classifier"),
    )
    assert len(output(ask(TEXT))) == 4


def test_a_mirror_that_is_not_there_is_passed_over(serve):
    ask = serve("text-classification", "bert_classifier", mirror="/not/there")
    assert len(output(ask(TEXT))) == 4


@pytest.mark.parametrize("task", ["text-classification", "embeddings"])
def test_weights_load_only_with_the_sha256_of_the_entry(serve, checkpoint, task):
    name = "model.safetensors"
    weights = Path(checkpoint("bert_classifier"), name).read_bytes()
    right = hashlib.sha256(weights).hexdigest()
    assert output(serve(task, "bert_classifier", sha256={name: right.upper()})(TEXT))
    assert name in refusal(serve(task, "bert_classifier", sha256={name: "0" * 64})(TEXT))
    assert "other.bin" in refusal(serve(task, "bert_classifier", sha256={"other.bin": right})(TEXT))


@pytest.mark.parametrize("written", ["[MASK]", "<mask>"])
def test_a_mask_may_be_written_either_way(serve, written):
    guesses = output(serve("fill-mask", "masked_lm")(f"the {written} tower", top_k=2))
    assert [guess["mask"] for guess in guesses] == [0, 0]
    assert guesses[0]["text"] == f"the {guesses[0]['token']} tower"


def test_a_text_without_a_mask_is_refused(serve):
    ask = serve("fill-mask", "masked_lm")
    assert "must have a mask" in details(ask("the tower"))["input"]
    assert list(details(ask(["the tower", "a [MASK]"]))) == ["input[0]"]
    assert "within the model's window" in details(ask(f"{LONG} [MASK]", truncate=True))["input"]


def test_more_guesses_than_words_gives_every_word(serve, checkpoint):
    vocabulary = json.loads(Path(checkpoint("masked_lm"), "config.json").read_text())["vocab_size"]
    assert len(output(serve("fill-mask", "masked_lm")("a [MASK]", top_k=1000))) == vocabulary


def test_masks_times_guesses_are_bounded(serve):
    ask = serve("fill-mask", "masked_lm")
    assert "guesses" in details(ask("[MASK] " * 50, top_k=1000))["input"]
    assert len(output(ask("[MASK] " * 50, top_k=2))) == 100


def test_dimensions_keep_the_first_numbers_and_cannot_be_more_than_there_are(serve):
    ask = serve("embeddings", "masked_lm")
    whole = output(ask(TEXT))
    assert output(ask(TEXT, dimensions=5)) == whole[:5]
    found = details(ask(TEXT, dimensions=33))
    assert found == {"options.dimensions": "must be at most 32, not 33"}
    scaled = output(ask(TEXT, dimensions=5, normalize=True))
    assert sum(number**2 for number in scaled) == pytest.approx(1)


def test_an_embedder_applies_the_prompt_that_its_checkpoint_asks_for(serve, checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "prompted"
    prompts = {"query": "question the river "}
    SentenceTransformer(
        checkpoint("masked_lm"), device="cpu", prompts=prompts, default_prompt_name="query"
    ).save(str(folder))
    wanted = SentenceTransformer(str(folder), device="cpu").encode(TEXT).tolist()
    ask = serve("embeddings", "masked_lm", hf_model=str(folder))
    assert output(ask(TEXT)) == pytest.approx(wanted, abs=1e-5)
    assert "input" in details(ask("tower " * 60))
    assert "truncated" not in ask("tower " * 55).json["metadata"]


def test_top_n_gives_the_best_documents(serve):
    ask = serve("rerank", "cross_encoder")
    value = {"query": TEXT, "documents": [sentence(n, n) for n in range(1, 40)]}
    every = output(ask(value))
    assert [one["index"] for one in every] != list(range(39))
    assert sorted(one["index"] for one in every) == list(range(39))
    assert every == sorted(every, key=lambda one: -one["score"])
    assert output(ask(value, top_n=3)) == every[:3]


def test_a_hypothesis_template_is_text_and_never_evaluated(serve):
    ask = serve("zero-shot-classification", "nli")
    value = {"text": TEXT, "labels": ["sport"]}
    assert (
        "{}"
        in details(ask(value, hypothesis_template="about sport"))["options.hypothesis_template"]
    )
    assert details(ask(value, hypothesis_template="{0.__class__}"))
    assert details(ask(value, hypothesis_template="{} {0.__class__} {x!r:>9999999999}"))
    labelled = {"text": TEXT, "labels": ["{} sport {0.__class__} {x!r:>9999999999}"]}
    assert (
        output(ask(labelled, hypothesis_template="about {}"))[0]["label"] == labelled["labels"][0]
    )


def test_a_label_that_fills_the_window_is_refused_by_its_place(serve, caplog):
    ask = serve("zero-shot-classification", "nli")
    value = {"text": TEXT, "labels": ["sport", LONG]}
    assert list(details(ask(value, truncate=True))) == ["input.labels[1]"]
    assert list(details(ask(value))) == ["input.labels[1]"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_labels_that_repeat_are_each_scored(serve):
    ask = serve("zero-shot-classification", "nli")
    scores = output(ask({"text": TEXT, "labels": ["sport", "sport"]}))
    assert [one["score"] for one in scores] == pytest.approx([0.5, 0.5])


def test_a_context_longer_than_the_window_is_read_whole(serve, checkpoint):
    ask = serve("question-answering", "question_answerer", max_batch_size=2)
    question = "who built the tower?"
    seen = set()
    for seed in range(12):
        context = sentence(400, seed)
        answer = output(ask({"question": question, "context": context}))
        assert context[answer["start"] : answer["end"]] == answer["answer"]
        assert 0 < answer["score"] <= 1
        assert answer["score"] == pytest.approx(
            best_in_windows(checkpoint("question_answerer"), question, context)
        )
        seen.add(answer["start"] * 5 // len(context))
    assert len(seen) > 2


def best_in_windows(folder, question, context):
    """The best span's probability over windows of the context that overlap by 16 tokens."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    room = 64 - len(asked) - 3
    starts, ends = [], []
    for at in range(0, max(1, len(ids) - 16), room - 16):
        part = ids[at : at + room]
        row = [2, *asked, 3, *part, 3]
        kinds = [0] * (len(asked) + 2) + [1] * (len(part) + 1)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row]), token_type_ids=torch.tensor([kinds]))
        inside = slice(len(asked) + 2, len(asked) + 2 + len(part))
        starts.append(logits.start_logits[0, inside])
        ends.append(logits.end_logits[0, inside])
    lengths = [len(part) for part in starts]
    first = torch.cat(starts).softmax(0).split(lengths)
    last = torch.cat(ends).softmax(0).split(lengths)
    return max(
        float(a[i] * b[j])
        for a, b in zip(first, last, strict=True)
        for i in range(len(a))
        for j in range(i, min(i + 15, len(b)))
    )


def test_a_question_that_leaves_no_room_for_the_context_is_refused(serve):
    ask = serve("question-answering", "question_answerer")
    found = details(ask({"question": sentence(40), "context": TEXT}))
    assert list(found) == ["input.question"]


NOTHING = "\u200b"


@pytest.mark.parametrize(
    ("task", "name", "value", "fault"),
    [
        ("text-classification", "bert_classifier", NOTHING, None),
        ("text-classification", "gpt2_classifier", NOTHING, None),
        ("token-classification", "token_classifier", NOTHING, None),
        ("embeddings", "masked_lm", NOTHING, None),
        ("zero-shot-classification", "nli", {"text": NOTHING, "labels": [NOTHING]}, None),
        ("rerank", "cross_encoder", {"query": NOTHING, "documents": [NOTHING, ""]}, None),
        ("fill-mask", "masked_lm", NOTHING, "input"),
        (
            "question-answering",
            "question_answerer",
            {"question": NOTHING, "context": NOTHING},
            "input.context",
        ),
        ("summarization", "bart", NOTHING, None),
        ("text2text-generation", "t5", NOTHING, None),
    ],
)
def test_an_input_of_nothing_but_invisible_characters_breaks_nothing(
    serve, caplog, task, name, value, fault
):
    ask = serve(task, name)
    options = {"max_tokens": 2} if task in ("summarization", "text2text-generation") else {}
    response = ask(value, **options)
    if fault:
        assert list(details(response)) == [fault]
    else:
        output(response)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_checkpoint_with_a_broken_file_is_refused_without_its_path(serve, checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint("bert_classifier"), folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    message = refusal(serve("text-classification", "bert_classifier", hf_model=str(folder))(TEXT))
    assert str(folder) not in message
