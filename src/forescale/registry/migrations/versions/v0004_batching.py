"""Deployments say how their requests are queued and put into batches."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("max_batch", sa.Integer))
    op.add_column("deployments", sa.Column("max_wait_s", sa.Float(53)))
    op.add_column("deployments", sa.Column("timeout_s", sa.Float(53)))
    op.add_column("deployments", sa.Column("queue", sa.Integer))
