"""Look-ups in a database that do not add up: one query at a time, for all who wait for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any

Row = Mapping[str, Any]


class Lookups:
    """Looks rows up by their ids, and those that come during a query together in the next.

    So a flood of ids that do not exist costs the database one query at a time and takes one of its
    connections, and an id that does exist waits for two queries at most: the one that is under way,
    and its own.
    """

    def __init__(
        self, read: Callable[[Collection[str]], Mapping[str, Row]], *, limit_s: float
    ) -> None:
        """``read`` ends within about ``limit_s``; what it raises, all who wait for it get."""
        self._read = read
        self._limit_s = limit_s
        self._lock = threading.Lock()  # so that an id is in a batch before that is read
        self._next: _Batch | None = None
        self._turn = threading.Lock()  # of a query

    def get(self, id_: str) -> Row | None:
        """The row of an id; raises what ``read`` does, and ``TimeoutError``."""
        with self._lock:
            leads = self._next is None
            batch = self._next = self._next or _Batch()
            batch.ids.add(id_)
        if leads:
            self._run(batch)
        return batch.rows.result(3 * self._limit_s).get(id_)

    def _run(self, batch: _Batch) -> None:
        has_turn = self._turn.acquire(timeout=2 * self._limit_s)
        with self._lock:
            self._next = None
        try:
            if not has_turn:
                raise TimeoutError("the database did not answer in time")
            batch.rows.set_result(self._read(batch.ids))
        except Exception as error:
            batch.rows.set_exception(error)
        finally:
            if has_turn:
                self._turn.release()


class _Batch:
    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.rows: Future[Mapping[str, Row]] = Future()
