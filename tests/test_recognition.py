"""Speech to text: what a direct library call writes of the same sound, however it is asked.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import base64
import json
import wave
from io import BytesIO
from itertools import cycle, islice

import numpy as np
import pytest

from backend.adapters.base import Batch
from backend.adapters.recognition import SpeechRecognizer
from backend.adapters.recognition_ctc import CtcListener
from backend.adapters.recognition_whisper import WhisperListener
from backend.errors import CraneError, DeadlineExceeded
from tests.checkpoints import built_when_asked
from tests.conftest import run, together
from tests.gpu import GPU
from tests.recognition_checkpoints import BUILDERS

TYPE = "automatic-speech-recognition"
DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
CTC = ("ctc", "ctc_without_mask", "hubert")
RATE = 16_000
WINDOW_S = 6  # of the tiny Whisper; the real one's is 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return built_when_asked(BUILDERS, tmp_path_factory.mktemp("speech"))


def entry(checkpoint, name="whisper", **more):
    return {"id": name, "type": TYPE, "hf_model": checkpoint(name), **more}


def sound(seconds, seed=0):
    """Tones that change five times a second, with some noise: int16 samples, as a WAV has them."""
    rng = np.random.default_rng(seed)
    count = round(seconds * RATE)
    parts = count // 3200 + 1
    pitch = np.repeat(rng.uniform(100, 4000, parts), 3200)[:count]
    loud = np.repeat(rng.uniform(0, 0.5, parts), 3200)[:count]
    wave_ = loud * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    return ((wave_ + 0.01 * rng.standard_normal(count)) * 32767).astype(np.int16)


def samples_of(pcm):
    return pcm.astype(np.float32) / 32768


def wav(pcm):
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(pcm.tobytes())
    return file.getvalue()


def text_of(pcm):
    return base64.b64encode(wav(pcm)).decode()


@pytest.fixture(scope="module")
def pipelines(checkpoint):
    """transformers' own pipeline on a checkpoint: ``pipelines("whisper")``."""
    import transformers

    made = {}

    def pipeline(name, device="cpu"):
        if (name, device) not in made:
            made[name, device] = transformers.pipeline(TYPE, model=checkpoint(name), device=device)
        return made[name, device]

    return pipeline


@pytest.fixture(scope="module")
def direct(pipelines):
    """What the pipeline writes: ``direct("whisper", pcm, language="de", …)``."""

    def call(name, pcm, *, device="cpu", return_timestamps=None, **options):
        if name in CTC:
            how = {"chunk_length_s": 30}
        else:
            task = {"task": "transcribe"} if name != "whisper_english" else {}
            how = {"generate_kwargs": {"max_length": 40, "num_beams": 1, **task, **options}}
        pipeline = pipelines(name, device)
        return pipeline(samples_of(pcm), return_timestamps=return_timestamps, **how)

    return call


@pytest.fixture(scope="module")
def segments(pipelines):
    """What ``generate`` hears in which seconds: ``segments(pcm, language="de")``."""

    def call(pcm, **options):
        pipeline = pipelines("whisper")
        long = {"truncation": False, "padding": "longest"} if len(pcm) > WINDOW_S * RATE else {}
        features = pipeline.feature_extractor(
            samples_of(pcm),
            sampling_rate=RATE,
            return_tensors="pt",
            return_attention_mask=True,
            **long,
        )
        heard = pipeline.model.generate(
            **features,
            return_timestamps=True,
            return_segments=True,
            task="transcribe",
            max_length=40,
            **options,
        )
        return [
            {"text": text, "start": float(segment["start"]), "end": float(segment["end"])}
            for segment in heard["segments"][0]
            for text in [
                pipeline.tokenizer.decode(segment["tokens"], skip_special_tokens=True).strip()
            ]
            if text
        ]

    return call


def same(told, expected, seconds):
    """Whether texts are equal and times within a hundredth, none past the sound's end."""
    assert [one["text"] for one in told] == [one["text"] for one in expected]
    for key in ("start", "end"):
        times = [min(one[key], seconds) for one in expected]
        np.testing.assert_allclose([one[key] for one in told], times, atol=0.0051)


