"""Whether a database is as this service needs it, and making it so: one process at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from backend import postgres
from backend.migrations import REVISIONS, VERSION_TABLE

logger = logging.getLogger("crane.store")

MIGRATION_S = 30.0  # who comes while another takes the steps waits for that
MIGRATION_LOCK = 0x6372616E65  # "crane"; PostgreSQL's advisory locks are known by number


class DatabaseIsNewer(OSError):
    """The database belongs to a later version of the service."""


def make_ready(engine: Engine, limit_s: float) -> None:
    """Take the steps that the database lacks. Raises ``DatabaseIsNewer``.

    Where there are none, which is nearly always, that is known within ``limit_s``.
    """
    with postgres.answers_within(limit_s), engine.begin() as connection:
        if _is_current(connection):
            return
    from backend.migrations.upgrade import upgrade

    def migrate() -> None:
        if engine.dialect.name == "sqlite":
            _use_wal(engine)
        with engine.execution_options(sqlite_begin="BEGIN IMMEDIATE").begin() as connection:
            # On SQLite the transaction is alone by now; on PostgreSQL it waits for its turn here.
            if engine.dialect.name == "postgresql":
                wait = f"SET LOCAL statement_timeout = {round(MIGRATION_S * 1e3)}"
                connection.exec_driver_sql(wait)
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
            if not _is_current(connection):  # another may have been first
                logger.info("bringing the database up to date")
                upgrade(connection)

    with postgres.answers_within(MIGRATION_S):
        _patiently(migrate)


def _is_current(connection: Connection) -> bool:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return False
    found = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()
    if found is not None and found not in REVISIONS:
        raise DatabaseIsNewer(
            f"the database is newer than this service: it is at {found}, and {REVISIONS[-1]} is "
            "the newest known here. Run the version of the service that it belongs to"
        )
    return bool(found == REVISIONS[-1])


def _use_wal(engine: Engine) -> None:
    """Let readers go on beside a writer, in whichever process; the file remembers it."""
    with engine.execution_options(sqlite_begin=None).connect() as connection:  # in no transaction
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")


def _patiently(migrate: Callable[[], None]) -> None:
    """Try again while another process holds SQLite's lock, which WAL's making does not wait for."""
    until = time.monotonic() + MIGRATION_S
    while True:
        try:
            return migrate()
        except sa.exc.OperationalError as error:
            if "database is locked" not in str(error.orig) or time.monotonic() > until:
                raise
        time.sleep(0.02)
