"""Text generation as a caller sees it: seeds, draws, stops, windows, languages, cancelling."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from backend import create_app
from backend.config import Config
from tests.checkpoints import checkpoint, sentence
from tests.conftest import answered, refused_for, run, write_models

__all__ = ["checkpoint"]

MODELS = {
    "shared-llama": ("text-generation", "llama"),
    "shared-endless": ("text-generation", "llama_without_end"),
    "shared-gpt2": ("text-generation", "gpt2"),
    "shared-chat": ("chat", "llama"),
    "shared-bart": ("summarization", "bart"),
    "shared-nllb": ("translation", "nllb"),
}
PROMPT = sentence(5, 1)
GPT2_WINDOW = 48


@pytest.fixture(scope="module")
def app(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    entries = [
        {"id": id, "type": type, "hf_model": checkpoint(name), "max_batch_size": 512}
        for id, (type, name) in MODELS.items()
    ]
    app = create_app(
        Config(
            models=write_models(folder, entries),
            data_dir=folder / "data",
            dtype="float32",
            devices=("cpu",),
            max_batch=512,
            quota="off",
        )
    )
    yield app
    app.extensions["crane"].engine.close()


@pytest.fixture
def write(app):
    """The output and receipt of a call: ``write(PROMPT, model="shared-llama", max_tokens=3)``."""

    def write(input=PROMPT, model="shared-llama", **options):
        return answered(app.test_client(), model, input, **options)

    return write


@pytest.fixture
def refused(app):
    """The error of a call that is refused with 400."""

    def refused(input, model="shared-llama", **options):
        return refused_for(app.test_client(), model, input, **options)

    return refused


def at_once(calls):
    """Run the callables together; return their results in order."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def call(index):
        barrier.wait()
        results[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


DRAWN = {"temperature": 1.0, "max_tokens": 12}


@pytest.mark.parametrize("model", ["shared-llama", "shared-bart"])
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(write, model):
    texts = [sentence(words, words) for words in (2, 9, 1, 14)]
    together, metadata = write(texts, model, seed=40, **DRAWN)
    assert metadata["seed"] == [40, 41, 42, 43]
    assert metadata["batch_size"] == 4
    alone = [write(text, model, seed=40 + i, **DRAWN)[0] for i, text in enumerate(texts)]
    assert together == alone


def test_a_seed_gives_the_same_text_among_other_callers(write):
    texts = [sentence(1 + i % 7, i) for i in range(16)]
    alone = [write(text, seed=i, **DRAWN)[0] for i, text in enumerate(texts)]
    calls = [lambda i=i, text=text: write(text, seed=i, **DRAWN) for i, text in enumerate(texts)]
    answers = at_once(calls)
    assert [output for output, _ in answers] == alone
    assert max(metadata["batch_size"] for _, metadata in answers) > 1


def test_different_seeds_draw_different_texts(write):
    outputs, _ = write([PROMPT] * 8, seed=1, **DRAWN)
    assert len(set(outputs)) == 8


def test_a_seed_that_the_caller_left_out_is_drawn_and_reported(write):
    output, metadata = write(**DRAWN)
    assert metadata["options"]["seed"] == metadata["seed"]
    assert write(seed=metadata["seed"], **DRAWN)[0] == output
    assert write(**DRAWN)[1]["seed"] != metadata["seed"]


def test_a_greedy_answer_has_no_seed(write):
    assert "seed" not in write(max_tokens=2)[1]


def test_a_draw_from_the_likeliest_one_is_the_greedy_choice(write):
    greedy, _ = write(max_tokens=20)
    assert write(max_tokens=20, temperature=1.7, top_k=1, seed=3)[0] == greedy
    assert write(max_tokens=20, temperature=1.0, top_p=0.01, seed=3)[0] == greedy


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 4}], ids=str)
def test_the_coldest_draw_is_the_greedy_choice(write, options):
    greedy, _ = write(max_tokens=20)
    assert write(max_tokens=20, temperature=1e-40, seed=5, **options)[0] == greedy


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.7},
    ],
    ids=str,
)
def test_draws_come_as_often_as_the_library_says(write, checkpoint, options):
    draws = 512
    drawn, metadata = write([PROMPT] * draws, max_tokens=1, seed=11, **options)
    assert metadata["batch_size"] == draws
    counts = Counter(drawn)
    wanted = first_token_probabilities(checkpoint("llama"), PROMPT, options)
    assert set(counts) <= set(wanted)
    common = {text: p * draws for text, p in wanted.items() if p * draws >= 5}
    seen = [counts[text] for text in common]
    expected = list(common.values())
    rest = draws - sum(expected)
    if rest >= 5:
        seen.append(draws - sum(seen))
        expected.append(rest)
    from scipy.stats import chisquare

    total = sum(seen) / sum(expected)
    assert len(expected) > 1
    assert chisquare(seen, [value * total for value in expected]).pvalue > 0.001


