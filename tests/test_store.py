"""The database: who may read it, how it came to be, and what happens while it is away."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

import backend.keys
from backend import store
from backend.config import Config
from backend.errors import KeysUnavailable
from backend.keys import Keys
from backend.migrations import REVISIONS, VERSION_TABLE
from backend.postgres import Connection, answers_within, conninfo
from backend.private import kept_secret
from tests.databases import Postgres

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def own_postgres():
    """A server for these tests alone, which stop it."""
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture
def remote(own_postgres, tmp_path):
    """Keys on a server that can be stopped, with a key that is never remembered."""
    config = Config(data_dir=tmp_path / "data", database_url=own_postgres.new_url())
    with closing(Keys(config)) as keys:
        keys.text = keys.create(owner="a", tier="free")[1]
        yield keys


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(backend.keys, "CACHE_S", -1.0)


def connect(config):
    """A plain connection to a database, beside ours."""
    if config.database_url:
        return psycopg.connect(config.database_url, autocommit=True)
    return sqlite3.connect(config.data_dir / "crane.db", isolation_level=None)


# Files.


def test_what_is_made_on_disk_is_the_users_own(tmp_path):
    before = os.umask(0)
    try:
        folder = tmp_path / "data"
        with closing(Keys(Config(data_dir=folder))) as keys:
            keys.create(owner="a", tier="free")
            modes = {
                path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]
            }
    finally:
        os.umask(before)
    assert modes == {
        "data": 0o700,
        "pepper": 0o600,
        "crane.db": 0o600,
        "crane.db-wal": 0o600,
        "crane.db-shm": 0o600,
    }


def test_of_many_that_make_the_pepper_at_once_all_get_the_same(tmp_path):
    at_once = threading.Barrier(16)

    def make(n):
        at_once.wait()
        return kept_secret(tmp_path / str(n) / "pepper", least=16)

    with ThreadPoolExecutor(16) as pool:
        for n in range(20):
            [made] = set(pool.map(make, [n] * 16))
            assert len(made) == 64
            assert os.listdir(tmp_path / str(n)) == ["pepper"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KeysUnavailable) as caught:
        Keys(Config(data_dir=tmp_path / "file" / "data")).list()
    assert str(tmp_path) in str(caught.value.__cause__)
    assert str(tmp_path) not in caught.value.message


# Migrations.


def test_the_list_of_revisions_is_alembics():
    from backend.migrations.upgrade import scripts

    assert tuple(s.revision for s in reversed([*scripts().walk_revisions()])) == REVISIONS


def test_the_migrated_table_is_the_one_that_the_code_knows(database):
    config = Config(**database)
    with closing(Keys(config)) as keys:
        keys.list()
        inspector = sa.inspect(keys._opened[0]._engine)
        found = inspector.get_columns(store.KEYS.name)
    assert [column["name"] for column in found] == store.KEYS.columns.keys()


def test_alembic_is_imported_only_to_migrate(tmp_path):
    code = (
        "import sys; from pathlib import Path; from backend.config import Config\n"
        "from backend.keys import Keys\n"
        f"Keys(Config(data_dir=Path({str(tmp_path)!r}))).list(); print('alembic' in sys.modules)"
    )
    for imported in (b"True\n", b"False\n"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert done.stdout == imported, done.stderr


def test_a_database_that_is_newer_than_the_code_is_left_alone(database):
    config = Config(**database)
    with closing(Keys(config)) as keys:
        keys.create(owner="a", tier="free")
    with closing(connect(config)) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with closing(Keys(config)) as keys:
        with pytest.raises(KeysUnavailable) as caught:
            keys.list()
        assert "newer than this service: it is at 9999" in str(caught.value.__cause__)


def test_the_version_is_committed_with_the_tables(database):
    config = Config(**database)
    with closing(Keys(config)) as keys:
        keys.list()
    with closing(connect(config)) as connection:
        found = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()
    assert [tuple(row) for row in found] == [(REVISIONS[-1],)]


def test_a_migration_that_fails_leaves_nothing_behind(database, monkeypatch):
    import backend.migrations.upgrade

    real = backend.migrations.upgrade.upgrade

    def fails(connection):
        real(connection)
        raise OSError("the disk is full")

    config = Config(**database)
    with closing(Keys(config)) as keys:
        monkeypatch.setattr(backend.migrations.upgrade, "upgrade", fails)
        with pytest.raises(KeysUnavailable):
            keys.list()
        monkeypatch.undo()
        assert keys.list() == []


# SQLite.


def test_a_writer_on_sqlite_does_not_stop_readers_and_is_not_waited_for_long(tmp_path):
    config = Config(data_dir=tmp_path)
    with closing(Keys(config)) as keys, closing(connect(config)) as writer:
        text = keys.create(owner="a", tier="free")[1]
        writer.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        assert keys.list()
        assert time.monotonic() - started < 0.5
        with pytest.raises(KeysUnavailable) as caught:
            keys.create(owner="b", tier="free")
        assert 0.8 < time.monotonic() - started < 1.6
        assert "locked" in str(caught.value.__cause__)
        writer.execute("ROLLBACK")
        assert keys.find(text)
        assert keys.create(owner="b", tier="free")


def test_many_that_wait_for_a_writer_on_sqlite_do_not_wait_for_each_other(tmp_path):
    def refused(n):
        started = time.monotonic()
        with pytest.raises(KeysUnavailable):
            keys.create(owner="b", tier="free")
        return time.monotonic() - started

    config = Config(data_dir=tmp_path)
    with closing(Keys(config)) as keys, ThreadPoolExecutor(64) as pool:
        keys.list()
        with closing(connect(config)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            assert max(pool.map(refused, range(64))) < 2.7


def test_who_comes_while_another_makes_the_tables_waits_for_it(tmp_path):
    config = Config(data_dir=tmp_path)
    with closing(connect(config)) as other, closing(Keys(config)) as keys:
        other.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(keys.list)
            time.sleep(1.5)  # longer than a call waits for a lock
            assert not waiting.done()
            other.execute("ROLLBACK")
            assert waiting.result(5) == []


def test_threads_that_write_at_once_all_do(database):
    with closing(Keys(Config(**database))) as keys, ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda n: keys.create(owner=str(n), tier="free"), range(64)))
        assert len(keys.list()) == 64
        assert all(keys.find(text) for _, text in made)


# PostgreSQL that is away.


def unavailable(keys):
    """How long it takes to hear that keys cannot be looked up."""
    started = time.monotonic()
    with pytest.raises(KeysUnavailable) as caught:
        keys.find(keys.text)
    assert caught.value.retry_after_s
    return time.monotonic() - started


def test_a_postgresql_that_was_stopped_is_used_again_once_it_is_back(remote, own_postgres, caplog):
    assert remote.find(remote.text)
    own_postgres.stop()
    try:
        assert unavailable(remote) < 1.5
        assert unavailable(remote) < 1.5
    finally:
        own_postgres.start()
    assert remote.find(remote.text)
    told = [r.getMessage() for r in caplog.records if r.name == "crane.store"]
    assert len(told) == 2  # not a line at every call
    assert told[0].startswith("the database cannot be used: ")
    assert told[1] == "the database answers again"


def test_a_postgresql_that_was_away_between_two_calls_is_not_noticed(remote, own_postgres):
    assert remote.find(remote.text)
    own_postgres.stop()
    own_postgres.start()
    assert remote.find(remote.text)


def test_a_postgresql_that_hangs_hangs_no_call(remote, own_postgres):
    assert remote.find(remote.text)
    with own_postgres.hanging():
        assert unavailable(remote) < 1.6
        with ThreadPoolExecutor(32) as pool:  # more than there are connections
            assert max(pool.map(unavailable, [remote] * 32)) < 4
    assert remote.find(remote.text)


def test_a_postgresql_that_hangs_from_the_start_hangs_no_call(remote, own_postgres):
    with closing(Keys(remote._config)) as keys:
        keys.text = remote.text
        with own_postgres.hanging(), ThreadPoolExecutor(8) as pool:
            assert max(pool.map(unavailable, [keys] * 8)) < 2.6
        assert keys.find(remote.text)


def test_a_connection_that_was_not_answered_in_time_is_not_used_again(postgres):
    info = conninfo(postgres.new_url(), 5)
    with closing(Connection.within_limit(info)) as connection:
        with answers_within(0.3), pytest.raises(psycopg.OperationalError, match="timeout"):
            connection.execute("SELECT pg_sleep(1)")
        assert connection.closed


def test_a_lock_on_postgresql_hangs_no_call(remote):
    with closing(connect(remote._config)) as other:
        other.execute("BEGIN")
        other.execute("LOCK TABLE crane_keys")
        assert unavailable(remote) < 1.5
        other.execute("ROLLBACK")
    assert remote.find(remote.text)


@pytest.mark.parametrize("scheme", ["postgres://", "postgresql://", "postgresql+psycopg://"])
def test_every_way_to_write_the_url_is_taken(postgres, tmp_path, scheme):
    url = scheme + postgres.new_url().split("://")[1]
    with closing(Keys(Config(data_dir=tmp_path, database_url=url))) as keys:
        assert keys.list() == []


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://crane:hunter2@127.0.0.1:1/crane",
        "postgresql://crane:hunter2@nobody.invalid/crane",
        "postgresql://crane:hunter2@127.0.0.1:99999/crane",
        "postgresql://crane:hunter2@127.0.0.1/crane?sslmode=hunter",
        "postgresql://crane:hunter2@127.0.0.1/crane?no_such_option=1",
        "postgresql://crane:hunter2%zz@127.0.0.1/crane",
    ],
)
def test_a_password_is_in_no_message_of_a_database_that_is_away(tmp_path, url, caplog):
    caplog.set_level("DEBUG")
    with pytest.raises(KeysUnavailable) as caught:
        Keys(Config(data_dir=tmp_path, database_url=url)).list()
    told, reason = str(caught.value), caught.value.__cause__
    assert reason.__cause__ is None
    assert reason.__suppress_context__
    assert "hunter2" not in told + str(reason) + caplog.text
