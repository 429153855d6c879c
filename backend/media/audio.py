"""Sound: bytes to samples, checked by content, and samples to bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.cores import all_cores
from backend.errors import CraneError
from backend.media import MAX_KEPT_RATE, NO_MEMORY, Media, Refused
from backend.media.sound_kinds import FLAC, find_kind

if TYPE_CHECKING:
    from av import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

logger = logging.getLogger("crane.media")

KINDS = "wav, mp3, flac, ogg (Vorbis, Opus), m4a, aac, webm"
MOST_CHANNELS = 8
RATES = (4_000, 192_000)
COST_RATE = 2 * 48_000  # samples of all channels that count as a second
COST_SLACK_S = 1.0  # so that a sound as long as is allowed is refused for its length alone
MIN_FRAME_S = 0.01  # a frame of a few samples costs as much as one of some hundred
# Fewer decoders are fewer for a hostile file to meet.
_DECODERS = (
    "pcm_u8,pcm_s16le,pcm_s24le,pcm_s32le,pcm_f32le,pcm_f64le,pcm_alaw,pcm_mulaw,"
    "mp3float,mp3,flac,vorbis,opus,libopus,aac,alac"
)

# What is written: the option `format`, and its media type.
AUDIO_FORMATS = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "ogg": "audio/ogg"}
# libav's encoder of each, and the only rates that it takes, if not all.
_WRITE: dict[str, tuple[str, tuple[int, ...]]] = {
    "wav": ("pcm_s16le", ()),
    "flac": ("flac", ()),
    "mp3": (
        "libmp3lame",
        (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
    ),
    "ogg": ("libopus", (8_000, 12_000, 16_000, 24_000, 48_000)),
}


@all_cores()
def decode_audio(
    data: bytes,
    *,
    rate: int | None,
    mime_type: str | None,
    claim: Callable[[int, int], None],
    max_cost_s: float = math.inf,
) -> dict[str, Any]:
    """The first sound of a file: ``{"samples": float32 from -1 to 1, "rate", "cost_s"}``.

    Its channels are averaged. With ``rate`` it is resampled to that, and without to 48,000 a second
    at most. ``mime_type`` is what the caller says it is, if anything; ``claim`` is asked for
    samples, at their rate, before they are kept. ``cost_s`` is what it costs, in seconds of stereo
    at 48,000 samples a second, where a frame counts as 10 ms at least: no more than about
    ``max_cost_s``. Raises ``Refused``.
    """
    kind = find_kind(data)
    if kind is None:
        raise Refused(f"is no sound of a kind that is read here: {KINDS}")
    if mime_type is not None and not kind.is_called(mime_type):
        raise Refused(f"is {kind.mime_type}, and its label says {mime_type}")
    kind.bound(data)
    damaged = Refused("is damaged or cut short")
    if kind.cut_short(data):
        raise damaged
    try:
        with _open(data, kind.demuxer) as container:
            stream = _stream(container)
            sound = None
            for frame in container.decode(stream):
                if sound is None:
                    sound = _Sound(frame, rate, claim, max_cost_s)
                    if kind.tells_length and stream.duration and stream.time_base:
                        sound.expect(float(stream.duration * stream.time_base))
                sound.add(frame)
            if sound is None:
                raise Refused("has no samples")
            sound.end()
            if kind is FLAC and sound.heard < sound.expected - 1:
                raise damaged
    except (Refused, CraneError):  # CraneError is claim's
        raise
    except MemoryError:
        raise Refused(NO_MEMORY) from None
    except Exception:  # a parser may stumble over a hostile file in any way
        logger.debug("a sound", exc_info=True)
        raise damaged from None
    if not sound.buffer:
        raise Refused("has no samples")
    samples = np.frombuffer(sound.buffer, np.float32)
    return {"samples": samples, "rate": sound.rate, "cost_s": sound.cost_s}


def _open(data: bytes, demuxer: str) -> InputContainer:
    import av

    # No protocol has this name, so nothing that a file names is opened: not a path, not a URL.
    only = {"codec_whitelist": _DECODERS, "protocol_whitelist": "none"}
    return av.open(BytesIO(data), "r", format=demuxer, options=only, metadata_errors="ignore")


def _stream(container: InputContainer) -> AudioStream:
    """The first stream of sound, if it is one that is read."""
    if not container.streams.audio:
        raise Refused("has no sound in it")
    stream = container.streams.audio[0]
    codec = stream.codec_context
    if codec.name not in _DECODERS.split(","):
        raise Refused("has its sound in a coding that is not read here")
    _check(codec.channels, codec.sample_rate)
    return stream


def _check(channels: int, rate: int) -> None:
    if not 1 <= channels <= MOST_CHANNELS:
        raise Refused(f"has {channels} channels; at most {MOST_CHANNELS} are read")
    low, high = RATES
    if not low <= rate <= high:
        raise Refused(f"has {rate} samples a second; {low:,} to {high:,} are read")


class _Sound:
    """Samples as they come, resampled and averaged on the way: no more is held than is wanted.

    A file may change its channels on the way. PyAV finds the planes of a frame by reading on
    until it meets a null pointer, which for eight planes and more is past their end: so frames are
    made to have one plane before their samples are touched.
    """

    def __init__(
        self,
        frame: AudioFrame,
        rate: int | None,
        claim: Callable[[int, int], None],
        max_cost_s: float,
    ) -> None:
        from av import AudioResampler

        self.own, self.channels = frame.sample_rate, frame.layout.nb_channels
        _check(self.channels, self.own)
        self.rate = rate or min(self.own, MAX_KEPT_RATE)
        self._claim, self._claimed = claim, 0
        self._max_cost_s, self.cost_s = max_cost_s, 0.0
        self._resampler = AudioResampler(format="flt", layout=frame.layout, rate=self.rate)
        self.buffer = bytearray()
        self.heard = self.expected = 0  # samples, at their own rate

    def expect(self, seconds: float) -> None:
        """Claim what the file says it has, so that it is refused before it is decoded."""
        self.expected = int(seconds * self.own)
        self._claim_up_to(int(seconds * self.rate))
        self._check_cost(self.expected * self.channels / COST_RATE)

    def add(self, frame: AudioFrame) -> None:
        if frame.layout.nb_channels != self.channels:
            raise Refused("changes its number of channels on the way")
        self.cost_s += max(frame.samples * self.channels / COST_RATE, MIN_FRAME_S)
        self._check_cost(self.cost_s)
        self.heard += frame.samples
        self._keep(self._resampler.resample(frame))

    def end(self) -> None:
        if self.own != self.rate:
            self._keep(self._resampler.resample(None))

    def _check_cost(self, cost_s: float) -> None:
        if cost_s > self._max_cost_s + COST_SLACK_S:
            raise Refused(
                f"takes as long to decode as {cost_s:.1f} s or more of stereo at 48,000 samples a "
                f"second; {self._max_cost_s:g} s are allowed: send fewer channels, a lower rate or "
                "longer frames",
                too_large=True,
            )

    def _keep(self, frames: list[AudioFrame]) -> None:
        for frame in frames:
            array = frame.to_ndarray().reshape(-1, self.channels)
            # Decoders overshoot a little, and floats in a WAV may be anything.
            mono = np.clip(np.nan_to_num(array), -1, 1).mean(axis=1, dtype=np.float32)
            self._claim_up_to(len(self.buffer) // 4 + len(mono))
            self.buffer += mono.tobytes()

    def _claim_up_to(self, samples: int) -> None:
        if samples > self._claimed:
            self._claim(samples - self._claimed, self.rate)
            self._claimed = samples


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Mono float32 samples of one rate at another."""
    if rate == wanted or not len(samples):
        return samples
    from av import AudioFrame, AudioResampler

    resampler = AudioResampler(format="flt", layout="mono", rate=wanted)
    parts = []
    for at in range(0, len(samples), rate):  # a second at a time
        block = np.ascontiguousarray(samples[at : at + rate], np.float32)
        frame = AudioFrame.from_ndarray(block[None], format="flt", layout="mono")
        frame.sample_rate = rate
        parts += resampler.resample(frame)
    return np.concatenate([part.to_ndarray()[0] for part in [*parts, *resampler.resample(None)]])


