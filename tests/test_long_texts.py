"""Texts far longer than a window: no more of them is tokenised than it takes to tell so."""

from __future__ import annotations

import random

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from backend.adapters.chat_template import ends_of, told
from backend.adapters.long_texts import CHARACTERS, MARGIN, MAX_CHARACTERS, readable
from backend.errors import InvalidRequest
from tests.checkpoints import _byte_tokenizer, checkpoint
from tests.conftest import MINILM, run

__all__ = ["checkpoint"]

WINDOW = 20
MOST = MAX_CHARACTERS * (WINDOW + MARGIN)  # characters that are read of a text
LONG = MOST - 400


def shrinking():
    """As BERT's: accents and control characters go, blanks are one, a long word is one token."""
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "##a": 3, "##b": 4, "ab": 5}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def collapsing():
    """As SentencePiece's: runs of blanks are one, what is unknown is one token, however long."""
    vocab = [("<unk>", 0.0), ("▁", -2.0), ("a", -2.0), ("b", -2.5), ("▁ab", -3.0), ("ba", -3.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" " * 2, " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def whole_words():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "ab": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def merging():
    """As Llama 2's: blanks are letters, and pairs are merged over all of a text."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "ab": 4, "▁ab": 5, "▁▁": 6, "▁▁▁▁": 7}
    merges = [("a", "b"), ("▁", "ab"), ("▁", "▁"), ("▁▁", "▁▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


TOKENIZERS = {
    "shrinking": shrinking,
    "collapsing": collapsing,
    "whole words": whole_words,
    "merging": merging,
    "bytes": None,
}
TEXTS = {
    "words": "ab ba a b " * (LONG // 10),
    "one word": "ab" * (LONG // 2),
    "blanks": " " * LONG,
    "blanks and a word": " " * LONG + "ab",
    "accents": "a" + "\u0301" * LONG,
    "control characters": "ab \u0000\u200b\u200d" * (LONG // 6),
    "unknown": "\u4e2d\u6587" * (LONG // 2),
    "emoji": "\U0001f469\u200d\U0001f469 " * (LONG // 4),
    "lines": "ab\n\n\tba\r\n" * (LONG // 8),
    "few words far apart": ("ab" + " " * 500) * (LONG // 502),
    "words, then nothing": "ab " * 100 + " " * LONG,
    "nothing, then words": " " * LONG + "ab " * 100,
    "short": "ab ba",
    "nothing": "",
}


class Counting:
    """A tokenizer that knows how many characters it was given."""

    def __init__(self, name):
        make = TOKENIZERS[name]
        self.tokenizer = (
            transformers.PreTrainedTokenizerFast(tokenizer_object=make())
            if make
            else _byte_tokenizer()
        )
        self.characters = 0

    def __call__(self, text, **how):
        self.characters += len(text)
        return self.tokenizer(text, add_special_tokens=False, **how)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("from_end", [False, True], ids=["from the beginning", "from the end"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_part_of_a_text_gives_what_all_of_it_would(name, text, from_end):
    counting, text = Counting(name), TEXTS[text]
    part = readable(text, WINDOW, counting, from_end=from_end)
    whole, some = counting.ids(text), counting.ids(part)
    assert (len(some) > WINDOW) == (len(whole) > WINDOW)
    if len(whole) <= WINDOW:
        assert part == text
    elif from_end and name == "merging":  # which begins to merge a long run of blanks elsewhere
        assert text.endswith(part)
    elif from_end:
        assert some[-WINDOW:] == whole[-WINDOW:]
    else:
        assert some[:WINDOW] == whole[:WINDOW]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_text_is_told_by_a_part_of_it(name):
    counting, draw = Counting(name), random.Random(name)
    pieces = ["ab", " ", "  ", "a", "b", "\u0301", "\u4e2d", "\n", "\u200b" * 50, "ba" * 90, "."]
    for _ in range(30):
        text = "".join(draw.choices(pieces, k=draw.randrange(3000)))
        window = draw.randrange(1, 60)
        whole = counting.ids(text)
        for from_end in (False, True):
            try:
                part = readable(text, window, counting, from_end=from_end)
            except InvalidRequest:
                read = MAX_CHARACTERS * (window + MARGIN)
                assert len(text) > read
                half = read // 2  # a part ends with a word
                start = counting.ids(text[-half:] if from_end else text[:half])
                assert len(start) <= window + MARGIN + 100  # of a word that is cut
                continue
            some = counting.ids(part)
            kept = slice(-window, None) if from_end else slice(window)
            assert (len(some) > window) == (len(whole) > window)
            if not (from_end and name == "merging"):
                assert some[kept] == whole[kept]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_a_long_text_little_is_tokenised(name):
    counting = Counting(name)
    part = readable("ab ba a b " * 100_000, WINDOW, counting)
    assert len(part) <= counting.characters <= 4 * CHARACTERS * (WINDOW + MARGIN)
    # What hides its length is tokenised, in parts that grow.
    counting.characters = 0
    assert readable(" " * LONG, WINDOW, counting) is not None
    assert counting.characters <= 2 * LONG


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("name", ["shrinking", "collapsing", "whole words"])
@pytest.mark.parametrize("text", ["\U0001f600", "\uac00", "\ufe0f", "\u200d", " "])
def test_a_text_that_grows_in_vain_is_refused(name, text, from_end):
    counting = Counting(name)
    with pytest.raises(InvalidRequest) as refused:
        readable(text * 1_000_000, WINDOW, counting, at="input.text", from_end=from_end)
    assert "has 1000000 characters" in refused.value.details["input.text"]
    assert counting.characters <= 2 * MOST
    # One that is as long as is read is answered as ever.
    assert len(readable(text * MOST, WINDOW, counting, from_end=from_end)) == MOST


def test_without_a_window_a_text_is_left_as_it_is():
    assert readable(TEXTS["words"], None, None) is TEXTS["words"]


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def test_the_end_of_a_chat_is_all_that_is_left_of_it():
    messages = [
        message("system", "be brief"),
        message("user", " hello "),
        message("assistant", "<think>long</think>hi"),
        {"role": "assistant", "tool_calls": []},
        message("user", "what now"),
    ]
    text = told(messages)
    assert text == "be brief\nhello\nhi\n\nwhat now"
    for characters in range(len(text) + 1):
        left = ends_of(messages, characters)
        assert [one["role"] for one in left] == [one["role"] for one in messages]
        end = text[len(text) - characters :]
        assert told(left).split() == end.split()
    assert ends_of(messages, len(text)) == messages


@pytest.fixture
def seen(monkeypatch):
    """The longest text that a tokenizer has got, of all that the library makes."""
    longest = [0]
    for kind in (transformers.PreTrainedTokenizerFast, transformers.PythonBackend):
        real = kind._encode_plus

        def encode(self, text, text_pair=None, *args, real=real, **how):
            for given in (text, text_pair):
                texts = given if isinstance(given, list | tuple) else [given]
                flat = [
                    one for some in texts for one in (some if isinstance(some, tuple) else [some])
                ]
                longest[0] = max([longest[0], *(len(one) for one in flat if isinstance(one, str))])
            return real(self, text, text_pair, *args, **how)

        monkeypatch.setattr(kind, "_encode_plus", encode)
    return longest


MUCH = "the river runs by the city " * 20_000  # 540,000 characters
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "user", "content": MUCH}]}
ASKED = {
    "text-generation": ("gpt2", MUCH, "input"),
    "chat": ("llama", CHAT, "input"),
    "summarization": ("bart", MUCH, "input"),
    "text2text-generation": ("t5", MUCH, "input"),  # which names no window
    "embeddings": (None, MUCH, "input"),
    "rerank": ("cross_encoder", {"query": "a", "documents": [MUCH]}, "input.documents[0]"),
    "text-classification": ("bert_classifier", MUCH, "input"),
    "token-classification": ("token_classifier", MUCH, "input"),
    "zero-shot-classification": ("nli", {"text": MUCH, "labels": ["a"]}, "input.text"),
    "question-answering": (
        "question_answerer",
        {"question": MUCH, "context": "a"},
        "input.question",
    ),
    "fill-mask": ("masked_lm", f"[MASK] {MUCH}", "input"),
}


def test_of_a_long_prompt_little_is_tokenised(make_app, checkpoint, seen):
    entry = {"id": "m", "type": "text-to-image", "hf_model": checkpoint("stable_diffusion")}
    client = make_app([entry]).test_client()
    few = {"num_inference_steps": 1, "width": 64, "height": 64}
    asked = {"prompt": MUCH, "negative_prompt": MUCH[:400_000]}
    assert run(client, "m", asked, options=few).status_code == 400
    answer = run(client, "m", asked, options={**few, "truncate": True})
    assert answer.status_code == 200, answer.json
    assert 0 < seen[0] < 30_000


EMPTY = "\ufe0f" * 400_000
REFUSED = {
    **{
        task: (ASKED[task][0], EMPTY, "input")
        for task in ("embeddings", "text-classification", "token-classification", "fill-mask")
    },
    "rerank": ("cross_encoder", {"query": "a", "documents": ["a", EMPTY]}, "input.documents[1]"),
    "zero-shot-classification": ("nli", {"text": "a", "labels": ["a", EMPTY]}, "input.labels[1]"),
    "question-answering": (
        "question_answerer",
        {"question": "a", "context": EMPTY},
        "input.context",
    ),
}


@pytest.mark.parametrize("task", REFUSED)
def test_what_is_no_text_to_a_model_is_refused_alone(make_app, checkpoint, seen, task):
    name, value, at = REFUSED[task]
    entry = MINILM if name is None else {"type": task, "hf_model": checkpoint(name)}
    client = make_app([{**entry, "id": "m"}]).test_client()
    answer = run(client, "m", value)
    assert answer.status_code == 400, answer.json
    assert "characters that are too few tokens" in answer.json["error"]["details"][at]
    assert 0 < seen[0] < 30_000
    fine = ASKED[task][1] if task != "question-answering" else {"question": "a", "context": "a"}
    several = run(client, "m", [value, fine]).json["error"]["details"]
    assert at.replace("input", "input[0]") in several


def test_a_context_is_refused_wherever_it_is_no_text(make_app, checkpoint, seen):
    """It is read to its end, however long it is."""
    entry = {"id": "m", "type": "question-answering", "hf_model": checkpoint("question_answerer")}
    client = make_app([entry]).test_client()
    words = MUCH[:30_000]
    refused = run(client, "m", {"question": "a", "context": words + EMPTY})
    assert refused.status_code == 400, refused.json
    assert "too few tokens" in refused.json["error"]["details"]["input.context"]
    assert 0 < seen[0] < 30_000
    assert run(client, "m", {"question": "a", "context": words}).status_code == 200


@pytest.mark.parametrize("text", [MUCH, EMPTY], ids=["words", "nothing"])
@pytest.mark.parametrize("field", ["tools", "calls"])
def test_tools_and_calls_that_are_too_long_are_not_tokenised(
    make_app, checkpoint, seen, field, text
):
    client = make_app(
        [{"id": "m", "type": "chat", "hf_model": checkpoint("thinker")}]
    ).test_client()
    tool = {"type": "function", "function": {"name": "clock", "description": text}}
    call = {"name": "clock", "arguments": {"at": text[:20_000]}}
    value = {"messages": [{"role": "user", "content": "hello"}]}
    if field == "tools":
        value["tools"] = [tool]
    else:
        value["messages"] += [
            {"role": "assistant", "content": "", "tool_calls": [call] * 20},
            {"role": "tool", "content": "noon", "tool_call_id": "a"},
        ]
    for truncate in (False, True):
        answer = run(client, "m", value, options={"truncate": truncate, "max_tokens": 2})
        assert answer.status_code == 400, answer.json
        at = "input.tools" if field == "tools" else "input.messages"
        assert "tokens" in answer.json["error"]["details"].get(at, ""), answer.json
    assert 0 < seen[0] < 100_000


@pytest.mark.parametrize("task", ASKED)
def test_no_adapter_tokenises_all_of_a_long_text(make_app, checkpoint, seen, task):
    name, value, at = ASKED[task]
    entry = MINILM if name is None else {"type": task, "hf_model": checkpoint(name)}
    client = make_app([{**entry, "id": "m"}]).test_client()
    answer = run(client, "m", value, options={"max_tokens": 2} if "generation" in task else {})
    assert answer.status_code == 400, answer.json
    details = answer.json["error"]["details"]
    assert list(details) == [at]
    assert "or more tokens" in details[at] or "tokens and may have" in details[at]
    assert 0 < seen[0] < 100_000
