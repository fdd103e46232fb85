"""Rollouts, and which version a deployment had before."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("previous", sa.Integer))
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("started_s", sa.Float(53), nullable=False),
        sa.Column("started_by", sa.String(200), nullable=False),
        sa.Column("ended_s", sa.Float(53)),
        sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
        sqlite_autoincrement=True,
    )
    running = sa.text("ended_s IS NULL")
    op.create_index(
        "rollouts_running",
        "rollouts",
        ["model"],
        unique=True,
        sqlite_where=running,
        postgresql_where=running,
    )
