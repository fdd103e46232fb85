"""Deployments say in what time requests are to be answered, and which come first."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("latency_s", sa.Float(53)))
    op.add_column("deployments", sa.Column("priority", sa.Integer, nullable=False, server_default="10"))