def words_of(answer):
    """A pipeline's words in the words of Crane."""
    return [
        {"text": text, "start": chunk["timestamp"][0], "end": chunk["timestamp"][1]}
        for chunk in answer["chunks"]
        if (text := chunk["text"].strip())
    ]


# Parity.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["whisper", "whisper_english", *CTC])
def test_a_text_is_what_a_direct_call_writes(make_app, checkpoint, direct, name, device):
    client = make_app([entry(checkpoint, name)], devices=(device,)).test_client()
    texts = set()
    for seed in range(3):
        pcm = sound(2.3 + 1.1 * seed, seed)
        answer = run(client, name, text_of(pcm))
        assert answer.status_code == 200, answer.json
        expected = direct(name, pcm, device=device)["text"].strip()
        assert answer.json["output"] == expected
        texts.add(expected)
        metadata = answer.json["metadata"]
        assert metadata["device"].startswith(device)
        assert metadata["usage"]["audio_seconds"] == pytest.approx(len(pcm) / RATE, abs=1e-3)
    assert len(texts) == 3


@pytest.mark.parametrize("name", ["whisper", "ctc"])
def test_a_text_is_what_a_direct_call_writes_in_half_precision(make_app, checkpoint, name):
    import torch
    import transformers

    client = make_app([entry(checkpoint, name)], dtype="bfloat16").test_client()
    pipeline = transformers.pipeline(TYPE, model=checkpoint(name), dtype=torch.bfloat16)
    pcm = sound(4, 4)
    how = {"generate_kwargs": {"max_length": 40, "num_beams": 1, "task": "transcribe"}}
    expected = pipeline(samples_of(pcm), **(how if name == "whisper" else {}))["text"]
    answer = run(client, name, text_of(pcm)).json
    assert answer["output"] == expected.strip()
    assert answer["metadata"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"language": "de"}, {"language": "de"}),
        ({"language": "French"}, {"language": "fr"}),
        ({"language": "en", "task": "translate"}, {"language": "en", "task": "translate"}),
        ({"num_beams": 3}, {"num_beams": 3}),
        ({"max_tokens": 5}, {"max_length": None, "max_new_tokens": 5}),
        ({"max_tokens": 4096}, {}),
    ],
)
def test_each_option_is_the_librarys(make_app, checkpoint, direct, options, theirs):
    client = make_app([entry(checkpoint)]).test_client()
    pcm = sound(5, 3)
    answer = run(client, "whisper", text_of(pcm), options=options)
    assert answer.status_code == 200, answer.json
    assert answer.json["output"] == direct("whisper", pcm, **theirs)["text"].strip()


def test_each_option_makes_a_difference(make_app, checkpoint):
    client = make_app([entry(checkpoint)]).test_client()
    kinds = [{"language": code} for code in ("en", "de", "fr")]
    kinds += [{"language": "en", "task": "translate"}, {"language": "en", "num_beams": 3}]
    kinds += [{"language": "en", "max_tokens": 5}]
    outputs = {
        run(client, "whisper", text_of(sound(5, 3)), options=options).json["output"]
        for options in kinds
    }
    assert len(outputs) == len(kinds)


def test_a_language_that_is_heard_is_told(make_app, checkpoint, direct, pipelines):
    client = make_app([entry(checkpoint)]).test_client()
    pipeline = pipelines("whisper")
    pcms = [sound(3, seed) for seed in range(12)]
    languages = []
    for pcm in pcms:
        features = pipeline.feature_extractor(
            samples_of(pcm), sampling_rate=RATE, return_tensors="pt"
        )
        [token] = pipeline.model.detect_language(features["input_features"]).tolist()
        languages.append(pipeline.tokenizer.convert_ids_to_tokens(token)[2:-2])
    assert len(set(languages)) > 1
    for pcm, language in zip(pcms[:4], languages, strict=False):
        answer = run(client, "whisper", text_of(pcm)).json
        assert answer["metadata"]["options"]["language"] == language
        assert answer["metadata"]["language"] == language
    batch = run(client, "whisper", [text_of(pcm) for pcm in pcms]).json
    assert batch["metadata"]["language"] == languages
    assert batch["metadata"]["options"]["language"] is None  # the inputs differ
    assert batch["output"] == [direct("whisper", pcm)["text"].strip() for pcm in pcms]


