"""What models cost each other on a CPU: a chat beside another that is idle, busy or loads.

``python -m bench.neighbours`` has two models of SmolLM2-135M's shape with random weights, 30 layers
of 576 in bfloat16. One caller streams chats from the first, one after another, while the second is
not loaded, loaded and idle, writing for one caller, or loaded and unloaded again and again.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from bench.chats import measure
from bench.generation import build
from bench.servers import Server, crane

TOKENS = 48
PROMPT = "the quick brown crane lifts a heavy load"


def chat(server: Server, model: str, tokens: int, **options: object) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    body = {"model_id": model, "input": {"messages": [{"role": "user", "content": PROMPT}]}}
    body |= {"options": {"max_tokens": tokens, **options}}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/crane/run", json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(answer.decode())


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do a work over and over, from one thread; the body begins when it was done once."""
    done, ended = threading.Event(), threading.Event()

    def loop() -> None:
        while not ended.is_set():
            work()
            done.set()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        if not done.wait(120):
            raise TimeoutError("the other model does nothing")
        yield
    finally:
        ended.set()
        thread.join()


def each_ms(server: Server, chats: int) -> float:
    """Milliseconds from a token to the next of the first model's."""
    return measure(server.port, "one", [(PROMPT, TOKENS)] * chats, callers=1, stream=True).each_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(folder / "model", hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
        entries = [
            {"id": name, "type": "chat", "hf_model": str(folder / "model")}
            for name in ("one", "other")
        ]
        models = folder / "models.yaml"
        models.write_text(yaml.safe_dump({"models": entries}))
        with crane(CRANE_MODELS=models, CRANE_DTYPE=args.dtype) as server:
            chat(server, "one", 16)
            for _ in range(args.rounds):
                found.setdefault("alone", []).append(each_ms(server, args.chats))
                chat(server, "other", 16)
                found.setdefault("beside an idle one", []).append(each_ms(server, args.chats))
                with meanwhile(lambda: chat(server, "other", TOKENS)):
                    found.setdefault("beside a busy one", []).append(each_ms(server, args.chats))
                with meanwhile(lambda: chat(server, "other", 1, keep_alive=0)):
                    found.setdefault("beside loads", []).append(each_ms(server, args.chats))
    for name, times in found.items():
        ratios = [own / alone for own, alone in zip(times, found["alone"], strict=True)]
        print(
            f"{name:20} {statistics.median(times):6.1f} ms a token,"
            f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of alone"
        )


if __name__ == "__main__":
    main()
