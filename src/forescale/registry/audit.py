"""What happened, written down in the transaction in which it happened."""

from __future__ import annotations

from sqlalchemy import Connection, insert

from forescale.registry import tables
from forescale.registry.records import Happening


def write_down(connection: Connection, at_s: float, happening: Happening) -> None:
    """Add an event; ``at_s``: seconds since the Unix epoch."""
    connection.execute(
        insert(tables.events).values(
            at_s=at_s,
            kind=happening.kind,
            subject=happening.subject,
            by=happening.by,
            detail=dict(happening.detail),
        )
    )
