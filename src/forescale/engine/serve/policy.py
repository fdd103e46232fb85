"""How requests to a model are queued and put into batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy:
    """How the requests to a model are queued.

    Attributes:
        max_rows: most rows of a request and of a batch; a replica that takes fewer gets fewer.
        batch_rows: rows of a batch that is answered in time; a request of more goes alone. None: as many as
            there may be.
        max_wait_s: how long a batch that is not full waits for more requests though a replica is free.
        max_requests: most requests that wait; more are refused.
        max_waiting_bytes: the same, by the size of their tensors.
        priority: class, from 1 (first) on, of requests that name none.
        timeout_s: seconds after which a request that names no time is refused.
        weights: share of a flow against others of its class; 1 for those not named.
    """

    max_rows: int = 32
    batch_rows: int | None = None
    max_wait_s: float = 0.0
    max_requests: int = 10_000
    max_waiting_bytes: int = 1 << 30
    priority: int = 10
    timeout_s: float = 30.0
    weights: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def full_rows(self) -> int:
        """Rows of a batch that waits for no more."""
        return min(self.max_rows, self.batch_rows or self.max_rows)
