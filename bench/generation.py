"""Chats: Crane, ``transformers serve`` with and without continuous batching, and bare ``generate``.

``python -m bench.generation`` measures a Llama of 33 million random weights, 8 layers of 512, at 1,
4, 16 and 64 callers, with 64 tokens for each and with 16 to 128, in bfloat16 and float32. Each
of them is alone awake while it is measured, in turns; all servers stream, by the same route of
OpenAI's and to the same callers. ``generate`` gets as many prompts at once as there are callers.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import yaml

from bench.chats import Result, measure
from bench.jobs import median
from bench.servers import ROOT, Server, crane

CALLERS = (1, 4, 16, 64)
ALONE, TOGETHER = "transformers serve", "… with continuous batching"
# How many chats each of so many callers has; at one caller a chat takes longest.
CHATS = {1: 4, 4: 4, 16: 4, 64: 3}
WORDS = "the quick brown crane lifts a heavy load over the old harbour wall at dawn".split()  # noqa: SIM905
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def chats(lengths: str, callers: int) -> list[tuple[str, int]]:
    """Prompts of 8 to 24 words, no two alike, each with its number of tokens."""
    draw = random.Random(f"{lengths} {callers}")
    return [
        (
            " ".join(draw.choice(WORDS) for _ in range(draw.randint(8, 24))),
            64 if lengths == "equal" else draw.randint(16, 128),
        )
        for _ in range(CHATS[callers] * callers)
    ]


def build(folder: Path, **shape: int) -> None:
    """The checkpoint; no token ends a text of its, so that all are as long as they are asked.

    ``shape`` are settings of its config that are to differ.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet)
    text = [" ".join(WORDS)] * 4
    tokenizer.train_from_iterator(text, trainer)
    # Each token of the model has a text, a word that is in no prompt.
    tokenizer.add_tokens([f" w{place}" for place in range(8000 - tokenizer.get_vocab_size() - 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        **{"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, **shape},
        num_attention_heads=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@contextmanager
def transformers_serve(folder: Path, dtype: str, *more: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", dtype]
    with tempfile.TemporaryFile() as log:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, *more], env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    measure(port, str(folder), [("a", 2)], callers=1, stream=True)
                    break
                except RuntimeError:
                    if time.monotonic() > deadline or process.poll() is not None:
                        log.seek(0)
                        print(log.read().decode(), file=sys.stderr)
                        raise
                    time.sleep(0.5)
            yield Server(process, port)
        finally:
            process.kill()
            process.wait(30)


@contextmanager
def crane_serve(folder: Path, dtype: str) -> Iterator[Server]:
    entry = {"id": "chat", "type": "chat", "hf_model": str(folder), "max_batch_size": 64}
    with tempfile.TemporaryDirectory() as place:
        models = Path(place) / "models.yaml"
        models.write_text(yaml.safe_dump({"models": [entry]}))
        with crane(CRANE_MODELS=models, CRANE_DTYPE=dtype, CRANE_THREADS=64) as server:
            yield server


@contextmanager
def bare(folder: Path, dtype: str) -> Iterator[Callable[..., float]]:
    """Tokens per second of one ``generate`` for as many prompts as there are callers.

    In a process of its own, which waits where it is not asked: ``rate(lengths, callers, turn)``.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", BARE, str(folder), dtype],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def rate(lengths: str, callers: int, turn: int) -> float:
        process.stdin.write(f"{lengths} {callers} {turn}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    try:
        rate("equal", 16, 0)
        yield rate
    finally:
        process.kill()
        process.wait(30)


BARE = """
import sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from bench.generation import chats
folder, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
for line in sys.stdin:
    lengths, *numbers = line.split()
    callers, turn = map(int, numbers)
    asked = chats(lengths, callers)
    first = turn * callers % len(asked)
    some = asked[first : first + callers]
    inputs = tokenizer([prompt for prompt, _ in some], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    started = time.perf_counter()
    # Whoever wants fewer tokens has them when the longest is done.
    model.generate(**inputs, max_new_tokens=max(tokens for _, tokens in some), do_sample=False)
    print(sum(tokens for _, tokens in some) / (time.perf_counter() - started), flush=True)
"""


def compare(folder: Path, dtype: str, args: argparse.Namespace) -> None:
    starts: dict[str, tuple[str, AbstractContextManager[Server]]] = {
        ALONE: (str(folder), transformers_serve(folder, dtype)),
        TOGETHER: (str(folder), transformers_serve(folder, dtype, "--continuous-batching")),
        "Crane": ("chat", crane_serve(folder, dtype)),
    }
    with ExitStack() as stack:
        rate = stack.enter_context(bare(folder, dtype))
        servers: dict[str, tuple[str, Server]] = {}
        for name, (model, start) in starts.items():
            if name in args.without:
                continue
            server = stack.enter_context(start)
            # As they are once they have run for a while.
            measure(server.port, model, chats("mixed", 4), callers=4, stream=True)
            server.suspend()
            stack.callback(server.resume)  # so that it can be ended
            servers[name] = model, server
        for lengths in args.lengths:
            for callers in args.callers:
                asked, rates = chats(lengths, callers), []
                found: dict[str, list[Result]] = {}
                for turn in range(args.rounds):
                    rates.append(rate(lengths, callers, turn))
                    for name, (model, server) in servers.items():
                        # It has no batches, and takes minutes for many.
                        if name == ALONE and (callers > 16 or turn):
                            continue
                        server.resume()
                        # What was asleep is slower at first.
                        measure(server.port, model, asked[:callers], callers=callers, stream=True)
                        ways = [True, False] if name == "Crane" else [True]
                        for stream in reversed(ways) if turn % 2 else ways:
                            result = measure(
                                server.port, model, asked, callers=callers, stream=stream
                            )
                            shown = name if stream else "Crane, no stream"
                            found.setdefault(shown, []).append(result)
                        server.suspend()
                print(f"{dtype}, {lengths} lengths, {callers} callers")
                report(found, rates)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--callers", nargs="+", type=int, default=CALLERS)
    parser.add_argument("--lengths", nargs="+", default=["equal", "mixed"])
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        build(Path(place))
        for dtype in args.dtypes:
            compare(Path(place), dtype, args)


def report(found: dict[str, list[Result]], bare_rates: list[float]) -> None:
    """The medians of each, and of the ratios of each turn: a machine is not always as fast."""
    for name, results in found.items():
        print(f"  {name:28}{median(results)}")
    print(f"  {'one bare generate':28}{statistics.median(bare_rates):6.0f} tokens/s")
    rates = {name: [result.rate for result in results] for name, results in found.items()}
    ours = rates["Crane"]
    ratios = []
    if TOGETHER in found:
        firsts = [[one.first_ms for one in found[name]] for name in ("Crane", TOGETHER)]
        ratios.append(f"{_ratio(ours, rates[TOGETHER])} of continuous batching")
        ratios.append(f"its first token in {_ratio(*firsts)} of the time")
    ratios.append(f"{_ratio(ours, bare_rates)} of the bare batch")
    ratios.append(f"streaming keeps {_ratio(ours, rates['Crane, no stream'])}")
    print("  Crane: " + ",\n    ".join(ratios), flush=True)


def _ratio(ours: list[float], theirs: list[float]) -> str:
    each = [own / other for own, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


if __name__ == "__main__":
    main()