def test_what_was_written_is_counted_and_whether_it_was_cut(make_app, checkpoint, pipelines):
    client = make_app([entry(checkpoint)]).test_client()
    pipeline = pipelines("whisper")
    reasons = set()
    for seed in range(6):
        pcm = sound(3, seed)
        features = pipeline.feature_extractor(
            samples_of(pcm), sampling_rate=RATE, return_tensors="pt"
        )["input_features"]
        how = {"language": "de", "task": "transcribe", "max_new_tokens": 20}
        [row] = pipeline.model.generate(features, **how).tolist()
        options = {"language": "de", "max_tokens": 20}
        metadata = run(client, "whisper", text_of(pcm), options=options).json["metadata"]
        reason = "length" if len(row) == 20 else "stop"
        assert metadata["finish_reason"] == reason
        written = len(row) + (reason == "stop")  # the library takes the end's token off
        assert metadata["usage"] == {"audio_seconds": 3.0, "output_tokens": written}
        reasons.add(reason)
    assert reasons == {"length", "stop"}


# Times.


@pytest.mark.parametrize("seconds", [WINDOW_S, 75])
def test_segments_are_those_of_a_direct_call(make_app, checkpoint, direct, segments, seconds):
    client = make_app([entry(checkpoint)]).test_client()
    pcm = sound(seconds, 3)
    options = {"language": "de", "return_timestamps": "segments"}
    answer = run(client, "whisper", text_of(pcm), options=options)
    assert answer.status_code == 200, answer.json
    output = answer.json["output"]
    expected = segments(pcm, language="de")
    same(output["segments"], expected, seconds)
    assert len(expected) > 1
    whole = direct("whisper", pcm, language="de", return_timestamps=True)["text"]
    assert output["text"] == whole.strip()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_read_past_a_sounds_end(make_app, checkpoint, segments, seed):
    client = make_app([entry(checkpoint)]).test_client()
    pcm = sound(4, seed)
    options = {"language": "en", "return_timestamps": "segments"}
    told = run(client, "whisper", text_of(pcm), options=options).json["output"]["segments"]
    expected = segments(pcm, language="en")
    same(told, expected[: len(told)], 4)
    # What the library goes on to write is of the silence that it has put there.
    assert all(one["start"] >= 4 for one in expected[len(told) :])


@pytest.mark.parametrize("seconds", [3, WINDOW_S, 17])
def test_words_are_those_of_a_direct_call(make_app, checkpoint, direct, seconds):
    client = make_app([entry(checkpoint)]).test_client()
    pcm = sound(seconds, 3)
    options = {"language": "de", "return_timestamps": "words"}
    answer = run(client, "whisper", text_of(pcm), options=options)
    assert answer.status_code == 200, answer.json
    output = answer.json["output"]
    expected = direct("whisper", pcm, language="de", return_timestamps="word")
    same(output["words"], words_of(expected), seconds)
    assert len(output["words"]) >= seconds // 3
    assert output["text"] == expected["text"].strip()


@pytest.mark.parametrize("name", CTC)
@pytest.mark.parametrize("seconds", [3, 75])
def test_words_of_ctc_are_those_of_a_direct_call(make_app, checkpoint, direct, name, seconds):
    client = make_app([entry(checkpoint, name)]).test_client()
    pcm = sound(seconds, 1)
    answer = run(client, name, text_of(pcm), options={"return_timestamps": "words"})
    assert answer.status_code == 200, answer.json
    expected = direct(name, pcm, return_timestamps="word")
    assert answer.json["output"]["text"] == expected["text"]
    same(answer.json["output"]["words"], words_of(expected), seconds)
    assert len(words_of(expected)) > 1


@pytest.mark.parametrize("name", ["whisper", "ctc"])
def test_a_long_sound_is_heard_to_its_end(make_app, checkpoint, direct, name):
    client = make_app([entry(checkpoint, name)]).test_client()
    pcm = sound(75, 1)
    timed = {"return_timestamps": True} if name == "whisper" else {}
    answer = run(client, name, text_of(pcm))
    assert answer.json["output"] == direct(name, pcm, **timed)["text"].strip()
    assert answer.json["metadata"]["usage"]["audio_seconds"] == 75


