"""What Crane itself costs: the hop to the engine, start-up, and an HTTP worker's memory.

``python -m bench.overhead`` compares the echo task over the engine's process with the same route
answering by itself, in turns, and prints the median of the differences.
"""

from __future__ import annotations

import http.client
import statistics
import time

from bench.jobs import median
from bench.load import Result, measure
from bench.servers import Server, crane

ROUNDS = 7
ECHO = [{"model_id": "echo", "input": {"hello": "world"}}]


def livez_after_s(server: Server) -> float:
    """Seconds from the start of gunicorn to the first answer of /livez."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/livez")
    assert connection.getresponse().status == 200
    return time.perf_counter() - server.started_at


def main() -> None:
    starts = []
    for _ in range(5):
        with crane() as server:
            starts.append(livez_after_s(server))
    print(f"/livez answers {statistics.median(starts):.2f} s after the start (median of 5)")
    with crane() as hop, crane("bench.alone:app", CRANE_ENGINE="inline") as alone:
        for clients in (1, 32):
            pairs: list[tuple[Result, Result]] = []
            for _ in range(ROUNDS):
                over, by_itself = (
                    measure(server.port, "/crane/run", ECHO, clients=clients, seconds=2)
                    for server in (hop, alone)
                )
                pairs.append((over, by_itself))
            over, by_itself = (median(list(side)) for side in zip(*pairs, strict=True))
            added = statistics.median(a.p50_ms - b.p50_ms for a, b in pairs)
            print(f"echo, {clients} clients, median of {ROUNDS} rounds of 2 s each:")
            print(f"  with the hop {over}\n  by itself    {by_itself}")
            print(f"  the hop adds {added:.3f} ms p50 and keeps {over.rate / by_itself.rate:.2f}")
        rss = max(worker.memory_info().rss for worker in hop.http_workers())
        print(f"an HTTP worker's RSS after that: {rss / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
