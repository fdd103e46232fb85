"""Deployments say how many threads a replica may have."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("max_threads", sa.Integer))
