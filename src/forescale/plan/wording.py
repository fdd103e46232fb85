"""Quantities as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from forescale.plan.partition_plan import (
    PartitionPlan,
    Schedule,
    Stage,
    replica_groups,
    replicas,
    shards_of,
)
from forescale.plan.replicas import microbatch_counts

SCHEDULE_NAMES = {
    Schedule.ONE_F_ONE_B: "1F1B",
    Schedule.EAGER_1F1B: "eager 1F1B",
    Schedule.GPIPE: "GPipe",
    Schedule.INTERLEAVED: "interleaved 1F1B",
    Schedule.ZERO_BUBBLE: "zero-bubble",
}


def spell_time(seconds: float) -> str:
    """Three digits, in µs, ms or s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def spell_bytes(count: float) -> str:
    """Three digits, in B, kB, MB or GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def spell_count(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"


def spell_places(plan: PartitionPlan) -> str:
    """Where the model runs: ``stages on cpu0, cpu1``, or ``2 replicas on cpu0, cpu1``.

    Devices that split operators between them are named together: ``cpu0 + cpu1``.
    """
    groups = [[_team(replica) for replica in replicas(group)] for group in replica_groups(plan.stages)]
    if len(groups) == 1 and len(groups[0]) > 1:
        return f"{len(groups[0])} replicas on {', '.join(groups[0])}"
    named = (f"{len(g)} replicas ({', '.join(g)})" if len(g) > 1 else g[0] for g in groups)
    return f"{'shards' if len(groups) == 1 and plan.stages[0].shard else 'stages'} on {', '.join(named)}"


def _team(replica: Sequence[Stage]) -> str:
    return " + ".join(stage.device for stage in replica)


def spell_microbatches(plan: PartitionPlan) -> str:
    """Their number; with replicas, how many each of them runs: ``5 + 3``."""
    counts = iter(microbatch_counts(plan))
    groups = [[next(counts) for _ in group][:: shards_of(group)] for group in replica_groups(plan.stages)]
    shared = [" + ".join(map(str, group)) for group in groups if len(group) > 1]
    if len(groups) == 1 and shared:
        return shared[0]
    return f"{plan.microbatches} (replicas: {', '.join(shared)})" if shared else str(plan.microbatches)
