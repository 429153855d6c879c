"""Sound that callers send and get: read as a direct decode reads it, refused where it is hostile.

What is expected comes from the samples that were written, from scipy, or from PyAV called plainly.
"""

from __future__ import annotations

import base64
import functools
import io
import wave

import av
import numpy as np
import pytest
from scipy.signal import resample_poly

import backend.adapters
from backend import tasks
from backend.adapters.base import Adapter, Prediction
from backend.media import Refused
from backend.media.audio import AUDIO_FORMATS, decode_audio, encode_audio, resample
from backend.media.parts import AudioField
from backend.tasks.base import Options, Task
from tests.conftest import run
from tests.pictures import picture
from tests.pictures import written as picture_file
from tests.sounds import base64_of, likeness, spoken, wav, written


class Ear(Adapter):
    """Gives back what it heard."""

    def load(self):
        self.device, self.dtype = "cpu", "float32"

    def predict(self, batch):
        return [Prediction({"rate": v["rate"], "samples": v["samples"]}) for v in batch.inputs]


def hearing(rate):
    return Task(
        name=f"hear-{rate}",
        input=AudioField(rate=rate),
        options=Options,
        output="what was heard",
        example=("", {}),
        weights=False,
    )


@pytest.fixture
def listener(make_app, monkeypatch):
    """A client of two models: ``hear-16000`` and ``hear-None``, which leaves the rate."""
    for rate in (16_000, None):
        monkeypatch.setitem(tasks.TASKS, f"hear-{rate}", hearing(rate))
        monkeypatch.setitem(backend.adapters.ADAPTERS, f"hear-{rate}", Ear)

    def make(**settings):
        entries = [{"id": f"hear-{rate}", "type": f"hear-{rate}"} for rate in (16_000, None)]
        return make_app(entries, **settings).test_client()

    return make


def hear(client, data, rate=16_000):
    """The samples that the model got of a file, and their rate."""
    answer = run(client, f"hear-{rate}", base64_of(data))
    assert answer.status_code == 200, answer.json
    output = answer.json["output"]
    return np.array(output["samples"], np.float32), output["rate"]


def decode(data, rate=None, mime_type=None, claim=lambda samples, rate: None):
    return decode_audio(data, rate=rate, mime_type=mime_type, claim=claim)


def plain(data):
    """A file's samples by PyAV called plainly: float64, ``(n, channels)``; for up to 7 channels."""
    scale = {"u1": 128, "i2": 2**15, "i4": 2**31}
    parts = []
    with av.open(io.BytesIO(data)) as file:
        for frame in file.decode(audio=0):
            array = frame.to_ndarray().astype(np.float64)
            dtype = frame.to_ndarray().dtype.str[1:]
            array = (array - 128 if dtype == "u1" else array) / scale.get(dtype, 1)
            packed = not frame.format.is_planar
            parts.append(array.reshape(-1, frame.layout.nb_channels) if packed else array.T)
    return np.concatenate(parts)


