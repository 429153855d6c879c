"""Speech and other sound: what a direct call gives after ``torch.manual_seed``, however asked.

What is expected never comes from Crane's own adapters.
"""

from __future__ import annotations

import base64
import io
import json
import re
from itertools import cycle, islice

import av
import numpy as np
import pytest

from backend.adapters.sound_models import MusicGen, Vits
from backend.adapters.vocoder import WINDOW
from tests.checkpoints import built_when_asked
from tests.conftest import run, together
from tests.gpu import GPU
from tests.sounds import heard
from tests.speech_checkpoints import BUILDERS

DEVICES = [pytest.param("cpu"), pytest.param("cuda:0", marks=GPU)]
SPEAKERS = ("vits", "speecht5", "bark")
KINDS = (*SPEAKERS, "musicgen", "musicgen_stereo")
TEXTS = [
    "the crane",
    "it is so",
    "a lazy dog",
    "one",
    "quick brown fox",
    "over it",
    "the end",
    "jumps",
]
SIXTEEN_BITS = 2**-16 + 1e-4


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return built_when_asked(BUILDERS, tmp_path_factory.mktemp("speech"))


def entry(checkpoint, kind, **more):
    type_ = "text-to-audio" if "musicgen" in kind else "text-to-speech"
    folder = checkpoint(kind)
    if kind.startswith("speecht5"):
        more.setdefault("load", {"vocoder": f"{folder}/vocoder", "speakers": f"{folder}/speakers"})
    return {"id": kind, "type": type_, "hf_model": folder, **more}


@pytest.fixture(scope="module")
def direct(checkpoint):
    """Call a model directly: ``direct("vits", text, seed=…, …)`` gives its samples."""
    import torch
    import transformers as hf

    loaded = {}

    def load(kind, device):
        folder = checkpoint(kind)
        class_name = {
            "speecht5": "SpeechT5ForTextToSpeech",
            "speecht5_without_end": "SpeechT5ForTextToSpeech",
            "bark": "BarkModel",
        }.get(kind)
        if class_name is None:
            music = "musicgen" in kind
            class_name = "MusicgenForConditionalGeneration" if music else "VitsModel"
        model = getattr(hf, class_name).from_pretrained(folder).to(device)
        read = hf.BarkProcessor if kind == "bark" else hf.AutoTokenizer
        vocoder = None
        if kind.startswith("speecht5"):
            vocoder = hf.SpeechT5HifiGan.from_pretrained(f"{folder}/vocoder").to(device)
        return model, read.from_pretrained(folder), vocoder

    def call(kind, text, *, seed, device="cpu", speaker="anna", voice=None, **how):
        if (kind, device) not in loaded:
            loaded[kind, device] = load(kind, device)
        model, read, vocoder = loaded[kind, device]
        if kind == "bark":
            inputs = read(text, max_length=16, voice_preset=voice)
        else:
            inputs = read(text, return_tensors="pt")
        inputs = {name: value.to(device) for name, value in inputs.items()}
        if kind.startswith("speecht5"):
            vector = np.load(f"{checkpoint(kind)}/speakers/{speaker}.npy")
            how |= {"speaker_embeddings": torch.from_numpy(vector).to(device), "vocoder": vocoder}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            if kind.startswith("vits"):
                sound = model(**inputs, **how).waveform
            else:
                sound = model.generate(**inputs, **how)
        samples = sound.float().cpu().numpy()
        return samples[0].T if kind == "musicgen_stereo" else samples.reshape(-1)

    return call


def alike(output, expected):
    samples = heard(output)
    assert samples.shape == expected.shape
    assert expected.std() > 0.02  # not silence
    assert np.abs(samples - np.clip(expected, -1, 1)).max() <= SIXTEEN_BITS


