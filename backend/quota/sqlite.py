"""Quotas in a SQLite file that the workers of a host share."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack

from backend.private import private_folder
from backend.quota import decisions
from backend.quota.decisions import Call, Decision, State
from backend.quota.tiers import Tier

BUSY_TIMEOUT_S = 0.25  # for other processes' steps of some 20 µs each
SWEEP_MS = 60_000  # between looks for callers of whom nothing is left


class SqliteStore:
    """One row a caller. Times are the host's clock, which must not differ between its workers."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._swept = 0
        self._connection: sqlite3.Connection | None = None
        # One step at a time in this process: threads would otherwise sleep for SQLite's own lock.
        self._lock = threading.Lock()

    def spend(self, call: Call) -> Decision:
        with self._state(call.subject) as (state, now):
            return decisions.spend(state, call, now)

    def settle(self, call: Call, at: int, cost: int) -> Decision:
        with self._state(call.subject) as (state, now):
            return decisions.settle(state, call, at, cost, now)

    def look(self, subject: str, tier: Tier) -> Decision:
        with self._lock:
            return decisions.look(self._find(subject) or State({}, {}), tier, self._time())

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _state(self, subject: str) -> Iterator[tuple[State, int]]:
        """A caller's state and the time, to be changed and put back in one transaction."""
        with self._lock:
            connection = self._opened()
            connection.execute("BEGIN IMMEDIATE")
            try:
                found, now = self._find(subject), self._time()
                state = found or State({}, {})
                yield state, now
                if ends := _ends(state):
                    row = (subject, _dump(state), ends)
                    connection.execute("REPLACE INTO callers VALUES (?, ?, ?)", row)
                elif found:
                    connection.execute("DELETE FROM callers WHERE subject = ?", (subject,))
                if now - self._swept > SWEEP_MS:
                    self._swept = now
                    connection.execute("DELETE FROM callers WHERE ends <= ?", (now,))
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _time(self) -> int:
        return int(self._now() * 1000)

    def _find(self, subject: str) -> State | None:
        query = "SELECT state FROM callers WHERE subject = ?"
        found = self._opened().execute(query, (subject,)).fetchone()
        return _load(found[0]) if found else None

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        private_folder(self._path.parent)
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # A power cut may lose the last spends, never the file: no reason to wait for the disk.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS callers (subject TEXT PRIMARY KEY, "
                "state BLOB NOT NULL, ends INTEGER NOT NULL) WITHOUT ROWID"
            )
        except BaseException:
            connection.close()
            raise
        return connection


def _load(stored: bytes) -> State:
    leases, spent = msgpack.unpackb(stored, strict_map_key=False)
    return State(leases, spent)


def _dump(state: State) -> bytes:
    packed: bytes = msgpack.packb((state.leases, state.spent))
    return packed


def _ends(state: State) -> int:
    """When nothing is left of a caller; 0 where nothing is."""
    ends = [entries[-1][1] + window for window, entries in state.spent.items() if entries]
    return max([0, *state.leases.values(), *ends])
