"""Which tensors travel between which stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan, pipeline_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """One stage's place in a plan; stages are named by their position, which replicas share.

    Attributes:
        received: tensor -> position of the stage that makes it, for what this stage reads of others.
        sent: tensor -> positions of the later stages that read it, ascending.
        updates: buffer -> tensor this stage makes that becomes its new value.
        fed: batch inputs this stage reads.
    """

    received: Mapping[str, int]
    sent: Mapping[str, tuple[int, ...]]
    updates: Mapping[str, str]
    fed: tuple[str, ...]


def wire(graph: ModelGraph, plan: PartitionPlan, stage: int) -> Wiring:
    """What a stage receives, sends and updates; the last one also reads the model's outputs."""
    positions = pipeline_positions(plan.stages)
    place, last = positions[stage], positions[-1]
    stage_of = {
        index: position for position, s in zip(positions, plan.stages, strict=True) for index in s.operators
    }
    readers: dict[str, set[int]] = {
        tensor.name: {stage_of[consumer] for consumer in tensor.consumers}
        for tensor in graph.tensors.values()
    }
    for name in graph.outputs:
        readers[name].add(last)
    received: dict[str, int] = {}
    sent: dict[str, tuple[int, ...]] = {}
    for tensor in graph.tensors.values():
        if tensor.producer is None:
            continue
        made_by = stage_of[tensor.producer]
        others = readers[tensor.name] - {made_by}
        if made_by == place and others:
            sent[tensor.name] = tuple(sorted(others))
        elif place in others:
            received[tensor.name] = made_by
    updates = {
        update.buffer: update.tensor
        for update in graph.buffer_updates
        if (producer := graph.tensors[update.tensor].producer) is not None and stage_of[producer] == place
    }
    fed = tuple(name for name in graph.inputs if place in readers[name])
    return Wiring(received=received, sent=sent, updates=updates, fed=fed)


def fed_inputs(graph: ModelGraph, plan: PartitionPlan) -> Mapping[str, tuple[str, ...]]:
    """Device -> the batch inputs that its stages read."""
    fed: dict[str, tuple[str, ...]] = {}
    for index, stage in enumerate(plan.stages):
        fed[stage.device] = (*fed.get(stage.device, ()), *wire(graph, plan, index).fed)
    return fed