def stereo(samples):
    """Two channels that are not alike, whose mean is the sound itself."""
    return np.stack([samples + samples // 4, samples - samples // 4], axis=1)


SAMPLES, RATE = spoken()
TRUTH = SAMPLES / 32768
AT_16K = resample_poly(TRUTH, 320, 441)
AT_48K = np.rint(np.clip(resample_poly(TRUTH, 320, 147) * 32768, -32768, 32767)).astype(np.int16)

FILES = {
    "wav": ("wav", "pcm_s16le", RATE),
    "wav-u8": ("wav", "pcm_u8", RATE),
    "wav-24": ("wav", "pcm_s24le", RATE),
    "wav-float": ("wav", "pcm_f32le", RATE),
    "wav-double": ("wav", "pcm_f64le", RATE),
    "wav-alaw": ("wav", "pcm_alaw", RATE),
    "wav-mulaw": ("wav", "pcm_mulaw", RATE),
    "mp3": ("mp3", "libmp3lame", RATE),
    "flac": ("flac", "flac", RATE),
    "ogg-vorbis": ("ogg", "vorbis", RATE),
    "ogg-opus": ("ogg", "libopus", 48_000),
    "m4a-aac": ("ipod", "aac", RATE),
    "m4a-alac": ("ipod", "alac", RATE),
    "mp4-aac": ("mp4", "aac", 48_000),
    "aac": ("adts", "aac", RATE),
    "webm": ("webm", "libopus", 48_000),
}
EXACT = ("wav", "wav-24", "wav-float", "wav-double", "flac", "m4a-alac")
LAYOUTS = ("mono", "stereo")


@functools.cache
def file_of(name, layout="mono"):
    format_, codec, rate = FILES[name]
    samples = SAMPLES if rate == RATE else AT_48K
    return written(samples if layout == "mono" else stereo(samples), rate, format_, codec, layout)


# What is sound is read.


def test_the_sentence_is_one():
    assert 2 < len(SAMPLES) / RATE < 6
    assert np.abs(SAMPLES).max() > 10_000


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FILES)
def test_a_sentence_in_any_kind_of_file_reaches_the_model_at_its_rate(listener, name, layout):
    if (name, layout) == ("ogg-vorbis", "mono"):
        pytest.skip("libav writes Vorbis in stereo only")
    client = listener()
    data = file_of(name, layout)
    own, rate = hear(client, data, None)
    assert rate == FILES[name][2]
    direct = plain(data)
    assert direct.shape[1] == 1 + (layout == "stereo")
    assert np.abs(own - direct.mean(axis=1)).max() < 1e-6
    if name in EXACT:
        assert np.abs(own - TRUTH).max() <= (0 if layout == "mono" else 2**-16)
    heard, rate = hear(client, data)
    assert rate == 16_000
    assert abs(len(heard) - len(AT_16K)) < 1600  # AAC pads two frames of 1024 samples
    assert likeness(heard, AT_16K) > 0.99
    if name in EXACT:
        assert likeness(heard, AT_16K, most=0) > 0.9999


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 16_000, 44_100, 96_000, 192_000])
def test_any_rate_is_resampled(listener, rate):
    at = resample_poly(TRUTH, rate // 75, RATE // 75) if rate % 75 == 0 else TRUTH[:: RATE // rate]
    samples = np.rint(at * 30_000).astype(np.int16)
    heard, _ = hear(listener(), wav(samples, rate))
    assert abs(len(heard) - len(samples) * 16_000 / rate) <= 1
    low = resample_poly(samples / 32768, 16_000 // 25, rate // 25)
    assert likeness(heard, low, most=0) > 0.99


@pytest.mark.parametrize(("channels", "layout"), [(3, "2.1"), (6, "5.1"), (7, "6.1"), (8, "7.1")])
@pytest.mark.parametrize("name", ["wav", "flac", "mp4-aac", "ogg-opus"])
def test_channels_are_averaged(listener, name, channels, layout):
    if channels == 3 and name in ("ogg-opus", "mp4-aac"):
        pytest.skip("libopus writes no 2.1, and AAC leaves little of what is louder there")
    format_, codec, rate = FILES[name]
    samples = SAMPLES if rate == RATE else AT_48K
    weights = np.arange(1, channels + 1) / channels
    every = np.rint(samples[:, None] * weights).astype(np.int16)
    data = written(every, rate, format_, codec, layout)
    heard, _ = hear(listener(), data, None)
    mean = every.mean(axis=1) / 32768
    if name in EXACT:
        assert np.abs(heard - mean).max() < 1e-6
    # AAC and Opus keep of a subwoofer's channel what a subwoofer plays.
    assert likeness(heard, mean) > 0.9
    loud = np.sqrt((heard**2).mean() / (mean**2).mean())
    assert 0.8 < loud < 1.05


def test_a_wav_of_a_stream_that_does_not_know_its_length_is_read(listener):
    data = bytearray(wav(SAMPLES, RATE))
    for length in (0x7FFFF000, 0xFFFFFFFF):  # espeak-ng's, and ffmpeg's into a pipe
        data[40:44] = length.to_bytes(4, "little")
        heard, _ = hear(listener(), bytes(data), None)
        assert np.array_equal(heard, TRUTH.astype(np.float32))


def test_tags_are_no_sound(listener):
    data = file_of("mp3")
    tag = b"ID3\x04\x00\x00\x00\x00\x10\x00" + bytes(2048)
    heard, _ = hear(listener(), tag + data[45:] if data[:3] == b"ID3" else tag + data, None)
    assert likeness(heard, TRUTH) > 0.99


def test_tags_may_be_in_any_coding(listener):
    info = b"INFOINAM" + (4).to_bytes(4, "little") + "café".encode("latin-1")
    at = WAV.index(b"data")
    data = WAV[:at] + b"LIST" + len(info).to_bytes(4, "little") + info + WAV[at:]
    with pytest.raises(UnicodeDecodeError), av.open(io.BytesIO(data)):
        pass
    assert np.array_equal(hear(listener(), data)[0], hear(listener(), WAV)[0])


def test_a_sound_of_which_nothing_is_left_at_the_models_rate_is_refused(listener):
    client = listener()
    data = wav(SAMPLES[:1], 48_000)
    assert len(hear(client, data, None)[0]) == 1
    answer = run(client, "hear-16000", base64_of(data))
    assert answer.status_code == 400
    assert answer.json["error"]["details"] == {"input": "has no samples"}


def test_floats_that_are_no_sound_are_kept_within_bounds():
    values = np.array([np.nan, np.inf, -np.inf, 1e300, 2.0, -0.5] * 100)
    data = written(np.zeros(600, np.int16), RATE, "wav", "pcm_f64le")
    data = data[:-4800] + values.astype("<f8").tobytes()
    samples = decode(data)["samples"]
    assert samples[:6].tolist() == [0, 1, -1, 1, 1, -0.5]
    assert np.abs(decode(data, rate=16_000)["samples"]).max() <= 1


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("wav", ["audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"]),
        ("mp3", ["audio/mpeg", "audio/mp3"]),
        ("flac", ["audio/flac", "audio/x-flac"]),
        ("ogg-opus", ["audio/ogg", "application/ogg", "audio/opus"]),
        ("m4a-aac", ["audio/mp4", "audio/m4a", "audio/x-m4a", "audio/aac", "video/mp4"]),
        ("webm", ["audio/webm", "video/webm"]),
        ("aac", ["audio/aac", "audio/aacp"]),
    ],
)
def test_a_kind_goes_by_many_names(listener, name, labels):
    client = listener()
    data = base64_of(file_of(name))
    for label in [*labels, "application/octet-stream"]:
        answer = run(client, "hear-16000", f"data:{label};codecs=any;base64,{data}")
        assert answer.status_code == 200, answer.json
    answer = run(client, "hear-16000", f"data:image/png;base64,{data}")
    assert answer.status_code == 400
    assert answer.json["error"]["details"]["input"].endswith("and its label says image/png")


