"""Keys that may load and unload models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "crane_keys", sa.Column("admin", sa.Boolean, nullable=False, server_default=sa.false())
    )
