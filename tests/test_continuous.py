"""Texts that are written together: who joins, who leaves, and that nobody notices the others."""

from __future__ import annotations

import gc
import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers

from backend.adapters import continuous, packing, slots
from backend.adapters.base import Prediction, too_late
from backend.adapters.echo import Echo
from backend.adapters.footprint import count
from backend.adapters.packing import FEW, MANY, PATIENCE, SETTLED, Packing
from backend.adapters.prefill import shares
from backend.adapters.prefixes import LEAST, Prefixes
from backend.adapters.slot_trial import layout_of
from backend.errors import DeadlineExceeded, InvalidRequest
from tests.checkpoints import checkpoint, sentence
from tests.conftest import run, together, write_models
from tests.serving import Gunicorn, wait_for

__all__ = ["checkpoint"]

CHAT = {"messages": [{"role": "user", "content": "the old tower"}]}
MIXED = ["sliding_attention", "full_attention"]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Each with whether its texts can be written in slots: not where positions are no numbers of their
# own, where attention is in a way of its own, and where there is no list of keys and values.
MODELS = {
    "Llama": ({}, True),
    "Qwen2": ({"num_key_value_heads": 2}, True),
    "Qwen3": ({"num_key_value_heads": 2, "head_dim": 16}, True),
    "Gemma": ({"head_dim": 8, "num_key_value_heads": 1}, True),
    "Phi": ({}, True),
    "GPTNeoX": ({}, True),
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, True),
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, True),
    "Mistral": ({"sliding_window": 8, "num_key_value_heads": 2}, True),
    "Gemma3Text": ({"head_dim": 8, "sliding_window": 8, "layer_types": MIXED}, True),
    "Gemma2": ({"head_dim": 8, "sliding_window": 8, "layer_types": MIXED}, False),
    "Llama4Text": ({"head_dim": 8, "attention_chunk_size": 8}, False),
    "Bloom": ({"n_layer": 2, "n_head": 4}, False),
    "Mamba": ({}, False),
}


def model_of(name):
    special, _ = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SMALL | special)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.layout = layout_of(model)
    return model


class Written:
    """A feed of prompts that all come at once, with what is written for each."""

    def __init__(self, prompts):
        self.waiting = list(enumerate(prompts))
        self.texts = {}

    def take(self, most):
        taken, self.waiting = self.waiting[:most], self.waiting[most:]
        return [entry(place, prompt) for place, prompt in taken]

    def answer(self, entry, prediction):
        self.texts[entry.place] = prediction

    def token(self, place):
        pass


class Left(list):
    """A prompt whose caller leaves at some time."""

    def after():
        return False


def entry(place, prompt):
    class Entry:
        def __init__(self):
            self.place, self.input = place, prompt
            self.options, self.seed, self.listens = {}, None, False
            self.caller, self.prepared = "", None

        def cancelled(self):
            return isinstance(prompt, Left) and Left.after()

    return Entry()


class Ids:
    """In place of a tokenizer: a token's text is its number."""

    def decode(self, ids, **how):
        return " ".join(map(str, ids))


class Noted(continuous.Completion):
    """Tells of each of its tokens."""

    def __init__(self, note, *args, **how):
        super().__init__(*args, **how)
        self.note = note

    def take(self, token):
        self.note()
        super().take(token)


def written_by(model, prompts=(), most=16, room=12, feed=None, **how):
    feed = feed or Written(prompts)

    def begin(entry):
        options = {"repetition_penalty": 1, "min_tokens": 0, "temperature": 0}
        options |= {"presence_penalty": 0, "frequency_penalty": 0, "top_logprobs": None}
        return continuous.Text(
            entry=entry,
            prompt=entry.input,
            room=room,
            cut=False,
            completion=Noted(
                lambda: feed.token(entry.place),
                Ids(),
                prompt_tokens=len(entry.input),
                room=room,
                ends={1},
                stop=[],
            ),
            sampling=continuous.Sampling(options, None, prompt=[], ends={1}, device="cpu"),
        )

    how = {"most_texts": most, "most_tokens": 10**6, "before_run": lambda rows: None} | how
    with torch.inference_mode():
        kept = how.pop("kept", None) or Prefixes(10**6)
        batch = continuous.ContinuousBatch(model, model.layout, kept, begin, str, **how)
        batch.run(feed)
    return [feed.texts[place] for place in range(len(feed.texts))]


def runs_of(monkeypatch):
    """How many tokens of each text every run has, from now on."""
    runs = []
    real = slots.Decoder.run

    def run(self, tokens):
        runs.append([len(some) for some in tokens])
        return real(self, tokens)

    monkeypatch.setattr(slots.Decoder, "run", run)
    return runs


