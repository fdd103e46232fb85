"""What a joint plan costs, stage by stage, straight from the model in ``problem``."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

from forescale.plan.joint.problem import JointPlan, JointProblem, JointStage, Option


@dataclass(frozen=True, slots=True, kw_only=True)
class JointCost:
    """Per stage: its load, the part of it that is not computing, and the memory of each of its devices."""

    loads: tuple[float, ...]
    transfers: tuple[float, ...]
    memory_bytes: tuple[float, ...]

    @property
    def objective(self) -> float:
        """Time per sample."""
        return max(self.loads)


def cost(problem: JointProblem, plan: JointPlan) -> JointCost:
    """The cost of a plan, whether or not it fits the devices' memory.

    Raises:
        ValueError: not a plan of this problem; the message says why.
    """
    _check(problem, plan)
    loads: list[float] = []
    transfers: list[float] = []
    memory: list[float] = []
    waiting = sum(stage.replicas for stage in plan.stages)
    for stage in plan.stages:
        d = stage.replicas
        in_flight = -(-waiting // d)
        waiting -= d
        chosen = _chosen(problem, stage)
        synced = 4 * (d - 1) * fsum(option.parameter_bytes for option in chosen.values())
        moved = 2 * _boundary_bytes(problem, chosen) / d + synced / d / problem.samples
        transfers.append(moved / problem.bandwidth_bytes_per_time)
        loads.append(fsum(option.work for option in chosen.values()) / d + transfers[-1])
        memory.append(stage_memory_bytes(list(chosen.values()), in_flight))
    return JointCost(loads=tuple(loads), transfers=tuple(transfers), memory_bytes=tuple(memory))


def stage_memory_bytes(options: list[Option], in_flight: int) -> float:
    """Memory of each device of a stage."""
    return fsum(option.stored_bytes * in_flight + option.fixed_bytes for option in options)


def _chosen(problem: JointProblem, stage: JointStage) -> dict[int, Option]:
    return {
        node: problem.options[node][stage.tensor_degree][option]
        for node, option in zip(stage.nodes, stage.options, strict=True)
    }


def _boundary_bytes(problem: JointProblem, chosen: dict[int, Option]) -> float:
    """Bytes that enter and leave a stage with one sample."""
    enters = [
        edge.transfer_bytes + chosen[edge.target].received_bytes.get(edge.source, 0.0)
        for node in chosen
        for edge in problem.edges_into[node]
        if edge.source not in chosen
    ]
    leaves = [
        edge.transfer_bytes + chosen[edge.source].sent_bytes.get(edge.target, 0.0)
        for node in chosen
        for edge in problem.edges_from[node]
        if edge.target not in chosen
    ]
    return fsum(enters + leaves)


def _check(problem: JointProblem, plan: JointPlan) -> None:
    stage_of = {node: number for number, stage in enumerate(plan.stages) for node in stage.nodes}
    if sorted(node for stage in plan.stages for node in stage.nodes) != list(range(len(problem.nodes))):
        raise ValueError("not every node is in exactly one stage")
    if any(stage_of[edge.source] > stage_of[edge.target] for edge in problem.edges):
        raise ValueError("a transfer goes to an earlier stage")
    if any(problem.samples % stage.replicas for stage in plan.stages):
        raise ValueError("the replicas of a stage do not divide the samples")
    if sum(stage.replicas for stage in plan.stages) > problem.samples:
        raise ValueError("there are more replicas than samples")
    if sum(stage.devices for stage in plan.stages) > problem.devices:
        raise ValueError("the stages need more devices than there are")