# Parity.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_sound_is_what_a_direct_call_makes(make_app, checkpoint, direct, kind, device):
    client = make_app([entry(checkpoint, kind)], devices=(device,)).test_client()
    answer = run(client, kind, TEXTS[0], options={"seed": 5})
    assert answer.status_code == 200, answer.json
    expected = direct(kind, TEXTS[0], seed=5, device=device)
    if device == "cpu":
        alike(answer.json["output"], expected)
    else:  # kernels differ with what runs beside them, and a draw may fall on the other side
        assert np.abs(heard(answer.json["output"])[:500] - expected[:500]).max() < 1e-2
    metadata = answer.json["metadata"]
    assert metadata["device"].startswith(device)
    assert metadata["seed"] == metadata["options"]["seed"] == 5
    rate = 24_000 if kind in ("bark", "musicgen", "musicgen_stereo") else 16_000
    assert metadata["usage"]["audio_seconds"] == pytest.approx(len(expected) / rate, abs=1e-5)
    assert metadata["usage"]["input_tokens"] > 3
    other = direct(kind, TEXTS[0], seed=6, device=device)
    assert len(other) != len(expected) or np.abs(other - expected).max() > 1e-2


KIND_OPTIONS = {
    "vits": [
        ({}, {}),
        ({"speed": 1.5}, {"speaking_rate": 1.5}),
        ({"speed": 0.5}, {"speaking_rate": 0.5}),
    ],
    "speecht5": [({}, {}), ({"voice": "bert"}, {"speaker": "bert"})],
    "bark": [
        ({}, {}),
        ({"voice": "v2/en_speaker_6"}, {"voice": "v2/en_speaker_6"}),
        (
            {"temperature": 0.5, "top_k": 5, "max_tokens": 6},
            {
                "semantic_do_sample": True,
                "coarse_do_sample": True,
                "semantic_temperature": 0.5,
                "coarse_temperature": 0.5,
                "semantic_top_k": 5,
                "coarse_top_k": 5,
                "semantic_max_new_tokens": 6,
            },
        ),
        (
            {"temperature": 0},
            {"semantic_do_sample": False, "coarse_do_sample": False, "fine_temperature": 1.0},
        ),
    ],
    "musicgen": [
        ({}, {}),
        ({"duration": 0.2}, {"max_new_tokens": 18}),
        ({"temperature": 0.6, "top_k": 4}, {"do_sample": True, "temperature": 0.6, "top_k": 4}),
        ({"guidance_scale": 1.0, "duration": 0.2}, {"guidance_scale": 1.0, "max_new_tokens": 18}),
        ({"temperature": 0.0}, {"do_sample": False}),
    ],
}


@pytest.mark.parametrize("kind", KIND_OPTIONS)
@pytest.mark.usefixtures("whole_batches")
def test_eight_callers_at_once_with_mixed_options_get_what_they_would_get_alone(
    make_app, checkpoint, direct, kind
):
    client = make_app([entry(checkpoint, kind)]).test_client()
    wanted = list(islice(cycle(KIND_OPTIONS[kind]), 8))
    answers = together(
        client,
        [
            {"model_id": kind, "input": text, "options": {**options, "seed": 100 + place}}
            for place, (text, (options, _)) in enumerate(zip(TEXTS, wanted, strict=True))
        ],
    )
    for place, (answer, (options, how)) in enumerate(zip(answers, wanted, strict=True)):
        assert answer.status_code == 200, answer.json
        alike(answer.json["output"], direct(kind, TEXTS[place], seed=100 + place, **how))
        told = answer.json["metadata"]["options"]
        assert {name: told[name] for name in options} == options
        drawn = options.get("temperature") != 0
        assert ("seed" in answer.json["metadata"]) == drawn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("whole_batches")
def test_a_batch_is_what_each_of_it_is_alone(make_app, checkpoint, direct, kind):
    client = make_app([entry(checkpoint, kind)]).test_client()
    batch = run(client, kind, TEXTS[:4], options={"seed": 40}).json
    assert batch["metadata"]["batch_size"] == 4
    assert batch["metadata"]["seed"] == [40, 41, 42, 43]
    for place, output in enumerate(batch["output"]):
        alike(output, direct(kind, TEXTS[place], seed=40 + place))
    lengths = [len(heard(output)) for output in batch["output"]]
    assert batch["metadata"]["usage"]["audio_seconds"] == pytest.approx(
        sum(lengths) / (24_000 if kind not in ("vits", "speecht5") else 16_000), abs=1e-4
    )


