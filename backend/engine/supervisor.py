"""Keeps the engine processes running, for as long as the process that started it lives.

Run as ``python -m backend.engine.supervisor`` by gunicorn's master, with its standard input as the
lifeline. It is a process of its own because the master may hold no threads (it forks) and reaps
every child it sees.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from backend import logs
from backend.config import Config
from backend.engine.remote import RemoteEngine

logger = logging.getLogger("crane.supervisor")

FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 30.0
STEADY_S = (
    60.0  # an engine that lived this long did not fail at its start: no pause before the next
)
# Between looks at an engine. One that does not answer for so long hangs: a thread of it holds the
# interpreter, so that its own watchdog cannot help.
HEARTBEAT_S, MIN_SILENCE_S = 5.0, 10.0
# An engine's start takes half a second; a minute where the disk is slow, and the engine before it
# may have twenty seconds to end.
START_S = 80.0
KILLED_S = 5.0  # that a killed engine has to be gone
END_TIMEOUT_S = 20.0  # above the engine's own limit, so that it is killed only when stuck


class Supervisor:
    """Starts one engine, and starts it again when it dies, with a growing pause."""

    def __init__(
        self, command: list[str], name: str, look: Callable[[], object], hang_timeout_s: float
    ) -> None:
        """``name`` is the engine's devices', and ``look`` raises where it does not answer."""
        self._command = command
        self._name = name
        self._look = look
        self._max_silence_s = max(hang_timeout_s, MIN_SILENCE_S)
        self._ending = threading.Event()
        self._lock = threading.Lock()  # so that no engine is started after the end
        self._engine: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Keep an engine running until ``end``."""
        pause_s = FIRST_PAUSE_S
        while not self._ending.is_set():
            started, code = time.monotonic(), None
            try:
                if (engine := self._start()) is None:
                    return
                code = self._watch(engine)
                assert engine.stdin is not None
                engine.stdin.close()
            except Exception:  # no memory for another process, say: there may be some later
                logger.exception("the engine could not be started, or watched")
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

    def _watch(self, engine: subprocess.Popen[bytes]) -> int:
        """The engine's exit status, once it has ended; one that hangs is killed."""
        heard_at = time.monotonic() + START_S
        while True:
            try:
                return engine.wait(HEARTBEAT_S)
            except subprocess.TimeoutExpired:
                pass
            try:
                self._look()
                heard_at = time.monotonic()
            except Exception as error:
                silent_s = time.monotonic() - heard_at
                if silent_s > self._max_silence_s and not self._ending.is_set():
                    logger.error(
                        "the engine has not answered for %.0f s and is killed: %s", silent_s, error
                    )
                    engine.kill()

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
        Supervisor(
            [*command, str(index)],
            name,
            RemoteEngine(config, index, start_s=0).look,
            config.hang_timeout_s,
        )
        for index, name in enumerate(config.devices)
    ]
    keepers = [threading.Thread(target=supervisor.run) for supervisor in supervisors]
    for keeper in keepers:
        keeper.start()
    sys.stdin.buffer.read()
    enders = [threading.Thread(target=supervisor.end) for supervisor in supervisors]
    for thread in enders:
        thread.start()
    for thread in (*enders, *keepers):
        thread.join(END_TIMEOUT_S + KILLED_S)
    # Not even an engine that cannot be killed, as it waits for a device, is waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
