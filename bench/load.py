"""A closed-loop load generator: N clients, each with one kept-alive connection.

It runs in a process of its own and speaks raw HTTP over epoll, because on two cores a generator
that costs as much as the server would measure itself. About 25 µs of CPU a request.
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import sys
import time
from dataclasses import dataclass

from bench.jobs import request, run


@dataclass(frozen=True)
class Result:
    """Requests per second, and latencies in milliseconds."""

    rate: float
    p50_ms: float
    p99_ms: float

    def __str__(self) -> str:
        return f"{self.rate:7.0f} req/s   p50 {self.p50_ms:7.2f} ms   p99 {self.p99_ms:7.2f} ms"


def measure(
    port: int,
    path: str,
    bodies: list[dict],
    *,
    clients: int,
    seconds: float,
    warm_s: float = 0.5,
    headers: dict[str, str] | None = None,
) -> Result:
    """Load ``path`` with ``clients`` at once; raises when an answer is not a 200."""
    job = {
        "port": port,
        "requests": [request(path, body, headers or {}) for body in bodies],
        "clients": clients,
        "seconds": seconds,
        "warm_s": warm_s,
    }
    return Result(**run("bench.load", job, timeout_s=seconds + warm_s + 60))


class _Client:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_at = 0.0
        self.buffer = b""
        self.missing = -1

    def send(self, request: bytes) -> None:
        self.buffer, self.missing = b"", -1
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Read what is there; true once the answer is whole."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        if self.missing < 0:
            self.buffer += data
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return False
            head = self.buffer[:end].lower()
            if b" 200 " not in head[:16]:
                raise RuntimeError(self.buffer[:500].decode(errors="replace"))
            at = head.index(b"content-length:") + 15
            length = int(head[at:].split(b"\r\n", 1)[0])
            self.missing = length - (len(self.buffer) - end - 4)
        else:
            self.missing -= len(data)
        return self.missing == 0


def main() -> None:
    job = json.load(sys.stdin)
    requests = [request.encode() for request in job["requests"]]
    selector = selectors.DefaultSelector()
    sent = 0
    for _ in range(job["clients"]):
        client = _Client(job["port"])
        selector.register(client.socket, selectors.EVENT_READ, client)
        client.send(requests[sent % len(requests)])
        sent += 1
    started = time.perf_counter()
    begin, end = started + job["warm_s"], started + job["warm_s"] + job["seconds"]
    latencies: list[float] = []
    while (now := time.perf_counter()) < end:
        for key, _ in selector.select(timeout=30):
            client = key.data
            if client.receive():
                now = time.perf_counter()
                if now >= begin:
                    latencies.append(now - client.sent_at)
                client.send(requests[sent % len(requests)])
                sent += 1
    if not latencies:
        raise RuntimeError("no answer within the time measured")
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else latencies * 99
    rate = len(latencies) / job["seconds"]
    print(json.dumps({"rate": rate, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}))


if __name__ == "__main__":
    main()
