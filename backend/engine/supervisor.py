"""Keeps the engine processes running, for as long as the process that started it lives.

Run as ``python -m backend.engine.supervisor`` by gunicorn's master, with its standard input as the
lifeline. It is a process of its own because the master may hold no threads (it forks) and reaps
every child it sees.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time

from backend import logs
from backend.config import Config

logger = logging.getLogger("crane.supervisor")

FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 30.0
STEADY_S = (
    60.0  # an engine that lived this long did not fail at its start: no pause before the next
)
END_TIMEOUT_S = 20.0  # above the engine's own limit, so that it is killed only when stuck


class Supervisor:
    """Starts one engine, and starts it again when it dies, with a growing pause."""

    def __init__(self, command: list[str], name: str) -> None:
        """``name`` is the engine's devices'."""
        self._command = command
        self._name = name
        self._ending = threading.Event()
        self._lock = threading.Lock()  # so that no engine is started after the end
        self._engine: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Keep an engine running until ``end``."""
        pause_s = FIRST_PAUSE_S
        while (engine := self._start()) is not None:
            started = time.monotonic()
            code = engine.wait()
            if self._ending.is_set():
                return
            if time.monotonic() - started > STEADY_S:
                pause_s = FIRST_PAUSE_S
            logger.error(
                "the engine died; starting another",
                extra={"fields": {"device": self._name, "exit_code": code, "pause_s": pause_s}},
            )
            self._ending.wait(pause_s)
            pause_s = min(pause_s * 2, LAST_PAUSE_S)

    def end(self) -> None:
        """End the engine: by itself, else by force."""
        with self._lock:
            self._ending.set()
            engine = self._engine
        if engine is None:
            return
        assert engine.stdin is not None
        engine.stdin.close()
        try:
            engine.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.error("the engine did not end in %.0f s and is killed", END_TIMEOUT_S)
            engine.kill()

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._ending.is_set():
                return None
            self._engine = subprocess.Popen(self._command, stdin=subprocess.PIPE)
            return self._engine


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    config = Config.from_env()
    logs.set_up(config.log_level, config.log_format)
    command = [sys.executable, "-m", "backend.engine.server"]
    supervisors = [
        Supervisor([*command, str(index)], name) for index, name in enumerate(config.devices)
    ]
    keepers = [threading.Thread(target=supervisor.run) for supervisor in supervisors]
    for keeper in keepers:
        keeper.start()
    sys.stdin.buffer.read()
    enders = [threading.Thread(target=supervisor.end) for supervisor in supervisors]
    for thread in enders:
        thread.start()
    for thread in (*enders, *keepers):
        thread.join()


if __name__ == "__main__":
    main()
