"""How far a load is: bytes of the weights' files that are fetched, and then that are read."""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger("crane.engine")

LOOK_S = 0.5
QUIET_S = 5.0  # with nothing to fetch, after something was: longer than between two files


class LoadWatch:
    """Watches a load while it is entered, from a thread of its own: who asks waits for no disk.

    What is fetched grows in the Hub's cache. What is read is told by how much of files is in the
    process's memory, for all the libraries map weights to read them. So a library's own code
    counts as well, and weights that are read in another way do not; numbers that need no copy are
    read by the first run. It never tells more than all, nor less than before.
    """

    def __init__(self, files: Mapping[Path, int]) -> None:
        self._files = files
        self._ended = threading.Event()
        self._seen: dict[str, Any] | None = None

    @property
    def progress(self) -> dict[str, Any] | None:
        """``stage``, ``done_bytes``, ``total_bytes``, and ``left_s``, the time the rest may take.

        None before and after, and where it cannot be told.
        """
        return None if self._ended.is_set() else self._seen

    def __enter__(self) -> LoadWatch:
        if any(self._files.values()):
            threading.Thread(target=self._watch, name="load watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        if self._ended.wait(LOOK_S):  # most loads from a disk's cache are over by then
            return
        try:
            self._follow("download", _fetched(self._files), sum(self._files.values()))
            here = sum(size for file, size in self._files.items() if file.exists())
            self._follow("load", _read(), here)
        except Exception as error:
            self._seen = None
            logger.info("how far a load is cannot be told: %s", error)

    def _follow(self, stage: str, counts: Iterator[int], total: int) -> None:
        first, done, since = None, 0, 0.0
        for count in counts:
            now = time.monotonic()
            done = min(max(done, count), total)
            if first in (None, done):
                first, since = done, now
            gone = done - first
            self._seen = {
                "stage": stage,
                "done_bytes": done,
                "total_bytes": total,
                "left_s": round((now - since) * (total - done) / gone, 1) if gone else None,
            }
            if self._ended.wait(LOOK_S):
                return


def _fetched(files: Mapping[Path, int]) -> Iterator[int]:
    """Bytes that are in the Hub's cache, until all are, or no more of them seem to be wanted."""
    quiet_since = None
    while missing := {file.name: file for file in files if not file.exists()}:
        parts = next(iter(missing.values())).parent.glob("*.incomplete")
        # The newest counts: one of a process that was killed may lie beside it.
        coming = {
            name.partition(".")[0]: size
            for _, size, name in sorted((*_look_at(part), part.name) for part in parts)
        }
        yield sum(
            min(coming.get(file.name, 0), size) if file.name in missing else size
            for file, size in files.items()
        )
        if coming.keys() & missing.keys():
            quiet_since = time.monotonic()
        elif quiet_since is not None and time.monotonic() - quiet_since > QUIET_S:
            return


def _look_at(file: Path) -> tuple[float, int]:
    """When a file changed last, and its bytes."""
    try:
        stat = file.stat()
    except OSError:  # it is whole by now, and has another name
        return 0.0, 0
    return stat.st_mtime, stat.st_size


def _read() -> Iterator[int]:
    """Bytes of files that came into memory; letting go of a file takes none of them back."""
    last, read = _mapped(), 0
    while True:
        yield read
        now = _mapped()
        read, last = read + max(0, now - last), now


def _mapped() -> int:
    shared = Path("/proc/self/statm").read_text().split()[2]
    return int(shared) * resource.getpagesize()