def test_words_of_a_language_without_spaces_are_told_apart(make_app, checkpoint):
    client = make_app([entry(checkpoint)]).test_client()
    options = {"language": "zh", "return_timestamps": "words"}
    output = run(client, "whisper", text_of(sound(WINDOW_S, 5)), options=options).json["output"]
    letters = output["text"].replace(" ", "")
    assert [word["text"] for word in output["words"]] == list(letters)
    assert len(letters) > 5


def test_words_leave_the_model_as_it_was(checkpoint, make_app):
    adapter = adapter_of(make_app([entry(checkpoint)]))
    model = adapter._listener._model
    before = model.model.config._attn_implementation
    assert before != "eager"
    adapter.predict(batch_of([sound(2)], return_timestamps="words"))
    assert model.model.config._attn_implementation == before


def test_a_checkpoints_habits_do_not_change_what_is_written(make_app, checkpoint):
    names = ("whisper", "whisper_with_habits")
    client = make_app([entry(checkpoint, name) for name in names]).test_client()
    for seconds, times in ((3, "none"), (14, "segments")):
        options = {"language": "de", "return_timestamps": times}
        sent = [text_of(sound(seconds, seed)) for seed in range(2)]
        outputs = [run(client, name, sent, options=options).json["output"] for name in names]
        assert outputs[0] == outputs[1]


def test_a_model_that_is_stuck_comes_to_an_end(make_app, checkpoint):
    name = "whisper_stuck"
    client = make_app([entry(checkpoint, name)], request_timeout_s=30).test_client()
    answer = run(client, name, text_of(sound(3)), options={"language": "de"})
    assert answer.status_code == 200, answer.json
    assert answer.json["output"] == ""


# Batches.


def adapter_of(app, name="whisper"):
    """An entry's adapter, loaded."""
    adapter = SpeechRecognizer(app.extensions["crane"].registry.get(name), dtype="float32")
    adapter.load()
    return adapter


def batch_of(pcms, cancelled=lambda index: False, **options):
    inputs = [{"samples": samples_of(pcm), "rate": RATE} for pcm in pcms]
    plain = {"language": None, "task": "transcribe", "max_tokens": None, "num_beams": 1}
    return Batch(
        inputs=inputs,
        options=plain | {"return_timestamps": "none"} | options,
        seeds=[None] * len(inputs),
        cancelled=cancelled,
        progress=lambda *_: None,
    )


@pytest.fixture
def runs(monkeypatch):
    """How many sounds each run of a model has had."""
    counts = []
    for listener, name in ((WhisperListener, "_generate"), (CtcListener, "_letters")):
        real = getattr(listener, name)

        def counting(self, sounds, *rest, real=real):
            counts.append(len(sounds))
            return real(self, sounds, *rest)

        monkeypatch.setattr(listener, name, counting)
    return counts


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("whisper", "none"),
        ("whisper", "segments"),
        ("whisper", "words"),
        ("whisper_english", "none"),
        *((name, times) for name in CTC for times in ("none", "words")),
    ],
)
@pytest.mark.usefixtures("whole_batches")
def test_a_batch_is_written_down_as_each_sound_alone(make_app, checkpoint, name, times):
    client = make_app([entry(checkpoint, name)]).test_client()
    # In German those of the seeds 11, 14 and 16 end early: a row's padding must not be heard.
    pairs = ((3, 11), (5.5, 1), (3, 14), (14, 3), (3, 16), (2.5, 0), (2.6, 1))
    sounds = [text_of(sound(*pair)) for pair in pairs]
    language = "de" if name == "whisper" else None
    options = {"return_timestamps": times, "language": language}
    batch = run(client, name, sounds, options=options)
    assert batch.status_code == 200, batch.json
    assert batch.json["metadata"]["batch_size"] == 7
    alone = [run(client, name, one, options=options).json["output"] for one in sounds]
    assert batch.json["output"] == alone


def test_short_sounds_run_together(make_app, checkpoint, runs):
    client = make_app([entry(checkpoint)]).test_client()
    sounds = [text_of(sound(1 + index, index)) for index in range(5)]
    run(client, "whisper", sounds)
    assert runs == [5]


