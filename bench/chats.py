"""A load of chats: N callers, each with one connection, one chat after another, streamed or not.

It speaks raw HTTP over epoll, in a process of its own, for the reasons that ``bench.load`` has.
Run as ``python -m bench.chats`` with a job on its standard input.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import statistics
import sys
import time
from dataclasses import dataclass

from bench.jobs import request, run

_TEXT = re.compile(rb'"content":\s*"[^"]')  # in a chunk that has some


@dataclass(frozen=True)
class Result:
    """Tokens per second of all callers, and medians in milliseconds over the chats.

    Without a stream there is no first token, nor a time from it to the next.
    """

    rate: float
    first_ms: float
    each_ms: float

    def __str__(self) -> str:
        shown = f"{self.rate:6.0f} tokens/s"
        if self.first_ms:
            shown += f"   first {self.first_ms:6.0f} ms   each {self.each_ms:6.1f} ms"
        return shown


def measure(
    port: int, model: str, chats: list[tuple[str, int]], *, callers: int, stream: bool
) -> Result:
    """Have the callers take chats, each a prompt and its number of tokens, until none is left."""
    job = {"port": port, "model": model, "chats": chats, "callers": callers, "stream": stream}
    return Result(**run("bench.chats", job, timeout_s=600))


class _Caller:
    def __init__(self, job: dict) -> None:
        self._job = job
        self.socket = socket.create_connection(("127.0.0.1", job["port"]))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.firsts: list[float] = []
        self.gaps: list[float] = []

    def ask(self, prompt: str, tokens: int) -> None:
        body = {
            "model": self._job["model"],
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": self._job["stream"],
        }
        self._data, self._tokens = b"", tokens
        self._first_at = 0.0
        self._asked_at = time.perf_counter()
        self.socket.sendall(request("/v1/chat/completions", body, {}).encode())

    def hear(self) -> bool:
        """Read what is there; true once the answer is whole."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError(self._data[-500:])
        now = time.perf_counter()
        before = len(self._data)
        self._data += data
        if before < 16 <= len(self._data) and b" 200 " not in self._data[:16]:
            raise RuntimeError(self._data[:500].decode(errors="replace"))
        if not self._first_at and _TEXT.search(self._data, max(0, before - 20)):
            self._first_at = now
        if not self._data.endswith((b"0\r\n\r\n", b"}", b"}\n")) or not self._is_whole():
            return False
        if self._job["stream"]:
            self.firsts.append(self._first_at - self._asked_at)
            self.gaps.append((now - self._first_at) / max(1, self._tokens - 1))
        return True

    def _is_whole(self) -> bool:
        head, _, body = self._data.partition(b"\r\n\r\n")
        if found := re.search(rb"(?i)content-length: *(\d+)", head):
            return len(body) >= int(found[1])
        return body.endswith(b"0\r\n\r\n")


def main() -> None:
    job = json.load(sys.stdin)
    left = list(reversed(job["chats"]))
    callers = [_Caller(job) for _ in range(job["callers"])]
    selector = selectors.DefaultSelector()
    started = time.perf_counter()
    for caller in callers:
        selector.register(caller.socket, selectors.EVENT_READ, caller)
        caller.ask(*left.pop())
    busy = len(callers)
    while busy:
        ready = selector.select(timeout=120)
        if not ready:
            raise TimeoutError("no caller heard anything for 120 s")
        for key, _ in ready:
            if key.data.hear():
                if left:
                    key.data.ask(*left.pop())
                else:
                    selector.unregister(key.data.socket)
                    busy -= 1
    seconds = time.perf_counter() - started
    firsts = [one for caller in callers for one in caller.firsts] or [0.0]
    gaps = [one for caller in callers for one in caller.gaps] or [0.0]
    print(
        json.dumps(
            {
                "rate": sum(tokens for _, tokens in job["chats"]) / seconds,
                "first_ms": statistics.median(firsts) * 1e3,
                "each_ms": statistics.median(gaps) * 1e3,
            }
        )
    )


if __name__ == "__main__":
    main()