def first_token_probabilities(folder, prompt, options):
    """What ``do_sample`` would draw from: each text and its probability."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} | options
    output = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **names,
    )
    probabilities = Counter()
    for token, probability in enumerate(output.scores[0][0].softmax(0).tolist()):
        if probability > 0:
            text = tokenizer.decode([token], skip_special_tokens=True)
            probabilities[text] += probability
    return probabilities


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_text_ends_before_a_stop_string_wherever_its_tokens_end(write, length):
    whole, _ = write(max_tokens=30)
    for at in range(2, len(whole) - length, 7):
        stop = whole[at : at + length]
        text, metadata = write(max_tokens=30, stop=["never written", stop])
        assert text == whole.split(stop)[0]
        assert metadata["finish_reason"] == "stop"
        tokens = metadata["usage"]["output_tokens"]
        assert stop in write(max_tokens=tokens)[0]
        assert tokens == 1 or stop not in write(max_tokens=tokens - 1)[0]


@pytest.mark.parametrize("model", ["shared-llama", "shared-endless"])
def test_rows_of_a_batch_stop_each_for_itself(write, model):
    texts = [sentence(words, words) for words in (3, 8, 1, 20)]
    wholes = [write(text, model, max_tokens=24)[0] for text in texts]
    stop = wholes[0][4:6]
    together, metadata = write(texts, model, max_tokens=24, stop=[stop])
    alone = [write(text, model, max_tokens=24, stop=[stop]) for text in texts]
    assert together == [text for text, _ in alone] == [whole.split(stop)[0] for whole in wholes]
    assert metadata["finish_reason"] == [one["finish_reason"] for _, one in alone]
    tokens = sum(one["usage"]["output_tokens"] for _, one in alone)
    assert metadata["usage"]["output_tokens"] == tokens
    assert tokens < 24 * len(texts)


def test_the_prompts_own_end_is_no_part_of_a_stop_string(write):
    whole, _ = write(model="shared-endless", max_tokens=10)
    text, metadata = write(model="shared-endless", max_tokens=10, stop=[PROMPT[-1] + whole[:1]])
    assert text == whole
    assert metadata["finish_reason"] == "length"


def test_a_text_as_long_as_allowed_finishes_for_length(write):
    _, metadata = write(max_tokens=7)
    assert metadata["finish_reason"] == "length"
    assert metadata["usage"]["output_tokens"] == 7


def test_min_tokens_keeps_a_text_from_ending_early(write):
    drawn = {"temperature": 2.0, "max_tokens": 60}
    seeds = range(100)
    reasons = write([PROMPT] * len(seeds), seed=0, **drawn)[1]["finish_reason"]
    early = [seed for seed, reason in zip(seeds, reasons, strict=True) if reason == "stop"]
    assert 0 < len(early) < len(seeds)
    _, metadata = write(seed=early[0], **drawn)
    assert metadata["finish_reason"] == "stop"
    assert metadata["usage"]["output_tokens"] < 60
    _, metadata = write(seed=early[0], min_tokens=60, **drawn)
    assert metadata["finish_reason"] == "length"
    assert metadata["usage"]["output_tokens"] == 60


def test_a_text_ends_at_the_window_for_length(write):
    _, metadata = write(sentence(20), "shared-gpt2", max_tokens=100, min_tokens=100)
    usage = metadata["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == GPT2_WINDOW
    assert metadata["finish_reason"] == "length"


@pytest.mark.parametrize("model", ["shared-gpt2", "shared-endless"])
def test_a_row_at_the_windows_end_neither_breaks_its_batch_nor_runs_over(write, caplog, model):
    options = {"max_tokens": 40, "min_tokens": 40, "repetition_penalty": 1.3}
    texts = [sentence(1), sentence(20 if model == "shared-gpt2" else 175), sentence(4)]
    together, metadata = write(texts, model, **options)
    alone = [write(text, model, **options) for text in texts]
    assert together == [text for text, _ in alone]
    tokens = sum(one["usage"]["output_tokens"] for _, one in alone)
    assert metadata["usage"]["output_tokens"] == tokens < 3 * 40
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_padding_does_not_count_as_repeated(write):
    options = {"temperature": 2.0, "max_tokens": 40, "repetition_penalty": 3.0}
    for first in range(0, 30, 6):
        texts = [*(sentence(1, seed) for seed in range(first, first + 6)), sentence(12)]
        together, metadata = write(texts, seed=first, **options)
        assert metadata["batch_size"] == 7
        alone = [write(text, seed=first + i, **options)[0] for i, text in enumerate(texts)]
        assert together == alone


def test_beams_near_the_windows_end_are_searched_as_if_alone(write):
    texts = [sentence(words, words) for words in (20, 23, 26, 3, 1, 28)]
    options = {"model": "shared-gpt2", "max_tokens": 30, "num_beams": 4}
    together, _ = write(texts, **options)
    assert together == [write(text, **options)[0] for text in texts]


def test_a_prompt_longer_than_the_window_is_refused_and_only_that_call(write, refused):
    long = sentence(80)
    fine = write(PROMPT, "shared-gpt2", max_tokens=5)[0]
    details = refused([PROMPT, PROMPT, PROMPT, long], "shared-gpt2", max_tokens=5)
    assert list(details) == ["input[3]"]
    assert f"the model's window is {GPT2_WINDOW}" in details["input[3]"]
    details, *answers = at_once(
        [lambda: refused(long, "shared-gpt2", max_tokens=5)]
        + [lambda: write(PROMPT, "shared-gpt2", max_tokens=5)] * 7
    )
    assert list(details) == ["input"]
    assert [output for output, _ in answers] == [fine] * 7


def test_truncate_keeps_the_prompts_end_and_the_receipt_says_so(write):
    long = sentence(80)
    options = {"model": "shared-gpt2", "max_tokens": 10, "truncate": True}
    text, metadata = write(long, **options)
    assert metadata["truncated"] is True
    assert metadata["usage"]["input_tokens"] == GPT2_WINDOW - 10
    assert write("other words before it " + long, **options)[0] == text
    assert "truncated" not in write(PROMPT, **options)[1]
    together, metadata = write([PROMPT, long], **options)
    assert metadata["truncated"] == [None, True]
    assert together[1] == text


def test_truncate_leaves_half_the_window_to_the_prompt(write):
    _, metadata = write(sentence(80), "shared-gpt2", max_tokens=1000, truncate=True)
    assert metadata["usage"]["input_tokens"] == GPT2_WINDOW // 2


def test_truncate_keeps_the_start_of_what_is_summarized(write, refused):
    long = sentence(100)
    assert list(refused(long, "shared-bart", max_tokens=8)) == ["input"]
    text, metadata = write(long, "shared-bart", max_tokens=8, truncate=True)
    assert metadata["truncated"] is True
    assert metadata["usage"]["input_tokens"] == 64
    assert write(long + " and more", "shared-bart", max_tokens=8, truncate=True)[0] == text


def test_any_unicode_is_a_prompt(write):
    for text in ("\u200b", "é" * 9, "日本語\U0001f30d", "\x00", "<s></s>", "a\u0301\u202e"):
        assert write(text, max_tokens=2)[1]["usage"]["output_tokens"] == 2


def test_a_chat_templates_refusal_reaches_the_caller_in_its_own_words(write, refused):
    user = {"role": "user", "content": "hello"}
    assert write({"messages": [user]}, "shared-chat", max_tokens=2)[0]
    details = refused({"messages": [user, user]}, "shared-chat", max_tokens=2)
    assert "roles must alternate" in details["input.messages"]
    batch = [{"messages": [user]}, {"messages": [user, user]}]
    assert list(refused(batch, "shared-chat")) == ["input[1].messages"]


def test_a_language_that_the_model_does_not_know_is_refused(write, refused):
    for option in ("source_language", "target_language"):
        for code in ("xx", "<mask>", "</s>", "a"):
            details = refused("a river", "shared-nllb", max_tokens=2, **{option: code})
            assert list(details) == [f"options.{option}"]
    assert list(refused("a", "shared-nllb", target_language="", max_tokens=2))


def test_a_source_language_does_not_outlive_its_call(write):
    plain = write("a river", "shared-nllb", max_tokens=6)[0]
    other = write("a river", "shared-nllb", max_tokens=6, source_language="deu_Latn")[0]
    assert other != plain
    assert write("a river", "shared-nllb", max_tokens=6)[0] == plain


@pytest.mark.parametrize("options", [{}, {"stop": ["never written"]}, {"num_beams": 2}], ids=str)
def test_a_text_that_nobody_waits_for_stops_at_the_next_token(make_app, checkpoint, options):
    entry = {"id": "t5", "type": "text2text-generation", "hf_model": checkpoint("t5")}
    client = make_app([entry], request_timeout_s=1.0).test_client()
    short = {"max_tokens": 1}
    while run(client, "t5", PROMPT, options=short).status_code != 200:
        pass
    endless = {"max_tokens": 32768, "min_tokens": 32768, **options}
    assert run(client, "t5", PROMPT, options=endless).status_code == 504
    # In time, though all those tokens would take minutes.
    assert run(client, "t5", PROMPT, options=short).status_code == 200
