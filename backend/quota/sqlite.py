"""Quotas in a SQLite file that the workers of a host share."""

from __future__ import annotations

import sqlite3
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack

from backend.private import private_database
from backend.quota import decisions
from backend.quota.decisions import Call, Decision, State
from backend.quota.tiers import Tier

BUSY_TIMEOUT_S = 0.25  # for other processes' steps of some 20 µs each
BUSY_WAIT_S = 0.0001
OPEN_TIMEOUT_S = 2.0  # for others that make the file just then, once in its life
SWEEP_MS = 60_000  # between looks for callers of whom nothing is left


# One statement, which SQLite runs alone: a caller's row is read, given to `step`, and written back.
# A transaction of several would let go of Python's lock, and win it again, four times as often.
_STEP = """
    REPLACE INTO callers
    SELECT :subject, step((SELECT state FROM callers WHERE subject = :subject))
"""
_CREATE = """
    CREATE TABLE IF NOT EXISTS callers (subject TEXT PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID
"""


class SqliteStore:
    """One row a caller. Times are the host's clock, which must not differ between its workers."""

    name = "sqlite"
    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._swept = 0
        self._connection: sqlite3.Connection | None = None
        # One step at a time in this process: threads would otherwise sleep for SQLite's own lock.
        self._lock = threading.Lock()
        self._failures = 0
        self._decide: Callable[[State], Decision]
        self._decision: Decision

    def spend(self, call: Call) -> Decision:
        now = self._now_ms()
        return self._step(call.subject, lambda state: decisions.spend(state, call, now), now)

    def reserve(self, call: Call, raised: Call) -> Decision:
        now = self._now_ms()
        return self._step(
            call.subject, lambda state: decisions.reserve(state, call, raised, now), now
        )

    def settle(self, call: Call, cost: int) -> Decision:
        now = self._now_ms()
        return self._step(call.subject, lambda state: decisions.settle(state, call, cost, now), now)

    def look(self, subject: str, tier: Tier) -> Decision:
        now = self._now_ms()
        with self._opened() as connection:
            found = connection.execute(
                "SELECT state FROM callers WHERE subject = ?", (subject,)
            ).fetchone()
        return decisions.look(_load(found and found[0]), tier, now)

    def ping(self) -> None:
        # A write: a file that is locked, or on a full disk, can still be read.
        self._step("ping", lambda state: decisions.look(state, _PING, 0), self._now_ms())

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _now_ms(self) -> int:
        return int(self._now() * 1000)

    def _step(self, subject: str, decide: Callable[[State], Decision], now: int) -> Decision:
        with self._opened() as connection:
            self._decide = decide
            _execute(connection, _STEP, {"subject": subject})
            if now - self._swept > SWEEP_MS:
                self._swept = now
                _execute(connection, "DELETE FROM callers WHERE state <= ?", (_ENDS.pack(now),))
            return self._decision

    def _change(self, stored: bytes | None) -> bytes:
        """What SQL knows as ``step``."""
        state = _load(stored)
        self._decision = self._decide(state)
        return _dump(state)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one step. Raises one of ``errors``.

        Where a step fails, so do at once those that waited for it: each would wait as long again.
        """
        failures = self._failures
        with self._lock:
            if self._failures != failures:
                raise sqlite3.OperationalError("the step before failed")
            try:
                if self._connection is None:
                    self._connection = self._open()
                yield self._connection
            except self.errors as error:
                self._failures += 1
                if not (isinstance(error, sqlite3.Error) and _is_busy(error)):
                    self._close()  # which may be of a file that is there no more
                raise

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            private_database(self._path), timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            # Workers that start together all do this, and SQLite itself does not wait for it.
            _execute(connection, "PRAGMA journal_mode = WAL", within_s=OPEN_TIMEOUT_S)
            _execute(connection, _CREATE, within_s=OPEN_TIMEOUT_S)
            # A power cut may lose the last spends, never the file: no reason to wait for the disk.
            connection.execute("PRAGMA synchronous = OFF")
            connection.create_function("step", 1, self._change)
        except BaseException:
            connection.close()
            raise
        return connection


def _execute(
    connection: sqlite3.Connection,
    statement: str,
    values: Any = (),
    within_s: float = BUSY_TIMEOUT_S,
) -> None:
    """Execute a statement as soon as no other process is at one.

    SQLite's own waits are of 1 ms, then 2, then 5 and up to 100: long beside a step of 20 µs.
    """
    until = time.monotonic() + within_s
    while True:
        try:
            connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > until:
                raise
        else:
            return
        time.sleep(BUSY_WAIT_S)


def _is_busy(error: sqlite3.Error) -> bool:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF == sqlite3.SQLITE_BUSY


_PING = Tier("ping", (), 1)
# When nothing is left of a caller, before all else and its highest byte first: so rows compare.
_ENDS = struct.Struct(">Q")


def _load(stored: bytes | None) -> State:
    if stored is None:
        return State({}, {})
    leases, spent = msgpack.unpackb(stored[_ENDS.size :], strict_map_key=False)
    return State(leases, {window: array("q", entries) for window, entries in spent.items()})


def _dump(state: State) -> bytes:
    spent = {window: entries.tobytes() for window, entries in state.spent.items()}
    packed: bytes = msgpack.packb((state.leases, spent))
    return _ENDS.pack(decisions.counts_until(state)) + packed
