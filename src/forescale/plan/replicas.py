"""One stage on several devices that share a step's microbatches: data parallelism.

Microbatches are whole on every replica, so their arithmetic is that of one device; uneven devices run
unequal numbers of them. Narayanan et al., *PipeDream*, SOSP 2019, §3.2, deal them out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan, Schedule, Stage, replica_groups, replicas
from forescale.plan.problem import Array
from forescale.plan.schedule import Layout


def changed_buffer(graph: ModelGraph, operators: Sequence[int]) -> str | None:
    """A buffer that the forward of these operators changes, None if there is none."""
    own = set(operators)
    return next((name for name, users in graph.changing_buffers.items() if own & set(users)), None)


def check_replicas(graph: ModelGraph, stages: Sequence[Stage]) -> None:
    """Checks that the stages that follow each other with the same operators can work as one.

    Raises:
        InvalidInput: replicas of a stage change a buffer. Its value would depend on all microbatches in turn
            (BatchNorm's running statistics), and each replica sees only its own. Or shards are not complete
            and in order, not alike, or on a device that runs another stage.
    """
    for group in replica_groups(stages):
        several = replicas(group)
        if len(several) > 1 and (buffer := changed_buffer(graph, group[0].operators)):
            raise InvalidInput(
                f"{_devices(group)} cannot be replicas of one stage: its forward changes the buffer "
                f"{buffer}, whose value depends on all microbatches in turn; run it on one device"
            )
        weights = {stage.shard.weights if stage.shard else None for stage in group}
        if len(weights) > 1:
            raise InvalidInput(f"{_devices(group)} split the same operators in different ways; give them one")
        for replica in several:
            _check_shards(replica)
    devices = [stage.device for stage in stages]
    for stage in stages:
        if stage.shard is not None and devices.count(stage.device) > 1:
            raise InvalidInput(f"{stage.device} runs a shard beside another stage; give it the shard alone")


def _check_shards(replica: Sequence[Stage]) -> None:
    """Raises InvalidInput unless these are all the shards of a replica."""
    if (first := replica[0].shard) is None:
        return
    indices = [stage.shard.index for stage in replica if stage.shard is not None]
    if indices != list(range(len(first.weights))):
        raise InvalidInput(
            f"{_devices(replica)} run the shards {indices} of {len(first.weights)}; a plan needs each "
            "of them once, in order"
        )
    if min(first.weights) < 1:
        raise InvalidInput(
            f"{_devices(replica)} have shards of the weights {first.weights}; give each 1 or more"
        )
    if len({(stage.share, stage.recompute) for stage in replica}) > 1:
        raise InvalidInput(
            f"{_devices(replica)} are shards of one replica, so they must agree on share and recomputation"
        )


def _devices(stages: Sequence[Stage]) -> str:
    return " and ".join(stage.device for stage in stages)


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
