"""Connections to PostgreSQL that always end their waits, even where the server only hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.generators import connect as connecting
from psycopg.waiting import wait_conn

T = TypeVar("T")

_limit = threading.local()
_TICK_S = 0.1  # how often a wait looks at the clock, and lets a Ctrl-C through


@contextmanager
def answers_within(seconds: float) -> Iterator[None]:
    """Let all that this thread asks PostgreSQL inside take no longer than this together.

    ``statement_timeout`` is the server's own, so it says nothing of a server that is stopped or
    cut off: the client has to look at the clock too.
    """
    _limit.at = time.monotonic() + seconds
    try:
        yield
    finally:
        _limit.at = None


def left_s() -> float:
    """What is left of this thread's time; a little, where nobody has set a limit."""
    at = getattr(_limit, "at", None)
    return 1.0 if at is None else max(0.0, at - time.monotonic())


def conninfo(url: str, statement_timeout_s: float) -> str:
    """What libpq shall be told. Raises ``ValueError``, without the URL, where it takes it not."""
    try:
        given = conninfo_to_dict("postgresql" + url[url.index(":") :])
    except psycopg.Error:
        # libpq's own message has the URL in it, and that the password.
        raise ValueError("CRANE_DATABASE_URL is not a URL that libpq takes") from None
    options = f"{given.get('options', '')} -c statement_timeout={round(statement_timeout_s * 1e3)}"
    ours: dict[str, Any] = {"application_name": "crane", **given, "options": options.strip()}
    return make_conninfo(**ours)


class Connection(psycopg.Connection[Any]):
    """A connection whose every wait keeps to ``answers_within``."""

    @classmethod
    def within_limit(cls, info: str) -> Connection:
        # Not connect(): it waits 2 s at least, and knows nothing of what is left.
        connection = cls(wait_conn(connecting(info), _TICK_S, timeout=left_s()))
        connection.prepare_threshold = None  # a pooler between us may give each query another one
        return connection

    def wait(self, gen: PQGen[T], interval: float = _TICK_S, timeout: float | None = None) -> T:
        limit = left_s() if timeout is None else min(timeout, left_s())
        try:
            return super().wait(gen, interval, limit)
        except psycopg.OperationalError:
            if left_s() <= 0:
                # Its answer may still come, and must not be taken for that to another question.
                self.pgconn.finish()
            raise