def alone(model, prompt):
    """What the library's own ``generate`` writes, without the token that ends it."""
    ids = torch.tensor([prompt])
    [text] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    text = text[len(prompt) :].tolist()
    return " ".join(map(str, text[: text.index(1)] if 1 in text else text))


def prompts_of(count, most=60):
    draw = random.Random(count)
    return [[draw.randrange(3, 300) for _ in range(draw.randrange(1, most))] for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_tried_out_before_texts_are_written_in_slots(name):
    assert (model_of(name).layout is not None) == MODELS[name][1]


def test_what_did_well_is_not_tried_out_again_and_what_differs_is(monkeypatch):
    model_of("Llama")
    runs = runs_of(monkeypatch)
    assert model_of("Llama").layout is not None
    assert not runs
    monkeypatch.setitem(SMALL, "num_hidden_layers", 3)
    assert model_of("Llama").layout is not None
    assert runs


@pytest.mark.parametrize("name", [name for name, (_, fits) in MODELS.items() if fits])
def test_texts_are_what_the_library_writes_for_each_alone(name):
    model, prompts = model_of(name), prompts_of(20)
    texts = written_by(model, prompts, most=6)
    assert [text.output for text in texts] == [alone(model, prompt) for prompt in prompts]
    assert {text.facts["finish_reason"] for text in texts} <= {"stop", "length"}


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "Gemma3Text", "GPT2"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_any_parts_of_texts_run_together_as_each_alone(monkeypatch, name, dtype, most):
    """Each of up to eight gets on by some tokens or by one, in whatever slot it has come to."""
    # Weights so large that attention looks at one token alone make much of bfloat16's roundings.
    monkeypatch.setitem(SMALL, "initializer_range", 0.4 if dtype == torch.float32 else 0.1)
    model, draw = model_of(name).to(dtype), random.Random(name)
    decoder, texts = slots.Decoder(model, model.layout), []
    with torch.inference_mode():
        for _ in range(40):
            while len(texts) < 3 or (len(texts) < 8 and draw.random() < 0.3):
                decoder.add()
                texts.append([])
            parts = [
                [draw.randrange(3, 300) for _ in range(draw.choice([1, 1, 1, 2, 9]))] for _ in texts
            ]
            scores = decoder.run(parts)
            for text, part, own in zip(texts, parts, scores, strict=True):
                text += part
                wanted = model(input_ids=torch.tensor([text])).logits[0, -1]
                assert (own - wanted).abs().max() < most * max(1, wanted.abs().max())
            assert decoder.lengths == [len(text) for text in texts]
            for slot in reversed(range(len(texts))):
                if len(texts[slot]) > 80 or draw.random() < 0.1:
                    decoder.drop(slot)
                    texts[slot] = texts[-1]
                    texts.pop()


def test_the_cache_has_room_for_the_texts_that_are_there_not_for_those_that_were():
    model = model_of("Llama")
    decoder = slots.Decoder(model, model.layout)

    def tokens_with_room():
        keys, _ = decoder._slots._parts[0]
        return keys.shape[0] * keys.shape[2]

    with torch.inference_mode():
        for _ in range(16):
            decoder.add()
        decoder.run([[5] * 20] * 16)
        while len(decoder.lengths) > 1:
            decoder.drop(0)
        decoder.run([[6] * 480])
        assert 500 <= tokens_with_room() <= 600
        decoder.add()
        decoder.run([[6], [5] * 20])
        decoder.drop(0)
        for _ in range(14):
            decoder.add()
        decoder.run([[5]] + [[5] * 20] * 14)
        assert 300 <= tokens_with_room() <= 600


def test_short_prompts_are_not_padded_to_the_longest():
    draw = random.Random(3)
    for _ in range(200):
        counts = [draw.choice([1, 1, 2, 30, 400]) for _ in range(draw.randrange(1, 40))]
        groups = slots._groups([7] * len(counts), counts, torch.device("cpu"), None)
        sizes = [group.shape for group in groups]
        assert sum(slots for slots, _ in sizes) == len(counts)
        assert sum(slots * tokens for slots, tokens in sizes) <= 2 * sum(counts)


def test_what_nobody_waits_for_stops_at_the_next_token(monkeypatch):
    model, prompts = model_of("Llama"), prompts_of(4)
    runs = runs_of(monkeypatch)
    monkeypatch.setattr(Left, "after", lambda: len(runs) >= 4)
    prompts[1] = Left(prompts[1])
    texts = written_by(model, prompts)
    assert isinstance(texts[1], DeadlineExceeded)
    assert runs[1:5] == [[1] * 4, [1] * 4, [1] * 4, [1] * 3]
    assert [text.output for text in texts[:1] + texts[2:]] == [
        alone(model, prompt) for prompt in prompts[:1] + prompts[2:]
    ]


@pytest.mark.parametrize(
    ("length", "place"), [(20, 0), (60, 58), (1040, 0), (1040, 700), (1040, 1030)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_without_numbers_is_told_so_and_breaks_no_other(length, place, dtype):
    """Nor one that comes after it, where it was; a long one is read in parts."""
    model, prompts = model_of("Llama"), prompts_of(12)
    prompts = [[9, *(token for token in prompt if token != 7)] for prompt in prompts]
    prompts[2] = [7 if i == place else 8 for i in range(length)]
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.inf  # as of float16 where it overflows
    texts = written_by(model.to(dtype), prompts, most=4)
    assert [isinstance(text, Prediction) for text in texts] == [True] * 2 + [False] + [True] * 9
    assert "float16" in texts[2].message
    if dtype == torch.float32:  # which writes the same alone, to the last token
        assert not isinstance(written_by(model, prompts, room=1)[2], Prediction)
        del texts[2], prompts[2]
        assert [text.output for text in texts] == [alone(model, prompt) for prompt in prompts]


def test_a_text_that_comes_to_have_no_numbers_breaks_no_other():
    model = model_of("Llama")
    prompts = [[3 + token % 90 for token in prompt] for prompt in prompts_of(16)]
    prompts.sort(key=len, reverse=True)  # so that the slot of a long one gets a shorter one
    expected = [alone(model, prompt) for prompt in prompts]
    used = Counter(token for prompt in prompts for token in set(prompt))
    used.update(int(token) for text in expected for token in set(text.split()))
    # A token that one of them writes, and goes on from, and that is in no other.
    ends = [
        (place, token)
        for place, text in enumerate(expected)
        for token in map(int, text.split()[:-1])
        if used[token] == 1
    ]
    assert len(ends) > 5
    weight = model.get_input_embeddings().weight.detach()
    for place, token in ends:
        before = weight[token].clone()
        weight[token] = torch.inf
        texts = written_by(model, prompts, most=4)
        weight[token] = before
        assert not isinstance(texts.pop(place), Prediction)
        assert [text.output for text in texts] == expected[:place] + expected[place + 1 :]


@pytest.mark.parametrize("setting", ["no_repeat_ngram_size", "forced_eos_token_id"])
def test_what_only_generate_does_is_left_to_it(setting):
    model = model_of("Llama")
    setattr(model.generation_config, setting, 2)
    assert layout_of(model) is None


def test_long_prompts_are_read_in_parts_and_others_are_written_meanwhile(monkeypatch):
    monkeypatch.setattr(continuous, "READ_TOKENS", 16)
    model = model_of("Llama")
    prompts = [[5, 6], *prompts_of(6, most=100)]
    runs = runs_of(monkeypatch)
    texts = written_by(model, prompts)
    assert [text.output for text in texts] == [alone(model, prompt) for prompt in prompts]
    assert runs[0][0] == 2
    assert all(sum(run) <= 16 + len(prompts) for run in runs)


class Coming(Written):
    """A feed of prompts of which some come later: each with its caller, and the run that it is for.

    ``began`` and ``first`` have the runs in which each was taken, and got its first token.
    """

    def __init__(self, coming, runs):
        self.coming, self.runs, self.texts = dict(enumerate(coming)), runs, {}
        self.began, self.first = {}, {}

    def take(self, most):
        due = [place for place, (at, *_) in self.coming.items() if at <= len(self.runs)][:most]
        taken = []
        for place in due:
            _, caller, prompt = self.coming.pop(place)
            taken.append(entry(place, prompt))
            taken[-1].caller = caller
            self.began[place] = len(self.runs)
        return taken

    def token(self, place):
        self.first.setdefault(place, len(self.runs))


def written_as_they_come(model, coming, monkeypatch, **how):
    runs = runs_of(monkeypatch)
    feed = Coming(coming, runs)
    texts = written_by(model, feed=feed, **how)
    return feed, runs, texts


@pytest.mark.parametrize("callers", ["ab", "aa"])
def test_a_short_prompt_does_not_wait_for_a_long_one(monkeypatch, callers):
    monkeypatch.setattr(continuous, "READ_TOKENS", 16)
    model = model_of("Llama")
    long, short, longer = prompts_of(1, most=2)[0] * 100, [7, 8, 9], [11, *range(20, 110)]
    coming = [(0, callers[0], long), (1, callers[0], longer), (2, callers[1], short)]
    feed, _, texts = written_as_they_come(model, coming, monkeypatch)
    assert feed.first[2] - feed.began[2] == 1
    assert feed.first[0] > 6
    wanted = [alone(model, prompt) for *_, prompt in coming]
    assert [text.output for text in texts] == wanted


def test_a_long_prompt_is_read_however_many_short_ones_come(monkeypatch):
    monkeypatch.setattr(continuous, "READ_TOKENS", 16)
    model, long = model_of("Llama"), list(range(10, 110))
    coming = [(0, "a", long)]
    coming += [
        (run, "b", [3 + run, place, *range(60, 75)]) for run in range(60) for place in (4, 5)
    ]
    feed, _, texts = written_as_they_come(model, coming, monkeypatch, room=2)
    assert feed.first[0] <= 1 + 4 * len(long) // 16
    assert texts[0].output == alone(model, long)[: len(texts[0].output)]


@pytest.mark.parametrize(("bound_s", "first"), [(1e9, "small"), (0.0, "large")])
def test_a_text_that_is_too_large_for_now_is_overtaken_for_a_while(monkeypatch, bound_s, first):
    monkeypatch.setattr(continuous, "AGE_BOUND_S", bound_s)
    model = model_of("Llama")
    coming = [(0, "a", [5] * 4), (1, "a", list(range(10, 60))), (2, "a", [6, 7])]
    feed, _, texts = written_as_they_come(model, coming, monkeypatch, most_tokens=60)
    assert (feed.first[2] < feed.first[1]) == (first == "small")
    assert [text.output for text in texts] == [alone(model, prompt) for *_, prompt in coming]


def test_who_has_fewest_texts_is_admitted_first(monkeypatch):
    model = model_of("Llama")
    coming = [(0, "a", [5 + place, 6]) for place in range(6)] + [(0, "b", [9, 9])]
    feed, _, _ = written_as_they_come(model, coming, monkeypatch, most_tokens=3 * 14)
    assert feed.first[6] == min(feed.first.values())


@pytest.mark.parametrize("max_tokens", [16, 64, 512])
def test_a_run_is_shared_by_all_in_prefill(max_tokens):
    draw = random.Random(max_tokens)
    for _ in range(300):
        unread = [
            (draw.choice("abc"), draw.choice([1, 5, 40, 400, 4000]))
            for _ in range(draw.randrange(1, 16))
        ]
        counts = shares(unread, max_tokens)
        assert all(1 <= count <= left for count, (_, left) in zip(counts, unread, strict=True))
        whole = sum(left for _, left in unread)
        assert (
            min(whole, max_tokens) <= sum(counts) <= max(max_tokens, len(counts) + max_tokens // 4)
        )
        assert counts[0] >= min(unread[0][1], max_tokens // 4)


def test_of_each_caller_the_shortest_prompt_is_read_first():
    unread = [("a", 900), ("a", 100), ("a", 100), ("b", 120), ("b", 500)]
    assert shares(unread, 512) == [129, 100, 100, 120, 63]
    assert shares(unread, 64) == [17, 44, 1, 1, 1]


def test_texts_wait_for_memory_and_all_are_written():
    model, prompts = model_of("Llama"), prompts_of(12)
    texts = written_by(model, prompts, most_tokens=100)
    assert [text.output for text in texts] == [alone(model, prompt) for prompt in prompts]


def test_one_that_is_more_than_the_memory_is_for_is_written_alone():
    model, prompts = model_of("Llama"), prompts_of(3)
    texts = written_by(model, prompts, most_tokens=1)
    assert [text.output for text in texts] == [alone(model, prompt) for prompt in prompts]


def test_the_beginning_that_prompts_have_in_common_is_read_once(monkeypatch):
    model, kept = model_of("Llama"), Prefixes(10**6)
    begins = prompts_of(1, most=2)[0] + list(range(10, 10 + LEAST))
    prompts = [[*begins, *rest] for rest in prompts_of(8, most=10)]
    first = written_by(model, prompts[:1], kept=kept)
    runs = runs_of(monkeypatch)
    others = written_by(model, prompts[1:], kept=kept)
    assert runs[0] == sorted(len(prompt) - len(begins) for prompt in prompts[1:])
    texts = [*first, *others]
    assert [text.output for text in texts] == [alone(model, prompt) for prompt in prompts]
    assert "cached_tokens" not in first[0].usage
    assert [text.usage["cached_tokens"] for text in others] == [len(begins)] * 7


@pytest.mark.parametrize(("callers", "times"), [("aaaa", 1), ("abcd", 4)])
def test_a_beginning_that_is_being_read_is_waited_for_by_its_caller_alone(
    monkeypatch, callers, times
):
    model, begins = model_of("Llama"), list(range(10, 10 + 2 * LEAST))
    coming = [(0, caller, [*begins, place]) for place, caller in enumerate(callers)]
    feed, runs, texts = written_as_they_come(model, coming, monkeypatch, room=2)
    assert len(set(feed.first.values())) == (1 if times == 4 else 2)
    read = sum(count for run in runs for count in run)
    assert times * len(begins) <= read < (times + 1) * len(begins)
    assert [text.usage.get("cached_tokens", 0) for text in texts] == [
        len(begins) if place >= times else 0 for place in range(4)
    ]


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuous")
    model = {"type": "text-generation", "hf_model": checkpoint("llama_without_end")}
    entries = [
        {"id": "writer", **model, "max_batch_size": 64},
        {"id": "chat", "type": "chat", "hf_model": checkpoint("llama")},
        {"id": "shared", "type": "chat", "hf_model": checkpoint("llama"), "share_prefixes": True},
        {"id": "endless", "type": "text2text-generation", "hf_model": checkpoint("t5")},
    ]
    # So that callers have addresses, and need no keys.
    settings = {"CRANE_THREADS": 64, "CRANE_TRUSTED_PROXIES": 1, "CRANE_AUTH": "off"}
    server = Gunicorn(write_models(folder, entries), folder / "data", settings).wait_until_ready()
    assert server.run("writer", "a", options={"max_tokens": 1})[0] == 200
    yield server
    server.stop()


def tokens(answer):
    return answer["metadata"]["usage"]["output_tokens"]


def text_of(events):
    return "".join(data["text"] for name, data in events if name == "delta")


def test_a_short_call_is_answered_beside_a_long_one(server):
    long = server.stream("writer", "a", options={"max_tokens": 240})
    long.until("delta")
    status, short = server.run("writer", "b", options={"max_tokens": 4})
    assert status == 200
    assert short["metadata"]["batch_size"] == 2
    left = [data["text"] for name, data in long if name == "delta"]
    assert left  # the long one goes on after it
    assert short["output"] == server.run("writer", "b", options={"max_tokens": 4})[1]["output"]


def test_calls_that_differ_in_all_their_options_run_together_and_as_alone(server):
    draw = random.Random(2)
    calls = []
    for place in range(24):
        options = {
            "max_tokens": draw.randrange(20, 60),
            "temperature": draw.choice([0, 0, 0.7, 1.5]),
            "top_p": draw.choice([1.0, 0.8]),
            "top_k": draw.choice([0, 5, 40]),
            "min_tokens": draw.choice([0, 10]),
            "repetition_penalty": draw.choice([1.0, 1.0, 1.4]),
            "stop": draw.choice([[], ["a"]]),
            "seed": place,
        }
        calls.append((sentence(draw.randrange(1, 20), place), options))
    plain = [server.run("writer", text, options=options)[1] for text, options in calls]
    at_once = threading.Barrier(len(calls))

    def call(text, options):
        at_once.wait()
        return server.run("writer", text, options=options)[1]

    for _ in range(5):  # on a busy machine they may come one after the other
        with ThreadPoolExecutor(len(calls)) as pool:
            answers = list(pool.map(call, *zip(*calls, strict=True)))
        assert [one["output"] for one in answers] == [one["output"] for one in plain]
        if (most := max(one["metadata"]["batch_size"] for one in answers)) > 8:
            break
    assert most > 8
    for one, other in zip(answers, plain, strict=True):
        for name in ("options", "seed", "finish_reason"):
            assert one["metadata"].get(name) == other["metadata"].get(name)
        assert tokens(one) == tokens(other)


def test_a_search_with_beams_waits_for_no_more_than_who_was_there_before(server):
    """While texts without end keep joining, at any time some of them are being written."""
    over = threading.Event()

    def keep_busy(place):
        while not over.is_set():
            assert server.run("writer", str(place), options={"max_tokens": 100})[0] == 200

    threads = [threading.Thread(target=keep_busy, args=[place]) for place in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: server.get("/crane/models/writer")[1]["running"])
        status, beams = server.run("writer", "a", options={"max_tokens": 5, "num_beams": 2})
        assert status == 200
        assert beams["metadata"]["batch_size"] == 1
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


def test_no_token_of_a_caller_reaches_another_in_500_streams_of_which_some_are_cut(server):
    """Each prompt has a text of its own, and a stream has that text or the beginning of it."""
    draw = random.Random(9)
    prompts = [f"caller {place}: {sentence(3, place)}" for place in range(50)]
    options = {"max_tokens": 24}
    texts = [server.run("writer", prompt, options=options)[1]["output"] for prompt in prompts]
    assert len(set(texts)) == 50
    order = [place for place in range(50) for _ in range(10)]
    draw.shuffle(order)
    cuts = [draw.randrange(1, 20) if draw.random() < 0.3 else None for _ in order]
    wrong, done = [], []

    def call(numbers):
        for number in numbers:
            place, cut = order[number], cuts[number]
            stream = server.stream("writer", prompts[place], options=options)
            text, deltas = "", 0
            for name, data in stream:
                if name == "delta":
                    text, deltas = text + data["text"], deltas + 1
                if deltas == cut:
                    stream.leave()
                    break
            whole = texts[place]
            if not (whole.startswith(text) if cut else text == whole):
                wrong.append((prompts[place], text))
            done.append(number)

    threads = [threading.Thread(target=call, args=[range(n, 500, 32)]) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(done) == list(range(500))
    assert wrong == []
    wait_for(lambda: not server.get("/crane/models/writer")[1]["running"])


def usage_of_a_chat(server, model_id, content, caller):
    messages = [{"role": "user", "content": content}]
    body = {"model_id": model_id, "input": {"messages": messages}, "options": {"max_tokens": 4}}
    status, answer = server.post(body, **{"X-Forwarded-For": caller})
    assert status == 200, answer
    return answer["metadata"]["usage"]


def test_a_conversations_beginning_is_told_as_cached_to_its_caller_alone(server):
    told = sentence(45, 1)
    calls = [("one", "192.0.2.1"), ("two", "192.0.2.1"), ("two", "192.0.2.2"), ("two", "192.0.2.1")]
    first, second, others, third = (
        usage_of_a_chat(server, "chat", f"{told} {question}", caller) for question, caller in calls
    )
    assert "cached_tokens" not in first
    assert LEAST <= second["cached_tokens"] < second["input_tokens"]
    assert "cached_tokens" not in others
    assert LEAST <= third["cached_tokens"] < third["input_tokens"]


def test_what_callers_share_is_not_counted(server):
    told = sentence(45, 2)
    for caller in ("192.0.2.1", "192.0.2.1", "192.0.2.2"):
        assert "cached_tokens" not in usage_of_a_chat(server, "shared", told, caller)


class Together(Echo):
    """Answers inputs one after another, a step for all of them at a time."""

    steps = 3

    def joins(self, options):
        return options["delay_ms"] == 0

    def check(self, running):
        """Fail, where there is something to fail at."""

    def roll(self, feed, most):
        running = []
        while True:
            running += [[entry, 0] for entry in feed.take(most - len(running))]
            if not running:
                return
            self.check([entry for entry, _ in running])
            for one in list(running):
                entry = one[0]
                one[1] += 1
                if entry.cancelled():
                    feed.answer(entry, too_late())
                elif entry.input == "refused":
                    feed.answer(entry, InvalidRequest.of({"input": "is refused"}))
                elif one[1] >= self.steps and entry.input != "endless":
                    feed.answer(entry, Prediction(entry.input))
                else:
                    continue
                running.remove(one)


def call_all(client, model_id, inputs):
    return together(client, [{"model_id": model_id, "input": one} for one in inputs])


def test_one_that_fails_in_a_run_fails_alone(make_app, add_task, capsys):
    class Fragile(Together):
        def check(self, running):
            if any(entry.input == "bad" for entry in running):
                raise RuntimeError("cannot")

    client = make_app([add_task("fragile", Fragile)]).test_client()
    inputs = ["a", "bad", "refused", *map(str, range(9))]
    answers = call_all(client, "fragile", inputs)
    assert [answer.status_code for answer in answers] == [200, 500, 400, *[200] * 9]
    assert [answer.json["output"] for answer in answers[3:]] == inputs[3:]
    assert "failed a batch of" in capsys.readouterr().err


def test_too_many_for_the_memory_run_again_by_fewer(make_app, add_task):
    sizes = []

    class Big(Together):
        def check(self, running):
            sizes.append(len(running))
            if len(running) > 2:
                raise MemoryError

    app = make_app([add_task("big", Big)])
    answer = run(app.test_client(), "big", list(range(8)))
    assert answer.status_code == 200
    assert answer.json["output"] == list(range(8))
    assert max(sizes) == 8
    assert sizes[-1] <= 2
    again = run(app.test_client(), "big", list(range(8)))
    assert again.json["metadata"]["batch_size"] <= 2  # which was learnt


def test_one_that_is_too_much_by_itself_is_told_so(make_app, add_task):
    class TooBig(Together):
        def check(self, running):
            raise MemoryError

    client = make_app([add_task("too-big", TooBig)]).test_client()
    answers = call_all(client, "too-big", ["a", "b"])
    assert [answer.json["error"]["code"] for answer in answers] == ["OUT_OF_MEMORY"] * 2
    assert run(client, "too-big").status_code == 503


def test_what_cannot_join_runs_as_a_batch_between_two_runs(make_app, add_task):
    client = make_app([add_task("both", Together)]).test_client()
    body = {"model_id": "both", "input": "x"}
    requests = [{**body, "options": {"delay_ms": delay}} for delay in (0, 1, 0, 1, 0)]
    assert [answer.status_code for answer in together(client, requests)] == [200] * 5


def test_a_deadline_ends_one_of_a_run_and_not_the_others(make_app, add_task):
    class Slow(Together):
        def check(self, running):
            time.sleep(0.05)

    app = make_app([add_task("slow", Slow)], request_timeout_s=1)
    answers = call_all(app.test_client(), "slow", ["a", "endless", "b"])
    assert [answer.status_code for answer in answers] == [200, 504, 200]


def test_a_model_in_use_can_leave_though_new_inputs_keep_joining(make_app, add_task):
    unloaded = threading.Event()

    class Busy(Together):
        steps = 20

        def check(self, running):
            time.sleep(0.002)

        def unload(self):
            unloaded.set()

    app = make_app([add_task("busy", Busy)])
    over = threading.Event()

    def call(place):
        time.sleep(0.01 * place)  # so that one begins before the others end
        while not over.is_set():
            assert run(app.test_client(), "busy").status_code == 200

    threads = [threading.Thread(target=call, args=[place]) for place in range(4)]
    for thread in threads:
        thread.start()
    try:
        [worker] = wait_for(
            lambda: [
                worker
                for worker in app.extensions["crane"].engine._engine._pool._workers.values()
                if worker.users >= 3
            ]
        )
        assert worker.leave(though_used=True)
        assert unloaded.wait(5)
    finally:
        over.set()
        for thread in threads:
            thread.join(30)


def test_a_run_keeps_nothing_of_its_texts():
    model = model_of("Llama")
    before = len([one for one in gc.get_objects() if isinstance(one, torch.Tensor)])
    written_by(model, prompts_of(8), kept=Prefixes(0))
    gc.collect()
    after = len([one for one in gc.get_objects() if isinstance(one, torch.Tensor)])
    assert after <= before + 2


def test_packed_weights_give_what_they_gave_and_are_counted():
    model = model_of("Llama").bfloat16()
    ids = torch.tensor([[5, 6, 7, 8]])
    weight = model.lm_head.weight.clone()
    before, size = model(ids).logits, count(SimpleNamespace(model=model))
    Packing(model)
    if isinstance(model.lm_head, torch.nn.Linear):
        pytest.skip("this processor has no kernels for it")
    assert not [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert (model(ids).logits - before).abs().max() < 0.02 * before.abs().max()
    assert torch.equal(model.lm_head.weight, weight)
    assert count(SimpleNamespace(model=model)) == size
    assert layout_of(model) is not None


def linears(model):
    return sum(isinstance(part, torch.nn.Linear) for part in model.modules())


@pytest.fixture
def pays(monkeypatch):
    """Has it found to pay, or not, to pack float32 weights for a single text."""

    def pays(always):
        monkeypatch.setattr(packing, "PAYS", 1e9 if always else 0)
        packing._pays.cache_clear()

    yield pays
    packing._pays.cache_clear()


def test_float32_weights_are_packed_for_a_single_text_where_that_pays_and_stay_so(pays):
    pays(True)
    model, prompts = model_of("Llama"), prompts_of(4)
    wanted = [alone(model, prompt) for prompt in prompts]
    layers, own = linears(model), Packing(model)
    other = model_of("Llama")
    Packing(other).before_run(MANY)
    if linears(other) == layers:
        pytest.skip("this processor has no kernels for it")
    for _ in range(SETTLED):
        own.before_run(1)
        assert linears(model) == layers
    own.before_run(1)
    assert linears(model) == layers - 1
    for _ in range(3):
        texts = [written_by(model, [prompt], before_run=own.before_run)[0] for prompt in prompts]
        assert [text.output for text in texts] == wanted
    assert not linears(model)
    for _ in range(PATIENCE + 2):
        own.before_run(1)
    assert not linears(model)


def test_bfloat16_weights_stay_packed_whatever_is_written(pays):
    pays(False)
    model = model_of("Llama").bfloat16()
    layers, own = linears(model), Packing(model)
    if linears(model) == layers:
        pytest.skip("this processor has no kernels for it")
    for _ in range(PATIENCE + layers):
        own.before_run(1)
        assert not linears(model)
    assert not packing._pays.cache_info().misses  # nothing to find out


def test_float32_weights_are_packed_one_by_one_once_many_texts_are_written(pays):
    pays(False)
    model, prompts = model_of("Llama"), prompts_of(MANY)
    wanted = [alone(model, prompt) for prompt in prompts]
    size, layers, own = count(SimpleNamespace(model=model)), linears(model), Packing(model)
    own.before_run(MANY - 1)
    assert linears(model) == layers
    own.before_run(MANY)
    if linears(model) == layers:
        pytest.skip("this processor has no kernels for it")
    assert linears(model) == layers - 1
    for _ in range(3):
        texts = written_by(model, prompts, most=MANY, before_run=own.before_run)
        assert [text.output for text in texts] == wanted
    assert not linears(model)
    own.before_run(MANY)
    for _ in range(PATIENCE + layers):
        assert not linears(model)
        own.before_run(FEW + 1)
    for _ in range(PATIENCE):
        own.before_run(FEW)
    assert not linears(model)
    for _ in range(5):
        texts = written_by(model, prompts[:1], before_run=own.before_run)
        assert [text.output for text in texts] == wanted[:1]
    assert linears(model) == layers
    assert count(SimpleNamespace(model=model)) == size


def test_a_float32_head_that_is_the_embeddings_is_no_copy_of_them(monkeypatch):
    monkeypatch.setitem(SMALL, "tie_word_embeddings", True)
    model = model_of("Llama")
    size, own = count(SimpleNamespace(model=model)), Packing(model)
    for _ in range(100):
        own.before_run(MANY)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert count(SimpleNamespace(model=model)) == size


def test_penalties_are_taken_off_what_was_written(server):
    def written(**options):
        return server.run("writer", "a", options={"max_tokens": 60, **options})[1]["output"]

    plain = written()
    assert written(frequency_penalty=0) == plain
    for name in ("frequency_penalty", "presence_penalty"):
        assert written(**{name: 2}) != plain
    assert len(set(written(presence_penalty=2).split())) >= len(set(plain.split()))


def test_log_probabilities_are_those_of_the_library(server, checkpoint):
    options = {"max_tokens": 6, "top_logprobs": 3}
    status, answer = server.run("writer", "a b", options=options)
    assert status == 200, answer
    folder = checkpoint("llama_without_end")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    told = answer["metadata"]["logprobs"]
    assert len(told) == 6
    ids = tokenizer("a b", return_tensors="pt")["input_ids"]
    for one in told:
        with torch.inference_mode():
            best, places = model(input_ids=ids).logits[0, -1].log_softmax(-1).topk(3)
        likeliest = [tokenizer.decode(place) for place in places]
        assert [top["token"] for top in one["top"]] == likeliest
        assert [top["logprob"] for top in one["top"]] == pytest.approx(best.tolist(), abs=1e-3)
        assert one["token"] == likeliest[0]  # it writes greedily
        assert one["logprob"] == one["top"][0]["logprob"]
        assert one["bytes"] in (None, list(one["token"].encode()))
        ids = torch.cat([ids, places[None, :1]], dim=1)
    penalty = server.run("writer", "a b", options={**options, "presence_penalty": 2})[1]
    first, last = penalty["metadata"]["logprobs"][0], penalty["metadata"]["logprobs"][-1]
    assert first == told[0]
    assert last["logprob"] <= last["top"][0]["logprob"]  # of the model, whatever is made of it


@pytest.mark.parametrize("seed", range(6))
def test_an_object_parses_whatever_its_model_would_write(server, seed):
    options = {"response_format": {"type": "json_object"}, "temperature": 2, "seed": seed}
    options["max_tokens"] = 8 + 7 * seed
    status, answer = server.run("chat", CHAT, options=options)
    assert status == 200, answer
    assert type(json.loads(answer["output"])) is dict
    stream = server.stream("chat", CHAT, options=options)
    assert text_of(stream) == answer["output"]


def test_a_document_that_just_fits_is_whole(server):
    options = {"response_format": {"type": "json_object"}, "max_tokens": 2}
    answer = server.run("chat", CHAT, options=options)[1]
    assert answer["output"] == "{}"
    assert answer["metadata"]["finish_reason"] == "stop"


DEEP = json.loads('{"not":' * 70 + "{}" + "}" * 70)


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"response_format": {"type": "xml"}}, "options.response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "options.response_format.schema"),
        (
            {"response_format": {"type": "json_object", "strict": 1}},
            "options.response_format.strict",
        ),
        (
            {"response_format": {"type": "json_schema", "schema": []}},
            "options.response_format.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "schema": DEEP}},
            "options.response_format.schema",
        ),
        ({"response_format": "json"}, "options.response_format"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 1}, "options.max_tokens"),
        ({"response_format": {"type": "json_object"}, "stop": ["}"]}, "options.stop"),
        ({"response_format": {"type": "json_object"}, "num_beams": 2}, "options.response_format"),
        ({"top_logprobs": 2, "num_beams": 2}, "options.top_logprobs"),
        ({"top_logprobs": 21}, "options.top_logprobs"),
        ({"presence_penalty": 2.5}, "options.presence_penalty"),
    ],
)
def test_a_wrong_option_is_named(server, options, at):
    status, answer = server.run("chat", CHAT, options=options)
    assert status == 400, answer
    assert list(answer["error"]["details"]) == [at]
