"""Models, versions, aliases, deployments and events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table("models", sa.Column("name", sa.String(64), primary_key=True))
    op.create_table(
        "versions",
        sa.Column("model", sa.String(64), sa.ForeignKey("models.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("format", sa.String(64), nullable=False),
        sa.Column("signature", sa.JSON, nullable=False),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("created_at_s", sa.Float(53), nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("commit", sa.String(200)),
    )
    op.create_table(
        "alias_changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("model", sa.String(64), sa.ForeignKey("models.name"), nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer),
        sa.Column("at_s", sa.Float(53), nullable=False),
        sa.Column("by", sa.String(200), nullable=False),
        sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
        sqlite_autoincrement=True,
    )
    op.create_index("alias_changes_of", "alias_changes", ["model", "alias"])
    op.create_table(
        "deployments",
        sa.Column("model", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("min_replicas", sa.Integer, nullable=False),
        sa.Column("max_replicas", sa.Integer, nullable=False),
        sa.Column("deployed_at_s", sa.Float(53), nullable=False),
        sa.Column("deployed_by", sa.String(200), nullable=False),
        sa.ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at_s", sa.Float(53), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("by", sa.String(200), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
