"""Chats: Crane, ``transformers serve`` with and without continuous batching, and bare ``generate``.

``python -m bench.generation`` measures a Llama of 33 million random weights, 8 layers of 512, at 1,
4, 16 and 64 callers, with 64 tokens for each and with 16 to 128, in bfloat16 and float32. Each
server is alone on the machine while it is measured; all of them stream, by the same route of
OpenAI's and to the same callers. ``generate`` gets as many prompts at once as there are callers.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from bench.chats import Result, measure
from bench.jobs import median
from bench.servers import ROOT, crane

CALLERS = (1, 4, 16, 64)
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


def build(folder: Path) -> None:
    """The checkpoint; no token ends a text of its, so that all are as long as they are asked."""
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
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@contextmanager
def transformers_serve(folder: Path, dtype: str, *more: str) -> Iterator[tuple[int, str]]:
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
            yield port, str(folder)
        finally:
            process.kill()
            process.wait(30)


@contextmanager
def crane_serve(folder: Path, dtype: str) -> Iterator[tuple[int, str]]:
    entry = {"id": "chat", "type": "chat", "hf_model": str(folder), "max_batch_size": 64}
    with tempfile.TemporaryDirectory() as place:
        models = Path(place) / "models.yaml"
        models.write_text(yaml.safe_dump({"models": [entry]}))
        with crane(CRANE_MODELS=models, CRANE_DTYPE=dtype, CRANE_THREADS=64) as server:
            measure(server.port, "chat", [("a", 2)], callers=1, stream=True)
            yield server.port, "chat"


def bare(folder: Path, dtype: str, lengths: str, callers: int) -> float:
    """Tokens per second of one ``generate`` for as many prompts as there are callers."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(folder), dtype, lengths, str(callers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return float(done.stdout.split()[-1])


BARE = """
import statistics, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from bench.generation import chats
folder, dtype, lengths, callers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
asked = chats(lengths, callers)
rates = []
for first in range(0, 3 * callers, callers):
    some = asked[first : first + callers]
    inputs = tokenizer([prompt for prompt, _ in some], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    started = time.perf_counter()
    # Whoever wants fewer tokens has them when the longest is done.
    model.generate(**inputs, max_new_tokens=max(tokens for _, tokens in some), do_sample=False)
    rates.append(sum(tokens for _, tokens in some) / (time.perf_counter() - started))
print(statistics.median(rates))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--callers", nargs="+", type=int, default=CALLERS)
    parser.add_argument("--lengths", nargs="+", default=["equal", "mixed"])
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(folder)
        contenders = {
            "transformers serve": lambda dtype: transformers_serve(folder, dtype),
            "… with continuous batching": lambda dtype: transformers_serve(
                folder, dtype, "--continuous-batching"
            ),
            "Crane": lambda dtype: crane_serve(folder, dtype),
        }
        for dtype in args.dtypes:
            found: dict[tuple[str, int, str], Result] = {}
            for name, start in contenders.items():
                if name in args.without:
                    continue
                with start(dtype) as (port, model):
                    for lengths in args.lengths:
                        for callers in args.callers:
                            # It has no batches, and takes minutes for many.
                            rounds = 1 if name == "transformers serve" else args.rounds
                            if name == "transformers serve" and callers > 16:
                                continue
                            for stream in (True, False) if name == "Crane" else (True,):
                                key = lengths, callers, name if stream else "Crane, no stream"
                                found[key] = median(
                                    [
                                        measure(
                                            port,
                                            model,
                                            chats(lengths, callers),
                                            callers=callers,
                                            stream=stream,
                                        )
                                        for _ in range(rounds)
                                    ]
                                )
            for lengths in args.lengths:
                for callers in args.callers:
                    report(found, dtype, lengths, callers, bare(folder, dtype, lengths, callers))


def report(
    found: dict[tuple[str, int, str], Result],
    dtype: str,
    lengths: str,
    callers: int,
    bare_rate: float,
) -> None:
    print(f"{dtype}, {lengths} lengths, {callers} callers")
    here = {name: one for (*where, name), one in found.items() if where == [lengths, callers]}
    for name, result in here.items():
        print(f"  {name:28}{result}")
    print(f"  {'one bare generate':28}{bare_rate:6.0f} tokens/s")
    ours = here["Crane"]
    ratios = [f"{ours.rate / bare_rate:.2f} of the bare batch"]
    if other := here.get("… with continuous batching"):
        ratios.append(f"{ours.rate / other.rate:.2f} of continuous batching")
        ratios.append(f"its first token in {ours.first_ms / other.first_ms:.2f} of the time")
    ratios.append(f"streaming keeps {ours.rate / here['Crane, no stream'].rate:.2f}")
    print(f"  Crane: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
