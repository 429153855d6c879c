"""The database, SQLite or PostgreSQL: the one place that knows SQLAlchemy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine

from backend import postgres
from backend.config import Config
from backend.migrations.ready import make_ready
from backend.private import private_database

logger = logging.getLogger("crane.store")

LIMIT_S = 1.2  # what a question to the database may take, connecting and waiting for locks included
STATEMENT_S = 1.0

Row = dict[str, Any]


class StoreError(OSError):
    """The database cannot be used; the text says why, and has no secret in it."""


class UTCTime(sa.TypeDecorator[datetime]):
    """A moment: aware and UTC for us, and without a zone where the database knows none."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value and value.astimezone(UTC)
        return value.replace(tzinfo=UTC)


KEYS = sa.Table(
    "crane_keys",
    sa.MetaData(),
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("mac", sa.String(64)),
    sa.Column("pepper_mark", sa.String(8)),
    sa.Column("owner", sa.String(200)),
    sa.Column("tier", sa.String(64)),
    sa.Column("models", sa.JSON(none_as_null=True)),
    sa.Column("created_at", UTCTime),
    sa.Column("expires_at", UTCTime),
    sa.Column("last_used_at", UTCTime),
    sa.Column("revoked_at", UTCTime),
    sa.Column("admin", sa.Boolean),
)
_KEY_OF_ID = sa.select(KEYS).where(KEYS.c.id == sa.bindparam("id"))
_KEYS_OF_IDS = sa.select(KEYS).where(KEYS.c.id.in_(sa.bindparam("ids", expanding=True)))


class Store:
    """Keeps what outlives a process. Opened at the first call, and migrated then if it must be.

    Every method raises ``StoreError`` within about ``LIMIT_S`` where the database does not do what
    it is asked, and works again once the database does.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._opening = threading.Lock()  # so that a process makes one pool, and migrates once
        self._engine: Engine | None = None
        self._down = False

    def key(self, id_: str) -> Row | None:
        with self._transaction() as connection:
            return _one(connection.execute(_KEY_OF_ID, {"id": id_}))

    def keys(self, ids: Collection[str]) -> dict[str, Row]:
        """The keys of some ids, by their ids, in one query."""
        with self._transaction() as connection:
            found = connection.execute(_KEYS_OF_IDS, {"ids": list(ids)}).mappings()
            return {row["id"]: dict(row) for row in found}

    def all_keys(self) -> list[Row]:
        """All keys, the oldest first."""
        with self._transaction() as connection:
            found = connection.execute(sa.select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id))
            return [dict(row) for row in found.mappings()]

    def has_keys(self) -> bool:
        with self._transaction() as connection:
            return connection.execute(sa.select(KEYS.c.id).limit(1)).first() is not None

    def add_key(self, row: Row) -> None:
        with self._transaction(writes=True) as connection:
            connection.execute(sa.insert(KEYS), row)

    def add_first_key(self, row: Row, before: Callable[[], None]) -> bool:
        """Add a key if there is none; of any that race, one adds its key.

        That one alone calls ``before`` first; where this raises, no key is added.
        """
        with self._transaction(writes=True) as connection:
            if connection.dialect.name == "postgresql":
                # Readers go on; whoever adds a key waits, and then sees ours. On SQLite the
                # transaction is alone already.
                connection.exec_driver_sql("LOCK TABLE crane_keys IN SHARE ROW EXCLUSIVE MODE")
            if connection.execute(sa.select(KEYS.c.id).limit(1)).first() is not None:
                return False
            connection.execute(sa.insert(KEYS), row)
            before()
            return True

    def change_key(self, id_: str, **values: Any) -> Row | None:
        """Change a key that is not revoked, and return it; None where there is no such key."""
        change = sa.update(KEYS).where(KEYS.c.id == id_, KEYS.c.revoked_at.is_(None))
        with self._transaction(writes=True) as connection:
            return _one(connection.execute(change.values(**values).returning(KEYS)))

    def close(self) -> None:
        with self._opening:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    @contextmanager
    def _transaction(self, *, writes: bool = False) -> Iterator[Connection]:
        try:
            engine = self._engine or self._open()
            if writes:
                engine = engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
            with postgres.answers_within(LIMIT_S), engine.begin() as connection:
                yield connection
        except (sa.exc.SQLAlchemyError, OSError) as error:
            # Neither chained nor in full: statements and parameters are nobody's to read.
            raise self._failed(error) from None
        if self._down:
            self._down = False
            logger.warning("the database answers again")

    def _failed(self, error: Exception) -> StoreError:
        told = error if isinstance(error, StoreError) else StoreError(_reason(error))
        if not self._down:  # said once, not at every call
            self._down = True
            logger.error("the database cannot be used: %s", told)
        return told

    def _open(self) -> Engine:
        if not self._opening.acquire(timeout=LIMIT_S):
            raise StoreError("the database did not answer in time")
        try:
            if self._engine is None:
                engine = _engine(self._config)
                try:
                    make_ready(engine, LIMIT_S)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine
        finally:
            self._opening.release()


def _one(result: sa.CursorResult[Any]) -> Row | None:
    row = result.mappings().first()
    return None if row is None else dict(row)


def _reason(error: Exception) -> str:
    """What went wrong, in a line: the driver's own words, without statement and parameters."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0]


def _engine(config: Config) -> Engine:
    # More calls at once than the pool has connections wait for one; none of them for long.
    pool: dict[str, Any] = {"pool_size": 5, "max_overflow": 10, "pool_timeout": STATEMENT_S}
    if config.database_url is None:
        file = private_database(config.data_dir / "crane.db")
        url = URL.create("sqlite", database=str(file))
        connect = {"timeout": STATEMENT_S, "isolation_level": None}
        engine = sa.create_engine(url, connect_args=connect, hide_parameters=True, **pool)
        event.listen(engine, "begin", _begin_on_sqlite)
        return engine
    try:
        info = postgres.conninfo(config.database_url, STATEMENT_S)
    except ValueError as error:
        raise StoreError(str(error)) from None
    return sa.create_engine(
        "postgresql+psycopg://",  # all else is in what the connections are made with
        creator=lambda: postgres.Connection.within_limit(info),
        pool_pre_ping=True,
        hide_parameters=True,
        **pool,
    )


def _begin_on_sqlite(connection: Connection) -> None:
    # sqlite3 begins by itself only before an INSERT, and then as a reader, whose turn to write
    # another may have taken.
    if statement := connection.get_execution_options().get("sqlite_begin", "BEGIN"):
        connection.exec_driver_sql(statement)