@pytest.fixture
def frames_at_once(monkeypatch):
    """How many frames, of how many inputs, HiFi-GANs and EnCodec's decoders were given at once."""
    import transformers.models.encodec.modeling_encodec as encodec
    import transformers.models.speecht5.modeling_speecht5 as speecht5
    import transformers.models.vits.modeling_vits as vits

    seen = []
    for decoder, dim in (
        (vits.VitsHifiGan, -1),
        (speecht5.SpeechT5HifiGan, -2),
        (encodec.EncodecDecoder, -1),
    ):

        def counting(self, frames, *more, real=decoder.forward, dim=dim):
            seen.append((len(frames) if frames.ndim == 3 else 1, frames.shape[dim]))
            return real(self, frames, *more)

        monkeypatch.setattr(decoder, "forward", counting)
    return seen


@pytest.mark.parametrize("kind", ["vits", "speecht5_without_end"])
def test_speech_that_is_made_in_windows_is_what_it_is_at_once(
    make_app, checkpoint, direct, frames_at_once, kind
):
    text = " ".join(TEXTS if kind == "vits" else TEXTS * 2)
    how = {} if kind == "vits" else {"maxlenratio": 1600 / (len(text) + 2)}
    expected = direct(kind, text, seed=5, **how)
    [(_, frames)] = frames_at_once
    assert frames > 3 * WINDOW
    frames_at_once.clear()
    answer = run(make_app([entry(checkpoint, kind)]).test_client(), kind, text, options={"seed": 5})
    assert answer.status_code == 200, answer.json
    alike(answer.json["output"], expected)
    assert len(frames_at_once) == -(-frames // WINDOW)
    assert max(frames for _, frames in frames_at_once) < WINDOW + 100


@pytest.mark.parametrize("kind", ["musicgen", "musicgen_stereo"])
def test_music_of_a_batch_is_decoded_one_by_one(make_app, checkpoint, frames_at_once, kind):
    client = make_app([entry(checkpoint, kind)]).test_client()
    answer = run(client, kind, TEXTS[:3], options={"duration": 0.3})
    assert answer.status_code == 200, answer.json
    assert len(frames_at_once) == (6 if kind == "musicgen_stereo" else 3)
    assert {inputs for inputs, _ in frames_at_once} == {1}


def test_speech_that_gets_too_long_is_refused_before_it_is_made(make_app, checkpoint):
    client = make_app([entry(checkpoint, "vits")]).test_client()
    answer = run(client, "vits", ["one", "the crane is large " * 53])
    assert answer.status_code == 400, answer.json
    [(path, fault)] = answer.json["error"]["details"].items()
    assert path == "input[1]"
    assert "s of speech, and" in fault
    text = "the crane is grey " * 12
    assert run(client, "vits", text).status_code == 200
    assert run(client, "vits", text, options={"speed": 0.25}).status_code == 400


def test_padding_changes_the_sound_of_vits_so_that_it_is_not_padded(checkpoint):
    """Should a later version of the library mask its decoder, batches would be worth it."""
    import torch
    import transformers as hf

    folder = checkpoint("vits")
    model = hf.VitsModel.from_pretrained(folder)
    model.noise_scale = model.noise_scale_duration = 0.0
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = model(**tokenizer("one", return_tensors="pt")).waveform[0]
        texts = tokenizer(["one", "quick brown fox"], padding=True, return_tensors="pt")
        padded = model(**texts).waveform[0][: len(alone)]
    assert (alone - padded).abs().max() > 1e-3


def test_models_that_draw_at_once_do_not_disturb_each_other(make_app, checkpoint, direct):
    client = make_app([entry(checkpoint, kind) for kind in SPEAKERS]).test_client()
    kinds = list(islice(cycle(SPEAKERS), 9))
    requests = [
        {"model_id": kind, "input": TEXTS[place % 8], "options": {"seed": place}}
        for place, kind in enumerate(kinds)
    ]
    for kind in SPEAKERS:  # one after another: transformers cannot load two models at once
        run(client, kind, "one")
    for _ in range(3):
        for place, answer in enumerate(together(client, requests)):
            alike(answer.json["output"], direct(kinds[place], TEXTS[place % 8], seed=place))


def test_the_global_random_state_is_left_alone(make_app, checkpoint):
    import torch

    client = make_app([entry(checkpoint, kind) for kind in KINDS]).test_client()
    for kind in KINDS:
        run(client, kind, "one", options={"seed": 1})  # loading may draw
    before = torch.random.get_rng_state()
    for kind in KINDS:
        assert run(client, kind, "one", options={"seed": 1}).status_code == 200
    assert torch.equal(before, torch.random.get_rng_state())


# Options.


def test_a_model_of_several_speakers_speaks_as_the_one_that_is_asked_for(
    make_app, checkpoint, direct
):
    kind = "vits_of_two_speakers"
    client = make_app([entry(checkpoint, kind)]).test_client()
    for voice, speaker in ((None, 0), ("0", 0), ("1", 1)):
        answer = run(client, kind, "the crane", options={"voice": voice, "seed": 3})
        alike(answer.json["output"], direct(kind, "the crane", seed=3, speaker_id=speaker))
        assert answer.json["metadata"]["options"]["voice"] == str(speaker)
        assert answer.json["metadata"]["options"]["speed"] == 1.0
    answer = run(client, kind, "the crane", options={"voice": "2"})
    assert answer.status_code == 400
    assert answer.json["error"]["details"] == {"options.voice": "is '2': it is one of: 0, 1"}


def test_what_is_left_to_the_model_is_told(make_app, checkpoint):
    told = {
        "speecht5": {"voice": "anna"},
        "bark": {"max_tokens": 12, "voice": None},
        "musicgen": {"duration": 37 / 75, "guidance_scale": 3.0},
    }
    client = make_app([entry(checkpoint, kind) for kind in told]).test_client()
    for kind, values in told.items():
        answer = run(client, kind, "the crane").json
        applied = answer["metadata"]["options"]
        assert {name: applied[name] for name in values} == values
        again = run(client, kind, "the crane", options=applied).json
        assert again["output"] == answer["output"]


def test_texts_are_played_together_by_musicgen_alone(make_app, checkpoint, monkeypatch):
    counts = []
    for model in (MusicGen, Vits):
        real = model.make

        def counting(self, prompts, options, real=real):
            counts.append(len(prompts))
            return real(self, prompts, options)

        monkeypatch.setattr(model, "make", counting)
    client = make_app([entry(checkpoint, kind) for kind in ("musicgen", "vits")]).test_client()
    assert run(client, "musicgen", TEXTS[:3]).status_code == 200
    assert counts == [3]
    assert run(client, "vits", TEXTS[:3]).status_code == 200
    assert counts == [3, 1, 1, 1]


def test_music_runs_in_parts_where_its_kv_cache_would_be_too_large(
    make_app, checkpoint, direct, monkeypatch
):
    counts = []
    make = MusicGen.make

    def counting(self, prompts, options):
        counts.append(len(prompts))
        return make(self, prompts, options)

    monkeypatch.setattr(MusicGen, "make", counting)
    steps = 26  # of 0.3 s: 23 frames, and 3 for the delay of the codebooks
    each = 2 * steps * 2 * 16 * 4  # guided; keys and values; the width; float32
    monkeypatch.setattr(MusicGen, "max_cache", 3 * each - 1)
    app = make_app([entry(checkpoint, "musicgen")])
    body = {"model_id": "musicgen", "input": TEXTS[:5], "stream": True}
    body["options"] = {"seed": 40, "duration": 0.3}
    events = app.test_client().post("/crane/run", json=body).text
    progress = [json.loads(data) for data in re.findall("event: progress\ndata: (.*)", events)]
    assert counts == [2, 2, 1]
    assert progress
    done = [event["step"] for event in progress if event["index"] == 4]
    assert done == sorted(done)
    assert {event["steps"] for event in progress} == {3 * steps}
    answer = run(app.test_client(), "musicgen", TEXTS[:5], options=body["options"])
    for index, output in enumerate(answer.json["output"]):
        expected = direct("musicgen", TEXTS[index], seed=40 + index, max_new_tokens=steps)
        alike(output, expected[: round(0.3 * 24_000)])


def test_a_duration_is_kept_to_the_sample(make_app, checkpoint):
    client = make_app([entry(checkpoint, "musicgen")]).test_client()
    for duration in (0.1, 0.123, 0.3):
        answer = run(client, "musicgen", "a drum", options={"duration": duration})
        assert len(heard(answer.json["output"])) == round(24_000 * duration)
        assert answer.json["metadata"]["usage"]["audio_seconds"] == duration


@pytest.mark.parametrize(
    ("format_", "mime_type"),
    [("wav", "audio/wav"), ("flac", "audio/flac"), ("mp3", "audio/mpeg"), ("ogg", "audio/ogg")],
)
def test_the_sound_comes_in_the_format_that_is_asked_for(make_app, checkpoint, format_, mime_type):
    client = make_app([entry(checkpoint, "vits")]).test_client()
    request = {"model_id": "vits", "input": "one", "options": {"format": format_, "seed": 2}}
    answer = client.post("/crane/run", json=request).json["output"]
    assert answer["mime_type"] == mime_type
    bare = client.post("/crane/run", json=request, headers={"Accept": mime_type})
    assert bare.mimetype == mime_type
    data = base64.b64decode(answer["data"])
    # Each Ogg stream has a serial number of its own.
    assert bare.data == data or format_ == "ogg"
    samples = heard(run(client, "vits", "one", options={"seed": 2}).json["output"])
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.audio[0]
        read = sum(frame.samples for frame in file.decode(stream)) / stream.rate
    assert abs(read - len(samples) / 16_000) < 0.1


# Refusals.


REFUSED = [
    ("vits", {"voice": "anna"}, "options.voice", "it has one voice"),
    ("vits", {"temperature": 0.5}, "options.temperature", "is not something this model"),
    ("vits", {"temperature": 0.0}, "options.temperature", "is not something this model"),
    ("vits", {"top_k": 5}, "options.top_k", "is not something this model"),
    ("vits", {"max_tokens": 5}, "options.max_tokens", "is not something this model"),
    ("vits", {"speed": 9.0}, "options.speed", "must be at most 4.0"),
    ("vits", {"format": "aiff"}, "options.format", "it is one of"),
    ("vits", {"duration": 1.0}, "options.duration", "is not known here"),
    ("speecht5", {"speed": 1.0}, "options.speed", "is not something this model"),
    ("speecht5", {"voice": "ana"}, "options.voice", "is 'ana': did you mean 'anna'?"),
    ("speecht5", {"max_tokens": 9}, "options.max_tokens", "is not something this model"),
    ("bark", {"speed": 1.5}, "options.speed", "is not something this model"),
    ("bark", {"max_tokens": 13}, "options.max_tokens", "is 13, and this model writes at most 12"),
    ("bark", {"voice": "/etc/x"}, "options.voice", "it is one of: v2/en_speaker_6"),
    ("musicgen", {"voice": "0"}, "options.voice", "is not known here"),
    ("musicgen", {"duration": 5.0}, "options.duration", "is 5, and this model makes at most 0.8 s"),
]


@pytest.mark.parametrize(("kind", "options", "name", "fault"), REFUSED)
def test_what_a_model_cannot_be_asked_is_refused_by_name(
    make_app, checkpoint, kind, options, name, fault
):
    client = make_app([entry(checkpoint, kind)]).test_client()
    answer = run(client, kind, ["one", "the crane"], options=options)
    assert answer.status_code == 400
    assert list(answer.json["error"]["details"]) == [name]
    assert fault in answer.json["error"]["details"][name]


@pytest.mark.parametrize(("kind", "window"), [("speecht5", 60), ("bark", 16), ("musicgen", 20)])
def test_a_text_that_is_too_long_is_refused_or_cut(make_app, checkpoint, direct, kind, window):
    client = make_app([entry(checkpoint, kind)]).test_client()
    text = "the quick brown fox jumps over it " * 4
    answer = run(client, kind, text)
    assert answer.status_code == 400
    assert f"the model's window is {window}" in answer.json["error"]["details"]["input"]
    cut = run(client, kind, text, options={"truncate": True, "seed": 1})
    assert cut.status_code == 200, cut.json
    assert cut.json["metadata"]["truncated"] is True
    assert cut.json["metadata"]["usage"]["input_tokens"] == window
    other = run(client, kind, text + "x", options={"truncate": True, "seed": 1})
    assert other.json["output"] == cut.json["output"]


def test_vits_reads_no_more_than_it_can_attend_to(make_app, checkpoint):
    client = make_app([entry(checkpoint, "vits")]).test_client()
    answer = run(client, "vits", ["a" * 1024, "one"])
    assert answer.status_code == 400
    assert "2049 tokens and the model's window is 2048" in str(answer.json["error"]["details"])


def test_a_text_without_a_letter_that_the_model_knows_is_refused(make_app, checkpoint):
    client = make_app([entry(checkpoint, "vits")]).test_client()
    answer = run(client, "vits", "鶴 !?")
    assert answer.status_code == 400
    assert answer.json["error"]["details"] == {"input": "has nothing that this model can read"}


# Entries.


UNLOADABLE = [
    ("bart", {}, "Its checkpoint is of the kind"),
    ("vits_of_phonemes", {}, "Its tokenizer needs the package phonemizer."),
    ("speecht5", {"speakers": "nowhere"}, "The folder load.speakers of its entry has no .npy file"),
    ("speecht5", {"speakers": "wide"}, "Its speaker wide.npy has 9 numbers, and the model wants 4"),
]


@pytest.mark.parametrize(("kind", "load", "why"), UNLOADABLE)
def test_an_entry_that_cannot_work_says_why(make_app, checkpoint, tmp_path, kind, load, why):
    if kind == "bart":
        made = entry(checkpoint, "musicgen", type="text-to-speech")
    else:
        made = entry(checkpoint, kind)
        made["load"] = {**made.get("load", {}), **load}
    if "speakers" in load:
        folder = tmp_path / load["speakers"]
        folder.mkdir()
        made["load"]["speakers"] = str(folder)
        if load["speakers"] == "wide":
            np.save(folder / "wide.npy", np.zeros(9, np.float32))
    answer = run(make_app([made]).test_client(), made["id"], "one")
    assert answer.status_code == 503
    assert why in answer.json["error"]["message"]


def test_speecht5_without_speakers_speaks_as_in_transformers_own_example(make_app, checkpoint):
    load = {"vocoder": f"{checkpoint('speecht5')}/vocoder"}
    client = make_app([entry(checkpoint, "speecht5", load=load)]).test_client()
    assert run(client, "speecht5", "one").status_code == 200
    answer = run(client, "speecht5", "one", options={"voice": "anna"})
    assert answer.json["error"]["details"]["options.voice"].endswith("it has one voice")


# Leaving.


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("speecht5", {}),
        ("bark", {}),
        ("bark", {"temperature": 0}),
        ("musicgen", {}),
        ("musicgen", {"temperature": 0}),
    ],
)
def test_a_run_that_nobody_waits_for_ends_within_a_step(make_app, checkpoint, kind, options):
    from backend.adapters.base import Batch
    from backend.adapters.speech import Composer, Speaker
    from backend.errors import DeadlineExceeded

    app = make_app([entry(checkpoint, kind)])
    spec = app.extensions["crane"].registry.get(kind)
    adapter = (Composer if kind == "musicgen" else Speaker)(spec, device="cpu", dtype="float32")
    adapter.load()
    asked = []

    def cancelled(place):
        asked.append(place)
        return len(asked) > 4

    options = {**spec.options_schema.load({}), **options}
    batch = Batch(
        inputs=["the crane"],
        options=options,
        seeds=[1],
        cancelled=cancelled,
        progress=lambda *_: None,
    )
    [result] = adapter.predict(batch)
    assert isinstance(result, DeadlineExceeded)
    assert len(asked) == 5
    adapter.unload()


@pytest.mark.parametrize("kind", ["vits", "speecht5_without_end"])
def test_speech_that_nobody_waits_for_ends_within_a_window(
    make_app, checkpoint, frames_at_once, kind
):
    from backend.adapters.base import Batch
    from backend.adapters.speech import Speaker
    from backend.errors import DeadlineExceeded

    app = make_app([entry(checkpoint, kind)])
    spec = app.extensions["crane"].registry.get(kind)
    adapter = Speaker(spec, device="cpu", dtype="float32")
    adapter.load()
    batch = Batch(
        inputs=[" ".join(TEXTS * 2)],
        options=spec.options_schema.load({}),
        seeds=[1],
        cancelled=lambda _: len(frames_at_once) == 2,
        progress=lambda *_: None,
    )
    [result] = adapter.predict(batch)
    assert isinstance(result, DeadlineExceeded)
    assert len(frames_at_once) == 2
    adapter.unload()
