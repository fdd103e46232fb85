"""What changes hands between two plans: who holds each parameter and buffer, and who must be sent it.

Both the controller, which weighs a move's cost, and the engine, which carries it out, use these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forescale.graph.model import ModelGraph
from forescale.graph.size import evaluate, tensor_bytes
from forescale.plan.extents import WHOLE, Extent
from forescale.plan.partition_plan import PartitionPlan, replica_groups, replicas
from forescale.plan.problem import PartitionProblem
from forescale.plan.sharded import slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A device holds a parameter or buffer, or of one that its stage's shards split its own part.

    Attributes:
        replica: number of its stage's replica among all in the plan; shards of one have the same.
    """

    device: str
    replica: int
    extent: Extent = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Device ``target`` gains parameter or buffer ``name`` (and its optimiser state) from ``source``.

    Attributes:
        extent: how much of it.
    """

    name: str
    source: str
    target: str
    extent: Extent = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSum:
    """Devices that must add up their gradients of (an extent of) one parameter.

    Attributes:
        devices: all that hold the extent, in pipeline order.
        adding: those whose gradients count; what the others have, shards of one replica that hold the
            extent twice, is in them already.
    """

    name: str
    extent: Extent
    devices: tuple[str, ...]
    adding: tuple[str, ...]


def holdings(graph: ModelGraph, plan: PartitionPlan) -> Mapping[str, tuple[Holding, ...]]:
    """Who holds what of each parameter and buffer under a plan, in pipeline order, each device once.

    A holder is a device with an operator that reads the tensor, or that makes its new value
    (``BufferUpdate``, ``mutated_buffers``). What nobody reads is held by the first stage.

    Returns:
        By every parameter's and buffer's name (not aliases), parameters first, in the graph's order.
    """
    stages_of: dict[int, list[int]] = {}
    for number, stage in enumerate(plan.stages):
        for operator in stage.operators:
            stages_of.setdefault(operator, []).append(number)
    stages: dict[str, set[int]] = {name: set() for name in (*graph.parameters, *graph.buffers)}
    for operator in graph.operators:
        for name in (*operator.parameters, *operator.buffers, *operator.mutated_buffers):
            stages[name].update(stages_of[operator.index])
    for update in graph.buffer_updates:
        if (producer := graph.tensors[update.tensor].producer) is not None:
            stages[update.buffer].update(stages_of[producer])
    whole = [replica for group in replica_groups(plan.stages) for replica in replicas(group)]
    replica_S = [number for number, replica in enumerate(whole) for _ in replica]
    slices_S = [slices(graph, stage) for stage in plan.stages]
    found: dict[str, tuple[Holding, ...]] = {}
    for name, numbers in stages.items():
        held: dict[str, Holding] = {}
        for number in sorted(numbers or {0}):
            device, extent = plan.stages[number].device, Extent.of(slices_S[number].get(name))
            held.setdefault(device, Holding(device=device, replica=replica_S[number], extent=extent))
        found[name] = tuple(held.values())
    return found


def held_by(held: Mapping[str, Sequence[Holding]], device: str) -> dict[str, Extent]:
    """How much a device holds of what it holds."""
    return {name: h.extent for name, holders in held.items() for h in holders if h.device == device}


def owners(held: Sequence[Holding]) -> tuple[Holding, ...]:
    """Of a tensor's holders those that have every element once: the first, or the shards it splits it with.

    They are the source of copies, and the first of them writes checkpoints.
    """
    first = held[0]
    return tuple(h for h in held if h.replica == first.replica) if first.extent != WHOLE else (first,)


def moves(graph: ModelGraph, before: PartitionPlan, after: PartitionPlan) -> tuple[Move, ...]:
    """What each device must be sent when ``after`` replaces ``before``.

    A device keeps what it already has of a tensor; what it lacks is sent by the tensor's owners under
    ``before``. What a device stops holding it drops, which takes no move.

    Returns:
        In the order of :func:`holdings`, then of the new plan's stages, then of the owners.
    """
    return transfers(graph, holdings(graph, before), holdings(graph, after))


def transfers(
    graph: ModelGraph, have: Mapping[str, Sequence[Holding]], want: Mapping[str, Sequence[Holding]]
) -> tuple[Move, ...]:
    """The moves from one state to another; see :func:`moves`."""
    changes: list[Move] = []
    for name, wanted in want.items():
        extents = {h.device: h.extent for h in have[name]}
        shape = (graph.parameters.get(name) or graph.buffers[name]).shape
        for holding in wanted:
            own = extents.get(holding.device)
            missing = holding.extent if own is None else holding.extent.without(own, shape)
            if missing is None:
                continue
            changes += [
                Move(name=name, source=owner.device, target=holding.device, extent=extent)
                for owner in owners(have[name])
                if (extent := missing.meet(owner.extent)) is not None
            ]
    return tuple(changes)


def gathered(have: Mapping[str, Sequence[Holding]]) -> Mapping[str, tuple[Holding, ...]]:
    """The state in which the first holder of everything has all of it, and nobody else any."""
    return {name: (Holding(device=held[0].device, replica=0),) for name, held in have.items()}


def gradient_sums(held: Mapping[str, Sequence[Holding]]) -> tuple[GradientSum, ...]:
    """Which gradients must be added up where several replicas, or stages, hold one parameter.

    Shards of one replica that hold a parameter whole have equal gradients, which are not added up.
    """
    sums: list[GradientSum] = []
    for name, holders in held.items():
        by_replica: dict[int, list[Holding]] = {}
        for holding in holders:
            by_replica.setdefault(holding.replica, []).append(holding)
        if len(by_replica) > 1:
            sums += _sums(name, list(by_replica.values()))
    return tuple(sums)


def _sums(name: str, by_replica: Sequence[Sequence[Holding]]) -> list[GradientSum]:
    if len({tuple(h.extent for h in held) for held in by_replica}) == 1:  # alike: shard by shard
        columns = [tuple(h.device for h in column) for column in zip(*by_replica, strict=True)]
        extents = [h.extent for h in by_replica[0]]
        return [
            GradientSum(name=name, extent=extent, devices=devices, adding=devices)
            for extent, devices in zip(extents, columns, strict=True)
        ]
    extents = [WHOLE]
    for held in by_replica:
        parts = dict.fromkeys(h.extent for h in held)
        extents = [both for r in extents for part in parts if (both := r.meet(part)) is not None]
    found: list[GradientSum] = []
    for extent in extents:
        having = [[h.device for h in held if h.extent.meet(extent) is not None] for held in by_replica]
        found.append(
            GradientSum(
                name=name,
                extent=extent,
                devices=tuple(device for devices in having for device in devices),
                adding=tuple(devices[0] for devices in having),
            )
        )
    return found


def move_bytes(
    graph: ModelGraph, before: PartitionPlan, after: PartitionPlan, optimizer_state_ratio: float
) -> int:
    """Bytes sent when ``after`` replaces ``before``: parameters, buffers and optimiser state.

    Args:
        optimizer_state_ratio: bytes of optimiser state per byte of trainable parameters (AdamW: 2).
    """
    changes = moves(graph, before, after)
    return round(sum(_sent_bytes(graph, move, optimizer_state_ratio) for move in changes))


def move_s(problem: PartitionProblem, before: PartitionPlan, after: PartitionPlan) -> float:
    """Seconds to send everything that changes hands, one link after the other, in one message per link."""
    sent_bytes: dict[tuple[str, str], float] = {}
    for move in moves(problem.graph, before, after):
        link = (move.source, move.target)
        size_bytes = _sent_bytes(problem.graph, move, problem.optimizer_state_ratio)
        sent_bytes[link] = sent_bytes.get(link, 0.0) + size_bytes
    return sum(problem.cluster.link(*link).transfer_s(size) for link, size in sent_bytes.items())


def _sent_bytes(graph: ModelGraph, move: Move, optimizer_state_ratio: float) -> float:
    parameter = graph.parameters.get(move.name)
    tensor = parameter or graph.buffers[move.name]
    size_bytes = evaluate(tensor_bytes(move.extent.shape(tensor.shape), tensor.dtype), {})
    return size_bytes * (1.0 + optimizer_state_ratio) if parameter and parameter.trainable else size_bytes
