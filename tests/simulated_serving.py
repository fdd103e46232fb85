"""One model on replicas of virtual time: what scaling decides, seen by those who wait for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.control.scale import Load, ScalingRules, ScalingState
from forescale.control.scaling import step
from forescale.registry.records import DeploymentSpec

TICK_S = 0.25
LATENCY_S = 0.2
BATCH_TIMES = {1: ((1.0, 0.012), (16.0, 0.1))}
CAPACITY_PER_S = 160.0  # of a replica: 16 rows in 0.1 s, twice of which fit in the latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it.

    Attributes:
        late: share of the rows that waited longer than the target.
        replica_s: seconds of replicas, those that start included.
        wanted: replicas at each tick.
    """

    late: float
    replica_s: float
    wanted: tuple[int, ...]
    reasons: tuple[str, ...]


def serve(
    demand_per_s: Sequence[float],
    rules: ScalingRules,
    *,
    seed: int,
    start_s: float = 4.0,
    least: int = 1,
    most: int = 8,
) -> Outcome:
    """Rows come at random, as many as ``demand_per_s`` says of each tick, and are answered in order."""
    rng = np.random.default_rng(seed)
    spec = DeploymentSpec(model="m", number=1, min_replicas=least, max_replicas=most, latency_s=LATENCY_S)
    state, since = ScalingState(), [-start_s] * least
    arrived, waiting, late, replica_s = 0, 0.0, 0.0, 0.0
    wanted, reasons = list[int](), list[str]()
    for tick, rate_per_s in enumerate(demand_per_s):
        now_s = tick * TICK_S
        ready = sum(now_s - began_s >= start_s for began_s in since)
        load = Load(
            spec=spec,
            arrived_rows=arrived,
            waiting_rows=round(waiting),
            batch_times=BATCH_TIMES,
            max_rows=16,
            ready=ready,
            start_s=start_s,
        )
        state, decisions = step(state, [load], now_s, 8, rules)
        reasons += [decision.scale.reason for decision in decisions]
        wanted.append(state.models["m"].wanted)
        since = (
            (since + [now_s] * wanted[-1])[: wanted[-1]] if len(since) < wanted[-1] else since[: wanted[-1]]
        )
        replica_s += len(since) * TICK_S
        rows = int(rng.poisson(rate_per_s * TICK_S))
        arrived += rows
        done = min(ready, len(since)) * CAPACITY_PER_S * TICK_S
        # Rows are late that come when more work waits than is done within the target.
        in_time = max(0.0, done / TICK_S * LATENCY_S + done - waiting)
        late += max(0.0, rows - in_time)
        waiting = max(0.0, waiting + rows - done)
    return Outcome(
        late=late / max(arrived, 1), replica_s=replica_s, wanted=tuple(wanted), reasons=tuple(reasons)
    )
