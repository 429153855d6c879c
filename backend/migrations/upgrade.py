"""Take the steps that a database lacks. Imports Alembic, so it is imported to take them only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from backend.migrations import VERSION_TABLE

HERE = Path(__file__).resolve().parent


def scripts() -> ScriptDirectory:
    return ScriptDirectory(str(HERE), version_locations=[str(HERE / "versions")])


def upgrade(connection: Connection) -> None:
    """Bring the database to the newest step, within the transaction that ``connection`` is in.

    Alembic takes a transaction that has begun for its caller's, and leaves the commit to it.
    """
    script = scripts()

    def steps(revision: Any, _: Any) -> Any:
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection, version_table=VERSION_TABLE)
        environment.run_migrations()
