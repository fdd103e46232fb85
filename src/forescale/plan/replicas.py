"""One stage on several devices that share a step's microbatches: data parallelism.

Microbatches are whole on every replica, so their arithmetic is that of one device; uneven devices run
unequal numbers of them. Narayanan et al., *PipeDream*, SOSP 2019, §3.2, deal them out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan, Schedule, Stage, replica_groups
from forescale.plan.problem import Array
from forescale.plan.schedule import Layout


def changed_buffer(graph: ModelGraph, operators: Sequence[int]) -> str | None:
    """A buffer that the forward of these operators changes, None if there is none."""
    own = set(operators)
    return next((name for name, users in graph.changing_buffers.items() if own & set(users)), None)


def check_replicas(graph: ModelGraph, stages: Sequence[Stage]) -> None:
    """Checks that no stage with replicas changes a buffer.

    Raises:
        InvalidInput: one does. Its value would depend on all microbatches in turn (BatchNorm's running
            statistics), and each replica sees only its own.
    """
    for group in replica_groups(stages):
        if len(group) > 1 and (buffer := changed_buffer(graph, group[0].operators)):
            devices = " and ".join(stage.device for stage in group)
            raise InvalidInput(
                f"{devices} cannot be replicas of one stage: its forward changes the buffer {buffer}, whose "
                "value depends on all microbatches in turn; run it on one device"
            )


def check_turns(stages: Sequence[Stage], schedule: Schedule) -> None:
    """Checks that a device has several stages only where the schedule lets all devices take turns.

    Raises:
        InvalidInput: one is named twice for another reason.
    """
    names = [stage.device for stage in stages]
    devices = list(dict.fromkeys(names))
    if len(devices) == len(names):
        return
    again = next(name for place, name in enumerate(names) if name in names[:place])
    if schedule is not Schedule.INTERLEAVED:
        raise InvalidInput(
            f"{again} is named twice; a device runs several stages under interleaved-1f1b only"
        )
    rounds = len(names) // len(devices)
    if names != devices * rounds or len(replica_groups(stages)) < len(names):
        raise InvalidInput(
            f"under interleaved-1f1b the devices must take turns, each with as many stages, and none is a "
            f"replica: {', '.join(devices)}, {', '.join(devices)} instead of {', '.join(names)}"
        )


def share_out(microbatch_s: Array, microbatches: int) -> tuple[int, ...]:
    """How many microbatches each device should run so that the last is done earliest.

    Args:
        microbatch_s: seconds of one microbatch on each device.
    """
    counts = np.zeros(len(microbatch_s), dtype=int)
    for _ in range(microbatches):
        counts[int(((counts + 1) * microbatch_s).argmin())] += 1
    return tuple(counts.tolist())


def microbatch_counts(plan: PartitionPlan) -> tuple[int, ...]:
    """How many of a step's microbatches each stage runs."""
    return tuple(len(runs) for runs in Layout.of(plan.stages, plan.microbatches).runs_S)
