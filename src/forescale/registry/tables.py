"""The tables. A change here needs a migration: a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    text,
)

METADATA = MetaData()

models = Table("models", METADATA, Column("name", String(64), primary_key=True))

versions = Table(
    "versions",
    METADATA,
    Column("model", String(64), ForeignKey("models.name"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("format", String(64), nullable=False),
    Column("signature", JSON, nullable=False),
    Column("options", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("created_at_s", Float(53), nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("commit", String(200)),
)

# Only added to: the newest change of an alias says where it points.
alias_changes = Table(
    "alias_changes",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("model", String(64), ForeignKey("models.name"), nullable=False),
    Column("alias", String(64), nullable=False),
    Column("number", Integer),
    Column("at_s", Float(53), nullable=False),
    Column("by", String(200), nullable=False),
    ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    Index("alias_changes_of", "model", "alias"),
    sqlite_autoincrement=True,
)

deployments = Table(
    "deployments",
    METADATA,
    Column("model", String(64), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("min_replicas", Integer, nullable=False),
    Column("max_replicas", Integer, nullable=False),
    Column("latency_s", Float(53)),
    Column("priority", Integer, nullable=False, server_default="10"),
    Column("max_batch", Integer),
    Column("max_wait_s", Float(53)),
    Column("timeout_s", Float(53)),
    Column("queue", Integer),
    Column("max_threads", Integer),
    Column("deployed_at_s", Float(53), nullable=False),
    Column("deployed_by", String(200), nullable=False),
    Column("previous", Integer),
    ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
)

_running = text("ended_s IS NULL")

rollouts = Table(
    "rollouts",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("model", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("started_s", Float(53), nullable=False),
    Column("started_by", String(200), nullable=False),
    Column("ended_s", Float(53)),
    ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
    Index("rollouts_running", "model", unique=True, sqlite_where=_running, postgresql_where=_running),
    sqlite_autoincrement=True,
)

# Only added to.
events = Table(
    "events",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("at_s", Float(53), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("subject", String(64), nullable=False),
    Column("by", String(200), nullable=False),
    Column("detail", JSON, nullable=False),
    sqlite_autoincrement=True,
)