def test_sounds_without_a_mask_run_together_only_if_they_are_of_one_length(
    make_app, checkpoint, runs
):
    client = make_app([entry(checkpoint, "ctc_without_mask")]).test_client()
    run(client, "ctc_without_mask", [text_of(sound(s, i)) for i, s in enumerate((2, 3, 2, 3, 2))])
    assert runs == [3, 2]


def test_sounds_of_like_length_share_a_run_where_there_is_a_mask(make_app, checkpoint, runs):
    client = make_app([entry(checkpoint, "ctc")]).test_client()
    lengths = (2, 9, 2.2, 8, 2.4)
    run(client, "ctc", [text_of(sound(s, i)) for i, s in enumerate(lengths)])
    assert runs == [3, 2]
    runs.clear()
    run(client, "ctc", [text_of(sound(75)), text_of(sound(75, 1))])
    assert sum(runs) == 8
    assert max(runs) == 4  # 120 seconds


def test_long_sounds_of_different_lengths_share_their_windows(make_app, checkpoint, runs):
    adapter = adapter_of(make_app([entry(checkpoint)]))
    pcms = [sound(8, 1), sound(20, 2), sound(13, 3)]
    together_ = [one.output for one in adapter.predict(batch_of(pcms, language="de"))]
    assert runs[0] == 3
    assert runs == sorted(runs, reverse=True)
    alone = [adapter.predict(batch_of([pcm], language="de"))[0].output for pcm in pcms]
    assert together_ == alone


def test_short_sounds_do_not_wait_for_a_long_one(make_app, checkpoint):
    adapter = SpeechRecognizer(
        make_app([entry(checkpoint)]).extensions["crane"].registry.get("whisper")
    )
    short, full, long = (
        adapter.size({"samples": np.zeros(int(s * RATE)), "rate": RATE}, {}) for s in (1, 30, 31)
    )
    assert short == full
    assert long - full > 128  # more than the engine would pad


@pytest.mark.usefixtures("whole_batches")
def test_eight_callers_at_once_with_mixed_options_get_what_they_would_get_alone(
    make_app, checkpoint, direct
):
    client = make_app([entry(checkpoint)]).test_client()
    kinds = [
        ({"language": "de"}, {"language": "de"}),
        ({"language": "fr", "task": "translate"}, {"language": "fr", "task": "translate"}),
        ({}, {}),
        ({"language": "en", "return_timestamps": "words"}, {"language": "en"}),
    ]
    wanted = list(islice(cycle(kinds), 8))
    pcms = [sound(2 + 0.5 * index, index) for index in range(8)]
    answers = together(
        client,
        [
            {"model_id": "whisper", "input": text_of(pcm), "options": options}
            for pcm, (options, _) in zip(pcms, wanted, strict=True)
        ],
    )
    for pcm, answer, (options, theirs) in zip(pcms, answers, wanted, strict=True):
        assert answer.status_code == 200, answer.json
        times = options.get("return_timestamps") and "word"
        expected = direct("whisper", pcm, return_timestamps=times, **theirs)
        if times:
            same(answer.json["output"]["words"], words_of(expected), len(pcm) / RATE)
        else:
            assert answer.json["output"] == expected["text"].strip()


@pytest.mark.parametrize("name", CTC)
@pytest.mark.usefixtures("whole_batches")
def test_eight_callers_of_ctc_at_once_get_what_they_would_get_alone(
    make_app, checkpoint, direct, name
):
    client = make_app([entry(checkpoint, name)]).test_client()
    pcms = [sound(2 + 0.3 * (index % 4), index) for index in range(8)]
    answers = together(client, [{"model_id": name, "input": text_of(pcm)} for pcm in pcms])
    for pcm, answer in zip(pcms, answers, strict=True):
        assert answer.json["output"] == direct(name, pcm)["text"]


# Leaving.


@pytest.mark.parametrize("name", ["whisper", "ctc"])
def test_no_features_are_made_of_a_sound_that_nobody_waits_for(
    make_app, checkpoint, name, monkeypatch
):
    adapter = adapter_of(make_app([entry(checkpoint, name)]), name)
    pipeline, lengths = adapter._listener._pipeline, []
    real = pipeline.preprocess

    def counting(samples, **how):
        lengths.append(len(samples) / RATE)
        return real(samples, **how)

    monkeypatch.setattr(pipeline, "preprocess", counting)
    adapter.predict(batch_of([sound(2), sound(3), sound(4)], lambda index: index == 1))
    assert lengths == [2, 4]


