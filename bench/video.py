"""Films: Crane against the bare diffusers pipeline and the same encoder, on the same weights.

``python -m bench.video`` builds a Wan checkpoint with random weights, large enough that its steps
are nearly all of a call and small enough for two cores. One caller's film is compared with one bare
call whose frames are encoded as Crane encodes them, in turns; the median of the ratios is printed.
While the bare pipeline runs, the server is stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import yaml

from backend.media.video import encode_video
from bench.servers import Server, crane
from tests.video_checkpoints import wan

OPTIONS = {"num_inference_steps": 8, "num_frames": 17, "width": 192, "height": 128}
FPS = 16
PROMPT = "the old tower at the river in the morning"
# 11 million parameters.
TRANSFORMER = {"num_attention_heads": 8, "attention_head_dim": 48, "ffn_dim": 1536, "num_layers": 4}


def call(server: Server, seed: int) -> None:
    """One caller's film, from the request to the last byte of the answer."""
    body = {"model_id": "films", "input": PROMPT, "options": {**OPTIONS, "fps": FPS, "seed": seed}}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=600)
    connection.request("POST", "/crane/run", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert response.status == 200, answer[:500]


def seconds(work: object, *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def compare(dtype: str, folder: Path, rounds: int) -> None:
    import diffusers
    import torch

    models = folder / "models.yaml"
    entry = {"id": "films", "type": "text-to-video", "hf_model": str(folder / "weights")}
    models.write_text(yaml.safe_dump({"models": [entry]}))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder / "weights", dtype=getattr(torch, dtype)
    )
    pipeline.set_progress_bar_config(disable=True)

    def bare(seed: int) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        output = pipeline(PROMPT, generator=generator, output_type="pil", **OPTIONS)
        encode_video(np.stack([np.asarray(frame) for frame in output.frames[0]]), FPS)

    with crane(CRANE_MODELS=models, CRANE_DTYPE=dtype) as server:
        bare(0)
        call(server, 0)
        pairs = []
        for seed in range(rounds):
            server.suspend()
            alone = seconds(bare, seed)
            server.resume()
            pairs.append((alone, seconds(call, server, seed)))
    alone, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ours / alone for alone, ours in pairs)
    print(f"{dtype}, {OPTIONS}, median of {rounds} rounds:")
    print(f"  bare with the encoder {alone:.3f} s, Crane {ours:.3f} s")
    print(f"  Crane takes {ratio:.3f} of the bare call's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wan(Path(folder) / "weights", **TRANSFORMER)
        for dtype in options.dtypes:
            compare(dtype, Path(folder), options.rounds)


if __name__ == "__main__":
    main()
