"""Start what is measured, on a free port of 127.0.0.1, and stop it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A server's process and port."""

    def __init__(
        self,
        process: subprocess.Popen,
        port: int,
        started_at: float = 0.0,
        log: Path | None = None,
    ) -> None:
        self.process = process
        self._log = log
        self.port = port
        self.started_at = started_at

    def processes(self) -> list[psutil.Process]:
        master = psutil.Process(self.process.pid)
        return [master, *master.children(recursive=True)]

    def log(self) -> str:
        return self._log.read_text() if self._log else ""

    def http_workers(self) -> list[psutil.Process]:
        gunicorns = [p for p in self.processes() if "gunicorn" in " ".join(p.cmdline())]
        return gunicorns[1:]

    def suspend(self) -> None:
        """Stop it from using the processor while something else is measured."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        for process in self.processes():
            process.resume()


@contextmanager
def crane(app: str = "wsgi:app", **settings: object) -> Iterator[Server]:
    """Crane under gunicorn with the shipped models.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        env = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}
        env |= {"CRANE_BIND": "127.0.0.1:0", "CRANE_DATA_DIR": folder, "PYTHONUNBUFFERED": "1"}
        env["CRANE_QUOTA"] = "off"  # unless it is what is measured
        env |= {name: str(value) for name, value in settings.items()}
        started_at = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", app],
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + 30
            while not (match := re.search(r"listens at http://[\d.]+:(\d+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text())
                time.sleep(0.01)
            yield Server(process, int(match[1]), started_at, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
