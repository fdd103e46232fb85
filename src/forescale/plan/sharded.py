"""What a shard of a stage runs and holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forescale.graph.model import ModelGraph
from forescale.graph.sharding import Sharded, Slice, shard_operators
from forescale.plan.partition_plan import Stage


def read_outside(graph: ModelGraph, operators: Sequence[int]) -> tuple[str, ...]:
    """Tensors these operators make that others read, or the loss, or that become a buffer's new value."""
    own = set(operators)
    wanted = {*graph.outputs, *(update.tensor for update in graph.buffer_updates)}
    return tuple(
        name
        for operator in operators
        for name in graph.operators[operator].outputs
        if name and (name in wanted or not own.issuperset(graph.tensors[name].consumers))
    )


def sharded(graph: ModelGraph, stage: Stage) -> Sharded | None:
    """The part of a stage's operators that its device runs; None if it runs them whole."""
    if stage.shard is None:
        return None
    outputs = read_outside(graph, stage.operators)
    return shard_operators(graph, stage.operators, stage.shard.index, stage.shard.weights, outputs)


def slices(graph: ModelGraph, stage: Stage) -> Mapping[str, Slice]:
    """Parameters and buffers of which the stage's device holds a part."""
    shard = sharded(graph, stage)
    return shard.slices if shard is not None else {}
