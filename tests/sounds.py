"""Sounds for the tests: a sentence that espeak-ng says, and files of every kind."""

from __future__ import annotations

import base64
import ctypes
import functools
import io
import shutil
import subprocess
import wave
from pathlib import Path

import av
import numpy as np
import pytest

SENTENCE = "The crane stands on one leg and watches the river in the morning."


@functools.cache
def spoken(text: str = SENTENCE) -> tuple[np.ndarray, int]:
    """What espeak-ng says: int16 samples and their rate, 22,050 Hz."""
    if program := shutil.which("espeak-ng"):
        done = subprocess.run([program, "--stdout", text], capture_output=True, check=True)
        # Its head has no length, so the samples are what follows the 44 bytes.
        rate = int.from_bytes(done.stdout[24:28], "little")
        return np.frombuffer(done.stdout[44:], np.int16), rate
    loader = pytest.importorskip("espeakng_loader")
    library = ctypes.CDLL(loader.get_library_path())
    path = str(Path(loader.get_data_path()).parent).encode()
    rate = library.espeak_Initialize(2, 0, path, 0)  # 2: whatever is said is given back at once
    assert rate > 0
    heard: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def listen(samples, count, events):
        if samples:
            heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(listen)
    said = text.encode()
    assert library.espeak_SetVoiceByName(b"en") == 0
    assert library.espeak_Synth(said, len(said) + 1, 0, 1, 0, 1, None, None) == 0
    library.espeak_Terminate()
    return np.frombuffer(b"".join(heard), np.int16), rate


def wav(samples: np.ndarray, rate: int) -> bytes:
    """A WAV of int16 samples ``(n,)`` or ``(n, channels)``, by the standard library."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(samples.shape[1] if samples.ndim == 2 else 1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.ascontiguousarray(samples, "<i2").tobytes())
    return file.getvalue()


def written(
    samples: np.ndarray, rate: int, format_: str, codec: str, layout="mono", **how
) -> bytes:
    """int16 samples in a file, by PyAV."""
    file = io.BytesIO()
    options = {"strict": "-2"} if codec == "vorbis" else {}
    with av.open(file, "w", format=format_, options=how) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout, options=options)
        for at in range(0, len(samples), rate):
            block = np.ascontiguousarray(samples[at : at + rate]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
            frame.sample_rate, frame.pts = rate, at
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def heard(output: dict | bytes) -> np.ndarray:
    """The samples of an answer's WAV, float64, ``(n,)`` or ``(n, channels)``."""
    data = output if isinstance(output, bytes) else base64.b64decode(output["data"])
    with wave.open(io.BytesIO(data)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        channels = file.getnchannels()
    return samples if channels == 1 else samples.reshape(-1, channels)


def likeness(one: np.ndarray, other: np.ndarray, most: int = 2400) -> float:
    """The correlation of two sounds, at the best shift of up to ``most`` samples."""
    from scipy.signal import correlate

    n = min(len(one), len(other))
    one, other = one[:n] - one[:n].mean(), other[:n] - other[:n].mean()
    full = correlate(one, other, method="fft")[n - 1 - most : n + most]
    return float(full.max() / np.sqrt((one**2).sum() * (other**2).sum()))
