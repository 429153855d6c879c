"""Speech to text: Crane against the bare transformers pipeline, on the same weights.

``python -m bench.speech`` builds a Whisper checkpoint with random weights of the size of
whisper-tiny, vocabulary included, whose texts always have the same number of tokens. One caller is
compared with one bare call, and eight callers at once, of a sound of 5 s each, with eight bare
calls one after another, in turns; medians of the ratios are printed. While the bare pipeline runs,
the server is stopped.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import tempfile
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import yaml

from bench.servers import Server, crane
from tests.recognition_checkpoints import whisper

TOKENS = 32  # some ten words
CALLERS = 8
SECONDS = 5
TYPE = "automatic-speech-recognition"
# As whisper-tiny: windows of 30 s.
VOCABULARY = 51_865
SIZES = {
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "num_mel_bins": 80,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}


def sound(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(SECONDS * 16_000)
    return (noise * 3000).astype(np.int16)


def wav(pcm: np.ndarray) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(pcm.tobytes())
    return base64.b64encode(file.getvalue()).decode()


def widen(folder: Path) -> None:
    """Give the model as many tokens as whisper-tiny has: to score them is much of its work.

    Those that its tokenizer lacks score 0, which is never the most.
    """
    import torch
    import transformers

    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    known = model.config.vocab_size
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[known:] = 0
    model.save_pretrained(folder)


def never_ends(folder: Path) -> None:
    """Have every text written to its last token, so that all of them are the same work."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    settings["suppress_tokens"].append(settings["eos_token_id"])
    path.write_text(json.dumps(settings))


def call(server: Server, sent: str, language: str | None) -> None:
    """One caller's text, from the request to the last byte of the answer."""
    options = {"max_tokens": TOKENS, "language": language}
    body = {"model_id": "listener", "input": sent, "options": options}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=600)
    connection.request("POST", "/crane/run", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert response.status == 200, answer[:500]
    assert json.loads(answer)["metadata"]["usage"]["output_tokens"] == TOKENS, answer[:500]


def seconds(work: object, *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def compare(dtype: str, folder: Path, rounds: int, language: str | None) -> None:
    import torch
    import transformers

    models = folder / "models.yaml"
    entry = {"id": "listener", "type": TYPE, "hf_model": str(folder / "weights")}
    models.write_text(yaml.safe_dump({"models": [entry]}))
    pipeline = transformers.pipeline(
        TYPE, model=str(folder / "weights"), dtype=getattr(torch, dtype), device="cpu"
    )
    how = {"num_beams": 1, "max_new_tokens": TOKENS, "task": "transcribe", "language": language}
    heard = [sound(seed).astype(np.float32) / 32768 for seed in range(CALLERS)]
    sent = [wav(sound(seed)) for seed in range(CALLERS)]

    def bare(count: int) -> None:
        for samples in heard[:count]:
            pipeline(samples, generate_kwargs=how)

    def served(count: int) -> None:
        with ThreadPoolExecutor(count) as callers:
            list(callers.map(lambda one: call(server, one, language), sent[:count]))

    with crane(CRANE_MODELS=models, CRANE_DTYPE=dtype) as server:
        for count in (1, CALLERS):
            bare(1)
            served(count)
            pairs = []
            for _ in range(rounds):
                server.suspend()
                alone = seconds(bare, count)
                server.resume()
                pairs.append((alone, seconds(served, count)))
            alone, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(ours / alone for alone, ours in pairs)
            told = f"language {language}" if language else "language heard"
            print(f"{dtype}, {told}, {count} at once, median of {rounds} rounds:")
            print(f"  bare {alone:.3f} s, Crane {ours:.3f} s")
            if count == 1:
                print(f"  Crane takes {ratio:.3f} of the bare call's time")
            else:
                print(f"  Crane has {1 / ratio:.2f} times the throughput")


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        whisper(Path(folder) / "weights", **SIZES)
        widen(Path(folder) / "weights")
        never_ends(Path(folder) / "weights")
        for dtype in options.dtypes:
            # Where it is not told, the library encodes a sound twice, and Crane once.
            for language in ("en", None):
                compare(dtype, Path(folder), options.rounds, language)


if __name__ == "__main__":
    main()
