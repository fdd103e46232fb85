"""Whether a request that comes now can be answered in time. Pure: the time is an argument.

What goes before it, and what classes ahead of its own bring meanwhile, takes so long at the speed of the
replicas. Neither is certain. So a reserve is added to what is predicted for a class, a share that is learned
from those that were let in: an online quantile of how much longer they took (H. Robbins, S. Monro, "A
stochastic approximation method", Annals of Mathematical Statistics 22(3), 1951).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from forescale.engine.serve.balancing import ReplicaLoad
from forescale.engine.serve.queues import Entry, ModelQueue, T

_LATE_SHARE = 0.002
"""Of those let in that may be later than was predicted."""

_STEP = 0.05
"""By how much a reserve grows with each that was; it shrinks slowly in return."""

_MOST_RESERVE = 1.0


class Admission:
    """What one served version knows of its predictions."""

    def __init__(self) -> None:
        self._reserves: dict[int, float] = {}

    def predict_s(
        self, entry: Entry[T], queue: ModelQueue[T], replicas: Iterable[ReplicaLoad], full_rows: int
    ) -> float:
        """Seconds to the answer, if the request joins the queue when it comes; 0 if nothing is known."""
        now_s = entry.arrived_s
        rows_per_s = 0.0
        answer_s = math.inf
        # It will share its batch: one that is alone in time only would make the batch small.
        rows = min(queue.rows_before(entry.priority) + entry.rows, full_rows)
        for replica in replicas:
            full_s = replica.service.predict_s(full_rows)
            if full_s <= 0:
                return 0.0
            rows_per_s += full_rows / full_s
            answer_s = min(answer_s, replica.free_s(now_s) + replica.service.predict_s(rows))
        if not rows_per_s:
            return 0.0
        entry.predicted_s = answer_s - now_s + queue.wait_s(entry.priority, rows_per_s, now_s)
        return entry.predicted_s * (1.0 + self._reserves.get(entry.priority, 0.0))

    def learn(self, entry: Entry[T], took_s: float) -> None:
        """A request that was let in was answered after that time, or given up."""
        if not entry.predicted_s:
            return
        reserve = self._reserves.get(entry.priority, 0.0)
        is_late = took_s > entry.predicted_s * (1.0 + reserve)
        reserve += _STEP * (is_late - _LATE_SHARE)
        self._reserves[entry.priority] = min(max(reserve, 0.0), _MOST_RESERVE)
