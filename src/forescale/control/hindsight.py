"""What it would have been worth to keep replicas that nothing asked for. Pure.

Bursts that no forecast sees coming are over before a replica has started. Whether it pays to keep some for
the next one is told by those that were: for each number of replicas kept, a queue is played beside the real
one, and what is spent on replicas that nobody asks for is set against the rows that still would be late.
What was long ago counts less: it is following the leader, with forgetting, over constant numbers.

Axes: N = replicas that are kept at least, from 1 on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_SOONEST_S = 1e-3


def _nothing() -> Array:
    return np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What there was since the look before.

    Attributes:
        rows: that came in ``elapsed_s``.
        asked: replicas that forecast, demand and queue ask for.
        start_s: what one that is started now needs.
        capacity_per_s: rows of one replica.
        most: replicas that there may be.
    """

    rows: int
    elapsed_s: float
    asked: int
    start_s: float
    capacity_per_s: float
    latency_s: float
    most: int


@dataclass(frozen=True, slots=True)
class Hindsight:
    """Nothing that it was made from is ever changed.

    Attributes:
        waiting_N: rows that would wait.
        late_per_s_N: rows that would have been late, per second.
        idle_N: replicas beyond those asked for, on average.
        came: of those asked for, the replicas that would be there by now, without any kept.
        start_s: what one took that had to wait for its process.
    """

    waiting_N: Array = field(default_factory=_nothing)
    late_per_s_N: Array = field(default_factory=_nothing)
    idle_N: Array = field(default_factory=_nothing)
    came: float = 1.0
    start_s: float = _SOONEST_S

    def after(self, look: Look, memory_s: float) -> Hindsight:
        """After another look; what is ``memory_s`` ago counts a third of what is now."""
        waiting_N, late_per_s_N, idle_N = (
            np.concatenate([old_N, np.zeros(look.most)])[: look.most]
            for old_N in (self.waiting_N, self.late_per_s_N, self.idle_N)
        )
        # Replicas start one after the other.
        start_s = max(self.start_s, look.start_s)
        came = min(float(look.asked), self.came + look.elapsed_s / start_s)
        kept_N = np.arange(1.0, look.most + 1.0)
        per_s_N = np.maximum(kept_N, came) * look.capacity_per_s
        waiting_N = np.maximum(0.0, waiting_N + look.rows - per_s_N * look.elapsed_s)
        # Whoever comes when more waits than is answered within the latency is late.
        late_N = np.clip(waiting_N - per_s_N * look.latency_s, 0.0, look.rows)
        weight = 1.0 - exp(-look.elapsed_s / memory_s)
        return Hindsight(
            waiting_N,
            late_per_s_N + (late_N / look.elapsed_s - late_per_s_N) * weight,
            idle_N + (np.maximum(kept_N - look.asked, 0.0) - idle_N) * weight,
            came,
            start_s,
        )

    def best(self, capacity_per_s: float, late_worth: float) -> tuple[int, float]:
        """How many to keep, and the rows per second that would be late with one.

        Args:
            late_worth: rows that a replica may be able to answer, unasked, for one less to be late.
        """
        if not len(self.idle_N):
            return 1, 0.0
        cost_N = self.idle_N * capacity_per_s + late_worth * self.late_per_s_N
        return int(np.argmin(cost_N)) + 1, float(self.late_per_s_N[0])