def test_resampling_is_what_scipy_does():
    heard = resample(TRUTH.astype(np.float32), RATE, 16_000)
    assert abs(len(heard) - len(AT_16K)) <= 1
    assert likeness(heard, AT_16K, most=0) > 0.9999
    assert resample(heard, 16_000, 16_000) is heard
    assert len(resample(heard[:0], 16_000, 8_000)) == 0


# What is hostile is refused.


def with_head(data, at, value, size=4):
    changed = bytearray(data)
    changed[at : at + size] = value.to_bytes(size, "little")
    return bytes(changed)


def crc(data, polynomial, bits):
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (bits - 1) else 0)
            value &= (1 << bits) - 1
    return value.to_bytes(bits // 8, "big")


def silent_flac(seconds, rate=8_000, *, told=True):
    """16 bytes for each 65,535 samples; one whose length is not told has 0 in its head."""
    block = 65_535
    frames = seconds * rate // block + 1
    numbers = rate << 44 | 15 << 36 | (frames * block if told else 0)
    sizes = block.to_bytes(2, "big") * 2 + bytes(6)
    file = b"fLaC\x80\x00\x00\x22" + sizes + numbers.to_bytes(8, "big") + bytes(16)
    for number in range(frames):
        # A frame is numbered as UTF-8 numbers a character, and its one channel is constant.
        head = b"\xff\xf8\x70\x08" + chr(number).encode() + (block - 1).to_bytes(2, "big")
        frame = head + crc(head, 0x07, 8) + bytes(3)
        file += frame + crc(frame, 0x8005, 16)
    return file


def silent_opus(seconds):
    """Two bytes for each 120 ms: six times nothing."""
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as out:
        stream = out.add_stream("libopus", rate=48_000, layout="mono")
        stream.codec_context.open()
        for number in range(int(seconds / 0.12)):
            packet = av.Packet(b"\x0b\x06")
            packet.stream, packet.time_base = stream, stream.codec_context.time_base
            packet.pts = packet.dts = number * 5_760
            packet.duration = 5_760
            out.mux(packet)
    return file.getvalue()


def channels_on_the_way():
    return file_of("aac") + written(
        np.repeat(SAMPLES[:, None], 8, axis=1), RATE, "adts", "aac", "7.1"
    )


def film():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


WAV = wav(SAMPLES, RATE)
NO_KIND = "is no sound of a kind that is read here: wav, mp3, flac, ogg (Vorbis, Opus), m4a, aac, "
HOSTILE = {
    "text": (lambda: b"Cranes are large birds with long legs." * 9, NO_KIND),
    "utf-16": (lambda: "Cranes are birds.".encode("utf-16"), NO_KIND),
    "playlist": (lambda: b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n", NO_KIND),
    "picture": (lambda: picture_file(picture(64, 64)), NO_KIND),
    "jpeg": (lambda: picture_file(picture(64, 64), "JPEG"), NO_KIND),
    "webp": (lambda: picture_file(picture(64, 64), "WEBP"), NO_KIND),
    "one-byte": (lambda: b"\xff", NO_KIND),
    "a-head-alone": (lambda: b"RIFF\x00\x00\x00\x00WAVE", "is damaged or cut short"),
    "film-without-sound": (film, "has no sound in it"),
    "no-samples": (lambda: wav(SAMPLES[:0], RATE), "has no samples"),
    "no-samples-flac": (lambda: written(SAMPLES[:0], RATE, "flac", "flac"), "has no samples"),
    "1-MHz": (
        lambda: wav(SAMPLES, 1_000_000),
        "has 1000000 samples a second; 4,000 to 192,000 are read",
    ),
    "1-Hz": (lambda: wav(SAMPLES, 1), "has 1 samples a second; 4,000 to 192,000 are read"),
    "64-channels": (
        lambda: wav(np.repeat(SAMPLES[:, None], 64, axis=1), RATE),
        "has 64 channels; at most 8 are read",
    ),
    "no-channels": (lambda: with_head(WAV, 22, 0, 2), "has 0 channels; at most 8 are read"),
    "unread-coding": (
        lambda: written(SAMPLES, RATE, "wav", "adpcm_ima_wav"),
        "has its sound in a coding that is not read here",
    ),
    "other-channels-on-the-way": (
        channels_on_the_way,
        "changes its number of channels on the way",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_sound_is_refused_by_name(listener, name):
    make, fault = HOSTILE[name]
    client = listener()
    for model in ("hear-16000", "hear-None"):
        answer = run(client, model, base64_of(make()))
        assert answer.status_code == 400, answer.json
        assert answer.json["error"]["details"]["input"].startswith(fault)


@pytest.mark.parametrize("value", ["", "UklGRg*=", "data:audio/wav;base64,", "data:audio/wav", 5])
def test_what_is_no_media_is_refused_by_name(listener, value):
    answer = run(listener(), "hear-16000", value)
    assert answer.status_code == 400
    assert "input" in answer.json["error"]["details"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_short_is_refused(listener, capfd, name):
    client = listener()
    data = file_of(name, "stereo")
    for cut in (1, 7, 100, len(data) // 3, len(data) // 2, len(data) - 40, len(data) - 20):
        answer = run(client, "hear-16000", base64_of(data[:-cut]))
        assert answer.status_code == 400, (cut, len(data))
        fault = answer.json["error"]["details"]["input"]
        assert fault == "is damaged or cut short" or fault.startswith(("has no", "is no")), cut
    assert "libav" not in (told := capfd.readouterr().err)
    assert "Invalid data" not in told


def test_a_sound_that_is_called_something_else_is_refused(listener):
    client = listener()
    for name, label in (("wav", "audio/mpeg"), ("mp3", "audio/wav"), ("flac", "audio/ogg")):
        url = f"data:{label};base64,{base64_of(file_of(name))}"
        answer = run(client, "hear-16000", url)
        assert answer.status_code == 400
        assert answer.json["error"]["details"]["input"].endswith(f", and its label says {label}")


SILENCES = {
    "flac": silent_flac,
    "flac-of-unknown-length": lambda seconds: silent_flac(seconds, told=False),
    "opus": silent_opus,
}


@pytest.mark.parametrize("name", SILENCES)
def test_an_hour_of_silence_in_a_small_file_is_refused_and_not_held(listener, name):
    assert np.abs(decode(SILENCES[name](60))["samples"]).max() < 1e-3  # Opus makes a faint noise
    data = SILENCES[name](3600)
    assert len(data) < (10_000 if "flac" in name else 200_000)
    answer = run(listener(), "hear-16000", base64_of(data))
    assert answer.status_code == 413
    assert "1800 s are allowed" in answer.json["error"]["details"]["input"]
    claimed = []

    def claim(samples, rate):
        claimed.append(samples)
        if sum(claimed) > 60 * rate:
            raise Refused("is too long", too_large=True)

    with pytest.raises(Refused, match="is too long"):
        decode(data, rate=16_000, claim=claim)
    told = name != "flac-of-unknown-length"
    # At once where the file says how long it is, else when it has gone too far.
    assert len(claimed) == 1 if told else sum(claimed[:-1]) <= 60 * 16_000 < sum(claimed)


@pytest.mark.parametrize(
    ("name", "alone_s", "after_s"),
    # One is known to be too long by what it says, the other by its third block, or its first.
    [("flac", 65.5, 65.5), ("flac-of-unknown-length", 24.6, 8.2)],
)
def test_a_sound_that_is_too_long_is_told_from_those_before_it(listener, name, alone_s, after_s):
    client = listener(max_audio_s=20)
    brief, long = base64_of(silent_flac(15)), base64_of(SILENCES[name](60))
    most = "at most 20 s are allowed in a call"
    details = run(client, "hear-16000", long).json["error"]["details"]
    assert details == {"input": f"lasts {alone_s} s or more; {most}"}
    details = run(client, "hear-16000", [brief, long]).json["error"]["details"]
    assert details == {"input[1]": f"lasts {after_s} s or more after 16.4 s in this call; {most}"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rate", [None, 16_000])
def test_no_sample_is_held_that_was_not_claimed_or_was_claimed_twice(name, rate):
    claimed = []
    read = decode(
        file_of(name, "stereo"), rate, claim=lambda samples, rate: claimed.append((samples, rate))
    )
    assert {at for _, at in claimed} == {read["rate"]}
    over = sum(samples for samples, _ in claimed) - len(read["samples"])
    assert 0 <= over / read["rate"] < 0.1  # a container may count what is cut off its ends
    assert min(samples for samples, _ in claimed) > 0


# What is written.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format_", AUDIO_FORMATS)
@pytest.mark.parametrize("rate", [RATE, 16_000, 44_100])
def test_what_is_written_is_what_is_read(format_, layout, rate):
    channels = TRUTH if layout == "mono" else stereo(SAMPLES) / 32768
    media = encode_audio(channels.astype(np.float32), rate, format_)
    assert media.mime_type == AUDIO_FORMATS[format_]
    with av.open(io.BytesIO(media.data)) as file:
        stream = file.streams.audio[0]
        assert stream.rate == (48_000 if format_ == "ogg" and rate > 24_000 else stream.rate)
        got, length = stream.rate, len(TRUTH) / rate
    read = plain(media.data)
    assert read.shape[1] == (1 if layout == "mono" else 2)
    assert abs(len(read) / got - length) < 0.08
    wanted = channels.reshape(len(channels), -1)
    if format_ in ("wav", "flac"):
        assert np.abs(read - wanted).max() <= 2**-16
        return
    for mine, theirs in zip(read.T, wanted.T, strict=True):
        at = resample_poly(theirs, got // 25, rate // 25) if got != rate else theirs
        assert likeness(mine, at) > 0.98


def test_what_is_too_loud_is_clipped_and_wav_is_a_wav():
    loud = np.array([2.0, -2.0, 0.5, -1.0, 1.0], np.float32)
    with wave.open(io.BytesIO(encode_audio(loud, 8_000, "wav").data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8_000, 1, 2)
        read = np.frombuffer(file.readframes(9), "<i2")
    assert read.tolist() == [32767, -32768, 16384, -32768, 32767]


def test_a_base64_of_a_wav_is_sent_as_any_other(listener):
    text = base64.encodebytes(WAV).decode()  # with line breaks
    answer = run(listener(), "hear-None", text)
    assert answer.status_code == 200
