"""Where a request has been: filled in on its way by who has it, read by who traces it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A replica was sent the request, in a batch of so many rows; times are the machine's monotonic clock."""

    sent_s: float
    replica: str
    batch_rows: int


class Journey:
    """What became of a request.

    Attributes:
        arrived_s: at the queue; None: it did not leave it.
        legs: more than one if replicas failed on the way.
    """

    def __init__(self) -> None:
        self.arrived_s: float | None = None
        self.legs: list[Leg] = []

    def go_on(self, arrived_s: float, sent_s: float, replica: str, batch_rows: int) -> None:
        """It was sent to a replica."""
        self.arrived_s = arrived_s
        self.legs.append(Leg(sent_s=sent_s, replica=replica, batch_rows=batch_rows))

    def to_item(self) -> list[Any]:
        """For a message."""
        return [self.arrived_s, [(leg.sent_s, leg.replica, leg.batch_rows) for leg in self.legs]]

    def follow(self, item: list[Any]) -> None:
        """Another process had the request, and tells with ``to_item`` where it has been."""
        self.arrived_s, legs = item
        self.legs += [Leg(sent_s=sent_s, replica=replica, batch_rows=rows) for sent_s, replica, rows in legs]