@all_cores()
def encode_audio(
    samples: np.ndarray, rate: int, format_: str, check: Callable[[], None] = lambda: None
) -> Media:
    """Write float32 samples, ``(n,)`` or stereo ``(n, 2)``, as ``wav``, ``flac``, ``mp3``, ``ogg``.

    What is beyond -1 and 1 is clipped. An mp3, or an ogg, which is Opus, has the next rate above
    ``rate`` that its kind knows. ``check`` is called before each second, and may raise.
    """
    import av

    codec, rates = _WRITE[format_]
    written = next((known for known in rates if known >= rate), rates[-1] if rates else rate)
    channels = samples.reshape(len(samples), -1).astype(np.float32, copy=False)
    if written != rate:
        both = [resample(np.ascontiguousarray(one), rate, written) for one in channels.T]
        channels = np.stack(both, axis=1)
    layout = "mono" if channels.shape[1] == 1 else "stereo"
    pcm = np.clip(np.rint(channels * 32768), -32768, 32767).astype(np.int16)
    file = BytesIO()
    with av.open(file, "w", format=format_) as container:
        stream = container.add_stream(codec, rate=written, layout=layout)
        assert isinstance(stream, av.AudioStream)
        for at in range(0, len(pcm), written):  # a second at a time
            check()
            block = np.ascontiguousarray(pcm[at : at + written]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
            frame.sample_rate, frame.pts = written, at
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Media(AUDIO_FORMATS[format_], file.getvalue())
