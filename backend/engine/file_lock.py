"""Locks between processes, on a file, for which nobody waits for ever."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOOK_S = 0.02
KILL_S = 5.0  # that a killed process has to be gone


def acquire(file: IO[str], timeout_s: float) -> bool:
    """Take the lock of an open file; false where another process has it all the time.

    It is released when the file is closed, or its process ends.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_S)


@contextmanager
def held(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock of a file. Raises ``TimeoutError``."""
    with path.open("w") as file:
        if not acquire(file, timeout_s):
            raise TimeoutError(f"another process has held {path.name} for {timeout_s:g} s")
        yield


def succeed(path: Path, timeout_s: float) -> IO[str]:
    """Be the one process that has the lock of a file, for as long as the result is not closed.

    One that has it still may finish its work, and is killed if that takes longer.
    """
    file = path.open("a+")
    if not acquire(file, timeout_s):
        file.seek(0)
        with suppress(ValueError, ProcessLookupError):
            os.kill(int(file.read()), signal.SIGKILL)
        acquire(file, KILL_S)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
