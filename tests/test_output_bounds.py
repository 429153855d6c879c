"""What a call's outputs may take of memory: bounded while they are made, whatever they are."""

from __future__ import annotations

import json
import threading
import tracemalloc

import numpy as np
import pytest

from backend.adapters.base import Adapter, Prediction
from backend.adapters.words import Words, bound_words
from backend.engine import encoder
from backend.http import to_json
from backend.media import Media
from backend.messages import pack, unpack, weight
from tests.conftest import refused_for, run

KIB = 1024
# Each of these is 40 to 120 KiB, as an answer has it.
OUTPUTS = {
    "text": Prediction("x" * 64 * KIB),
    "vectors": Prediction(np.ones((16, 512), np.float32)),
    "objects": Prediction([{"label": "x", "score": 0.5}] * 128),
    "facts": Prediction("x", facts={"logprobs": [{"token": "x", "logprob": -0.5}] * 128}),
    "file": Prediction(Media("image/png", bytes(48 * KIB))),
}


class Makes(Adapter):
    """Makes one output, again and again, an input at a time."""

    loads_alone, libraries = False, ()
    made: Prediction
    runs = 0

    def load(self):
        self.device, self.dtype = "cpu", "none"

    def predict(self, batch):
        type(self).runs += 1
        return [self.made]


def check(output, options, check):
    """A dump, which changes nothing."""
    return output


@pytest.mark.parametrize("dump", [None, check], ids=["as-made", "encoded"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_call_ends_once_its_outputs_are_more_than_it_may_have(make_app, add_task, kind, dump):
    adapter = type("Makes", (Makes,), {"made": OUTPUTS[kind]})
    entry = {**add_task("makes", adapter, dump=dump), "max_batch_size": 1}
    client = make_app([entry], max_output=512 * KIB).test_client()
    assert run(client, "makes", ["x"] * 4).status_code == 200
    adapter.runs = 0
    refused = run(client, "makes", ["x"] * 200)
    assert (refused.status_code, refused.json["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert "CRANE_MAX_OUTPUT" in refused.json["error"]["message"]
    # Of those that are encoded beside the model, some more have run before that is known.
    assert adapter.runs < 40
    assert run(client, "makes", ["x"] * 4).status_code == 200


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_weighs_no_less_than_its_json_and_what_an_http_worker_has_of_it(kind):
    value = [OUTPUTS[kind].output, OUTPUTS[kind].facts]
    parts = pack(value)
    tracemalloc.start()
    received = unpack(parts)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(size - 4 * KIB, len(to_json(received))) <= weight(value)


def test_vectors_weigh_no_less_than_their_json_whatever_their_numbers():
    rng = np.random.default_rng(0)
    for dtype in (np.float16, np.float32, np.float64):
        vectors = rng.normal(size=(8, 512)).astype(dtype)
        assert len(to_json(vectors)) <= weight(vectors)


def test_each_output_is_encoded_as_it_is_made(make_app, add_task):
    encoded = threading.Event()
    waited = []

    class Waits(Makes):
        made = Prediction("x")

        def predict(self, batch):
            if type(self).runs:
                waited.append(encoded.wait(20))
            return super().predict(batch)

    def dump(output, options, check):
        encoded.set()
        return output

    entry = {**add_task("waits", Waits, dump=dump), "max_batch_size": 1}
    client = make_app([entry]).test_client()
    assert run(client, "waits", ["x"] * 3).json["output"] == ["x"] * 3
    assert waited == [True, True]


def test_more_log_probabilities_than_an_answer_has_room_for_are_refused_before_the_run(
    make_app, tmp_path
):
    entry = {"id": "writer", "type": "text-generation", "hf_model": str(tmp_path)}
    app = make_app([entry], max_output=2**20)
    for more in ({"max_tokens": 256}, {"max_tokens": 32768, "top_logprobs": 1}):
        options = {"top_logprobs": 20, **more}
        details = refused_for(app.test_client(), "writer", ["x"] * 8, **options)
        assert "CRANE_MAX_OUTPUT" in details["options.top_logprobs"]
    assert app.extensions["crane"].engine.status()["models"] == {}  # none was asked to load


def test_the_models_own_thread_encodes_where_many_bytes_wait_for_it(
    make_app, add_task, monkeypatch
):
    monkeypatch.setattr(encoder, "MAX_WAITING_BYTES", 100 * KIB)
    threads = []

    def dump(output, options, check):
        threads.append(threading.current_thread().name)
        return "made"

    for name, size in (("small", 10), ("large", 101)):
        made = Prediction({"pixels": [np.zeros(size * KIB, np.uint8)]})
        entry = add_task(name, type("Makes", (Makes,), {"made": made}), dump=dump)
        assert run(make_app([entry]).test_client(), name).json["output"] == "made"
    assert threads[0].startswith("encoder")
    assert threads[1] == "model large"


def test_what_a_tokenizer_in_python_remembers_of_callers_words_is_bounded(tmp_path):
    tokenizer = ctrl_tokenizer(tmp_path)
    texts = [f"ab{number:x}a b {number:x}" for number in range(2000)]
    plain = [tokenizer(text).input_ids for text in texts]
    assert len(tokenizer.cache) > 3000  # as the library leaves it
    tokenizer = ctrl_tokenizer(tmp_path)
    bound_words(tokenizer, max_words=500)
    assert [tokenizer(text).input_ids for text in texts] == plain
    tokenizer("a" * 10_000)
    assert 0 < len(tokenizer.cache) <= 500
    assert max(map(len, tokenizer.cache)) < 1000


def ctrl_tokenizer(folder):
    from transformers import CTRLTokenizer

    letters = [*"0123456789abcdef", *(f"{letter}</w>" for letter in "0123456789abcdef"), "<unk>"]
    (folder / "vocab.json").write_text(json.dumps({one: at for at, one in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version\na b\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.mark.parametrize("type_", ["text-generation", "feature-extraction"])
def test_a_models_tokenizer_in_python_is_bounded_as_it_loads(make_app, tmp_path, type_):
    from transformers import CTRLConfig, CTRLLMHeadModel

    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "dff": 8, "n_positions": 64}
    CTRLLMHeadModel(CTRLConfig(vocab_size=33, **sizes)).save_pretrained(tmp_path / "ctrl")
    ctrl_tokenizer(tmp_path).save_pretrained(tmp_path / "ctrl")
    app = make_app([{"id": "ctrl", "type": type_, "hf_model": str(tmp_path / "ctrl")}])
    assert run(app.test_client(), "ctrl", "ab cd").status_code == 200
    [worker] = app.extensions["crane"].engine._engine._pool._workers.values()
    [adapter] = worker.adapters.values()
    tokenizer = getattr(adapter, "pipeline", adapter).tokenizer
    assert type(tokenizer.cache) is Words
