"""What changes hands between two plans: who holds each parameter and buffer, and who must be sent it.

Both the controller, which weighs a move's cost, and the engine, which carries it out, use these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forescale.graph.model import ModelGraph
from forescale.graph.size import evaluate, tensor_bytes
from forescale.plan.partition_plan import PartitionPlan
from forescale.plan.problem import PartitionProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Device ``target`` gains parameter or buffer ``name`` (and its optimiser state) from ``source``."""

    name: str
    source: str
    target: str


def holders(graph: ModelGraph, plan: PartitionPlan) -> Mapping[str, tuple[str, ...]]:
    """Devices that hold each parameter and buffer under a plan, in pipeline order.

    A holder is a device with an operator that reads the tensor, or that makes its new value
    (``BufferUpdate``, ``mutated_buffers``). The first holder owns it: it writes checkpoints and is the
    source of copies. What nobody reads is held by the first stage.

    Returns:
        Every parameter's and buffer's name (not aliases), parameters first, in the graph's order.
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
    return {
        name: tuple(dict.fromkeys(plan.stages[i].device for i in sorted(held or {0})))
        for name, held in stages.items()
    }


def moves(graph: ModelGraph, before: PartitionPlan, after: PartitionPlan) -> tuple[Move, ...]:
    """What each device must be sent when ``after`` replaces ``before``.

    A device that already holds a tensor keeps its own copy; a new holder is sent one by the tensor's
    owner under ``before``. Devices that stop holding a tensor drop it, which takes no move.

    Returns:
        In the order of :func:`holders`, then of the new plan's stages.
    """
    held = holders(graph, before)
    return tuple(
        Move(name=name, source=held[name][0], target=device)
        for name, devices in holders(graph, after).items()
        for device in devices
        if device not in held[name]
    )


def move_bytes(
    graph: ModelGraph, before: PartitionPlan, after: PartitionPlan, optimizer_state_ratio: float
) -> int:
    """Bytes sent when ``after`` replaces ``before``: parameters, buffers and optimiser state.

    Args:
        optimizer_state_ratio: bytes of optimiser state per byte of trainable parameters (AdamW: 2).
    """
    changes = moves(graph, before, after)
    return round(sum(_sent_bytes(graph, move.name, optimizer_state_ratio) for move in changes))


def move_s(problem: PartitionProblem, before: PartitionPlan, after: PartitionPlan) -> float:
    """Seconds to send everything that changes hands, one link after the other, in one message per link."""
    sent_bytes: dict[tuple[str, str], float] = {}
    for move in moves(problem.graph, before, after):
        link = (move.source, move.target)
        size_bytes = _sent_bytes(problem.graph, move.name, problem.optimizer_state_ratio)
        sent_bytes[link] = sent_bytes.get(link, 0.0) + size_bytes
    return sum(problem.cluster.link(*link).transfer_s(size) for link, size in sent_bytes.items())


def _sent_bytes(graph: ModelGraph, name: str, optimizer_state_ratio: float) -> float:
    parameter = graph.parameters.get(name)
    tensor = parameter or graph.buffers[name]
    size_bytes = evaluate(tensor_bytes(tensor.shape, tensor.dtype), {})
    return size_bytes * (1.0 + optimizer_state_ratio) if parameter and parameter.trainable else size_bytes
