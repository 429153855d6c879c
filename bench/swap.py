"""What it costs to have more models than fit: loads against the best order, and what a load takes.

``python -m bench.swap`` makes eight Llama checkpoints of about 120 MB with random weights. It sends
one trace (A B A A C A B C, room for two) one call after another, and a Zipf trace over all eight
(room for three) from four clients at once; and times a load beside the bare ``from_pretrained``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from bench.servers import Server, crane

NAMES = "ABCDEFGH"
BARE = """
import sys, time
import torch, transformers
transformers.utils.logging.disable_progress_bar()
times = []
for _ in range(int(sys.argv[2])):
    started = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    times.append(time.perf_counter() - started)
    del model
print(sorted(times[1:])[len(times[1:]) // 2])
"""


def make_checkpoints(folder: Path) -> dict[str, Path]:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from backend.adapters.transformers_base import quiet
    from tests.checkpoints import llama

    quiet()
    made = {}
    for name in NAMES:
        path = made[name] = folder / name
        llama(path)
        config = LlamaConfig.from_pretrained(path)
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 7
        config.num_attention_heads = config.num_key_value_heads = 8
        config.head_dim = 64
        config.vocab_size = len(AutoTokenizer.from_pretrained(path))
        LlamaForCausalLM(config).save_pretrained(path)
    return made


def serve(folder: Path, checkpoints: dict[str, Path], room: int):
    """Crane with all models, and memory for ``room`` of them."""
    weights = max((path / "model.safetensors").stat().st_size for path in checkpoints.values())
    entries = [
        {"id": name, "type": "text-generation", "hf_model": str(path)}
        for name, path in checkpoints.items()
    ]
    models = folder / "models.yaml"
    models.write_text(yaml.safe_dump({"models": entries}))
    return crane(
        CRANE_MODELS=models,
        CRANE_DTYPE="float32",
        CRANE_LOG_FORMAT="json",
        CRANE_MEMORY_BUDGET=int(weights * (room + 0.5)),
    )


def call(server: Server, name: str) -> float:
    """Seconds of a call that writes four tokens."""
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = {"model_id": name, "input": "the river", "options": {"max_tokens": 4}}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/crane/run", json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(answer.decode())
    return time.perf_counter() - started


def fewest_loads(trace: Sequence[str], room: int) -> int:
    """Belady's: whatever is needed the latest leaves first."""
    held: set[str] = set()
    loads = 0
    for place, name in enumerate(trace):
        if name in held:
            continue
        loads += 1
        if len(held) == room:
            rest = list(trace[place:])
            held.remove(max(held, key=lambda one: rest.index(one) if one in rest else len(rest)))
        held.add(name)
    return loads


def loads_of(server: Server) -> list[float]:
    """Seconds of each load so far."""
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    return [line["load_s"] for line in lines if re.fullmatch(r"\w loaded", line["message"])]


def run(server: Server, trace: Sequence[str], clients: int, room: int, title: str) -> None:
    before = len(loads_of(server))
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        times = sorted(threads.map(lambda name: call(server, name), trace))
    took = time.perf_counter() - started
    loads = loads_of(server)[before:]
    best = fewest_loads(trace, room)
    print(f"{title}: {len(trace)} calls, {clients} clients, room for {room}, {took:.1f} s")
    print(f"  loads {len(loads)}; the best order, known before: {best}")
    print(f"  time in loads {sum(loads):.1f} s, {sum(loads) / took:.2f} of the whole")
    p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
    print(f"  a call takes p50 {statistics.median(times):.3f} s, p99 {p99:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoints = make_checkpoints(folder)
        with serve(folder, checkpoints, 2) as server:
            call(server, "H")  # imports the libraries, once
            run(server, "ABAACABC", 1, 2, "A B A A C A B C")
        with serve(folder, checkpoints, 3) as server:
            call(server, "A")
            chance = random.Random(7)
            weights = [1 / (rank + 1) for rank in range(len(NAMES))]
            trace = chance.choices(NAMES, weights, k=options.calls)
            run(server, trace, 4, 3, "Zipf")
            for _ in range(options.rounds):  # each call's model is another's, and must load
                for name in "ABCD":
                    call(server, name)
            loads = loads_of(server)[-4 * options.rounds :]
        command = [sys.executable, "-c", BARE, str(checkpoints["A"]), str(options.rounds + 1)]
        bare = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ours = statistics.median(loads)
        print(
            f"a load takes {ours:.3f} s, from_pretrained {bare:.3f} s: {bare / ours:.2f} its speed"
        )


if __name__ == "__main__":
    main()