@pytest.mark.parametrize("times", ["none", "words"])
def test_a_caller_who_leaves_stops_the_writing_at_the_next_token(make_app, checkpoint, times):
    adapter = adapter_of(make_app([entry(checkpoint)]))
    steps = []
    adapter._listener._model.model.decoder.register_forward_hook(lambda *_: steps.append(1))
    pcm = sound(20, 6)
    adapter.predict(batch_of([pcm], language="de", return_timestamps=times))
    whole = len(steps)
    steps.clear()
    [gone] = adapter.predict(
        batch_of([pcm], lambda index: len(steps) >= 4, language="de", return_timestamps=times)
    )
    assert isinstance(gone, DeadlineExceeded)
    assert len(steps) <= 5 < whole


def test_one_who_leaves_takes_nothing_from_the_others(make_app, checkpoint):
    adapter = adapter_of(make_app([entry(checkpoint)]))
    rows = []
    adapter._listener._model.model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    pcms = [sound(20, seed) for seed in (6, 7, 8)]
    options = {"language": "de", "return_timestamps": "segments"}
    expected = [adapter.predict(batch_of([pcm], **options))[0].output for pcm in pcms]
    rows.clear()
    stayed = adapter.predict(batch_of(pcms, lambda index: index == 1 and len(rows) > 3, **options))
    assert [stayed[0].output, stayed[2].output] == [expected[0], expected[2]]
    assert isinstance(stayed[1], CraneError)
    assert rows[0] == 3
    assert 2 in rows  # the next window is read for two only


def test_a_caller_of_ctc_who_leaves_stops_the_runs(make_app, checkpoint, runs):
    adapter = adapter_of(make_app([entry(checkpoint, "ctc")]), "ctc")
    [gone] = adapter.predict(batch_of([sound(300)], lambda index: bool(runs)))
    assert isinstance(gone, DeadlineExceeded)
    assert len(runs) == 1


# What is refused.


