"""Pictures: Crane against the bare diffusers pipeline, on the same weights in the same run.

``python -m bench.images`` builds a Stable Diffusion checkpoint with random weights, large enough
that its steps are nearly all of a call and small enough for two cores. One caller is compared with
one bare call, and eight callers at once with eight bare calls one after another, in turns; medians
of the ratios are printed. While the bare pipeline runs, the server is stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import yaml

from bench.servers import Server, crane
from tests.diffusers_checkpoints import stable_diffusion

STEPS = 20
CALLERS = 8
PROMPT = "the old tower at the river in the morning"
# 30 million parameters, 128 x 128 pixels.
UNET = {"sample_size": 16, "block_out_channels": (96, 192), "layers_per_block": 2}


def call(server: Server, seed: int) -> None:
    """One caller's picture, from the request to the last byte of the answer."""
    options = {"num_inference_steps": STEPS, "seed": seed}
    body = {"model_id": "drawer", "input": PROMPT, "options": options}
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
    entry = {"id": "drawer", "type": "text-to-image", "hf_model": str(folder / "weights")}
    models.write_text(yaml.safe_dump({"models": [entry]}))
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
        folder / "weights", dtype=getattr(torch, dtype)
    )
    pipeline.set_progress_bar_config(disable=True)

    def bare(count: int) -> None:
        for seed in range(count):
            generator = torch.Generator("cpu").manual_seed(seed)
            pipeline(PROMPT, num_inference_steps=STEPS, generator=generator)

    def served(count: int) -> None:
        with ThreadPoolExecutor(count) as callers:
            list(callers.map(lambda seed: call(server, seed), range(count)))

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
            print(f"{dtype}, {count} at once, {STEPS} steps, median of {rounds} rounds:")
            print(f"  bare {alone:.3f} s, Crane {ours:.3f} s")
            if count == 1:
                print(f"  Crane takes {ratio:.3f} of the bare call's time")
            else:
                print(f"  Crane has {1 / ratio:.2f} times the throughput")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stable_diffusion(Path(folder) / "weights", **UNET)
        for dtype in options.dtypes:
            compare(dtype, Path(folder), options.rounds)


if __name__ == "__main__":
    main()