@pytest.mark.parametrize(
    ("name", "options", "option", "told"),
    [
        ("whisper", {"language": "xx"}, "language", "'xx', which is no language of this model"),
        ("whisper", {"language": "germann"}, "language", "did you mean 'german'?"),
        ("whisper", {"language": "es"}, "language", "no language of this model"),
        ("whisper", {"language": "<|de|>"}, "language", "no language of this model"),
        ("whisper", {"language": " "}, "language", "must not be empty"),
        ("whisper", {"task": "summarize"}, "task", "'summarize'"),
        ("whisper", {"return_timestamps": "word"}, "return_timestamps", "did you mean 'words'?"),
        ("whisper", {"return_timestamps": True}, "return_timestamps", "a string, not a boolean"),
        ("whisper", {"max_tokens": 0}, "max_tokens", "at least 1"),
        ("whisper", {"temperature": 0.5}, "temperature", "not known here"),
        ("whisper_english", {"language": "en"}, "language", "knows one language only"),
        ("whisper_english", {"task": "translate"}, "task", "can only transcribe"),
        (
            "whisper_without_words",
            {"return_timestamps": "words"},
            "return_timestamps",
            "do not have the alignment_heads",
        ),
        (
            "whisper_without_times",
            {"return_timestamps": "segments"},
            "return_timestamps",
            "settings name no times",
        ),
        ("ctc", {"language": "en"}, "language", "cannot be chosen"),
        ("ctc", {"task": "translate"}, "task", "can only transcribe"),
        ("ctc", {"return_timestamps": "segments"}, "return_timestamps", "tells 'words' apart"),
        ("ctc", {"max_tokens": 9}, "max_tokens", "cannot be set"),
        ("ctc", {"num_beams": 2}, "num_beams", "must be 1"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(
    make_app, checkpoint, name, options, option, told
):
    client = make_app([entry(checkpoint, name)]).test_client()
    answer = run(client, name, text_of(sound(1)), options=options)
    assert answer.status_code == 400, answer.json
    assert told in answer.json["error"]["details"][f"options.{option}"]


def test_segments_need_no_alignment_heads(make_app, checkpoint, segments):
    name = "whisper_without_words"
    client = make_app([entry(checkpoint, name)]).test_client()
    options = {"language": "de", "return_timestamps": "segments"}
    pcm = sound(WINDOW_S, 5)
    told = run(client, name, text_of(pcm), options=options).json["output"]["segments"]
    same(told, segments(pcm, language="de"), WINDOW_S)


def test_a_model_without_times_is_told_from_one_that_reads_long_sounds(make_app, checkpoint):
    name = "whisper_without_times"
    client = make_app([entry(checkpoint, name)]).test_client()
    assert run(client, name, text_of(sound(WINDOW_S))).status_code == 200
    answer = run(client, name, [text_of(sound(1)), text_of(sound(7))])
    assert answer.status_code == 400
    told = answer.json["error"]["details"]["input[1]"]
    assert told.startswith("lasts 7.0 s, and this model")


@pytest.mark.parametrize("name", ["ctc", "ctc_without_mask"])
def test_a_sound_too_short_for_a_letter_is_refused(make_app, checkpoint, name):
    client = make_app([entry(checkpoint, name)]).test_client()
    assert run(client, name, text_of(np.zeros(400, np.int16))).status_code == 200
    answer = run(client, name, text_of(np.zeros(399, np.int16)))
    assert answer.status_code == 400
    told = answer.json["error"]["details"]["input"]
    assert told == "lasts 24.94 ms, and this model needs at least 25.00 ms"


def test_a_model_of_another_kind_does_not_load(make_app, checkpoint):
    client = make_app([entry(checkpoint, "speech_to_text")]).test_client()
    answer = run(client, "speech_to_text", text_of(sound(1)))
    assert answer.status_code == 503
    assert "It is a speech_to_text model" in answer.json["error"]["message"]


# Odd sounds, and forms.


@pytest.mark.parametrize("times", ["none", "segments", "words"])
@pytest.mark.parametrize("count", [1, 200, 2 * RATE])
def test_silence_and_the_shortest_sounds_are_heard(make_app, checkpoint, direct, count, times):
    client = make_app([entry(checkpoint)]).test_client()
    pcm = np.zeros(count, np.int16)
    answer = run(
        client, "whisper", text_of(pcm), options={"language": "en", "return_timestamps": times}
    )
    assert answer.status_code == 200, answer.json
    output = answer.json["output"]
    if times == "none":
        assert output == direct("whisper", pcm, language="en")["text"].strip()
    else:
        ends = [one["end"] for one in output[times]]
        assert all(0 <= end <= max(0.01, count / RATE) for end in ends)


@pytest.mark.parametrize("name", CTC)
def test_ctc_hears_silence(make_app, checkpoint, direct, name):
    client = make_app([entry(checkpoint, name)]).test_client()
    pcm = np.zeros(RATE, np.int16)
    assert run(client, name, text_of(pcm)).json["output"] == direct(name, pcm)["text"]


def test_a_sound_may_be_the_file_of_a_form(make_app, checkpoint, direct):
    client = make_app([entry(checkpoint)]).test_client()
    pcm = sound(3, 2)
    parts = {
        "model_id": "whisper",
        "input": (BytesIO(wav(pcm)), "speech.wav"),
        "options": json.dumps({"language": "de"}),
    }
    answer = client.post("/crane/run", data=parts, content_type="multipart/form-data")
    assert answer.status_code == 200, answer.json
    assert answer.json["output"] == direct("whisper", pcm, language="de")["text"].strip()


def test_weights_in_eight_bits_still_hear(make_app, checkpoint):
    app = make_app([entry(checkpoint, memory={"quantize": "int8"})])
    layer = adapter_of(app)._listener._model.model.encoder.layers[0]
    assert "Int8" in type(layer.fc1.weight).__name__
    client = app.test_client()
    answer = run(client, "whisper", text_of(sound(3)), options={"language": "de"})
    assert answer.status_code == 200, answer.json
    assert answer.json["metadata"]["dtype"] == "float32 with int8 weights"
