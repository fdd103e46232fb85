"""Plans and predictions by batch shape, each worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from forescale.core.cluster import Cluster
from forescale.core.errors import InfeasiblePlan
from forescale.engine.messages import Binding
from forescale.plan.moves import move_bytes, move_s
from forescale.plan.partition import partition, predict
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage
from forescale.plan.problem import PartitionProblem
from forescale.plan.schedule import Layout

Speeds = Mapping[str, float]
"""Device name -> speed in the sense of ``Device.speed``; devices left out run as profiled."""

_Items = tuple[tuple[str, float], ...]
_Split = tuple[tuple[Stage, ...], int, Schedule]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDemand:
    """What a step is predicted to ask of a device that runs as profiled, over all of its stages.

    Attributes:
        compute_s: seconds in which it computes forwards and backwards.
        busy_s: the same with the optimizer's.
        busy_fraction: ``busy_s`` of the step's seconds.
        memory_bytes: at the peak.
    """

    compute_s: float
    busy_s: float
    busy_fraction: float
    memory_bytes: int


class CostModel(Protocol):
    """What batches cost on the devices of this run."""

    def problem(self, binding: Mapping[str, int], speeds: Mapping[str, float]) -> PartitionProblem:
        """The planner's question for batches of one shape.

        Args:
            speeds: device name -> ``Device.speed`` that replaces the profiled one.
        """
        ...


class Planner:
    """Asks :mod:`forescale.plan` about a run's batches and remembers the answers.

    A pure function of the cost model, although it keeps a bounded memory of what it was asked.

    Args:
        max_chunks: most stages of one device, see :func:`forescale.plan.partition.partition`.
    """

    def __init__(self, costs: CostModel, *, max_chunks: int | None = None) -> None:
        self._costs = costs
        self._max_chunks = max_chunks
        self._problem = lru_cache(maxsize=64)(self._new_problem)
        self._predicted = lru_cache(maxsize=8192)(self._new_prediction)
        self._demanded = lru_cache(maxsize=8192)(self._new_demand)
        self._short = lru_cache(maxsize=8192)(self._new_short)
        self._planned = lru_cache(maxsize=256)(self._new_plan)
        self._moved = lru_cache(maxsize=256)(self._new_move)

    def problem(self, binding: Binding, speeds: Speeds) -> PartitionProblem:
        return self._problem(_items(binding), _items(speeds))

    def cluster(self, binding: Binding) -> Cluster:
        """The devices as they were profiled."""
        return self.problem(binding, {}).cluster

    def prediction(self, plan: PartitionPlan, binding: Binding, speeds: Speeds) -> Prediction:
        """What a step takes; a batch too small for the plan's microbatches is cut into fewer."""
        return self._predicted(_split(plan), _items(binding), _items(speeds))[0]

    def compute_s(self, plan: PartitionPlan, binding: Binding, speeds: Speeds) -> tuple[float, ...]:
        """Seconds per step in which each stage computes forwards and backwards."""
        prediction, microbatches = self._predicted(_split(plan), _items(binding), _items(speeds))
        return tuple(
            len(runs) * (stage.forward_s + stage.backward_s)
            for runs, stage in zip(
                Layout.of(plan.stages, microbatches).runs_S, prediction.stages, strict=True
            )
        )

    def demand(self, plan: PartitionPlan, binding: Binding) -> Mapping[str, DeviceDemand]:
        """What a step asks of each device that the plan uses; shared, not to be changed."""
        return self._demanded(_split(plan), _items(binding))

    def short_bytes(self, plan: PartitionPlan, binding: Binding) -> Mapping[str, int]:
        """Bytes by which a batch would exceed the memory of each device; devices with enough are left out."""
        return self._short(_split(plan), _items(binding))

    def best(self, binding: Binding, speeds: Speeds) -> PartitionPlan:
        """The plan for batches of one shape.

        Raises:
            InfeasiblePlan: no plan fits the devices' memory.
        """
        planned = self._planned(_items(binding), _items(speeds))
        if isinstance(planned, InfeasiblePlan):
            raise planned
        return planned

    def move_s(self, binding: Binding, before: PartitionPlan, after: PartitionPlan) -> float:
        """Seconds to send what changes hands between two plans."""
        return self._moved(before, after, _items(binding))[0]

    def moved_bytes(self, binding: Binding, before: PartitionPlan, after: PartitionPlan) -> int:
        """Bytes of what changes hands between two plans."""
        return self._moved(before, after, _items(binding))[1]

    def _new_problem(self, binding: _Items, speeds: _Items) -> PartitionProblem:
        return self._costs.problem({name: int(value) for name, value in binding}, dict(speeds))

    def _new_prediction(self, split: _Split, binding: _Items, speeds: _Items) -> tuple[Prediction, int]:
        problem = self._problem(binding, speeds)
        stages, wanted, schedule = split
        microbatches = max((count for count in problem.costs if count <= wanted), default=min(problem.costs))
        return predict(problem, stages, microbatches, schedule), microbatches

    def _new_demand(self, split: _Split, binding: _Items) -> Mapping[str, DeviceDemand]:
        prediction, microbatches = self._predicted(split, binding, ())
        totals: dict[str, tuple[float, float, int]] = {}
        runs_S = Layout.of(split[0], microbatches).runs_S
        for stage, runs, predicted in zip(split[0], runs_S, prediction.stages, strict=True):
            compute_s, busy_s, size_bytes = totals.get(stage.device, (0.0, 0.0, 0))
            stage_s = len(runs) * (predicted.forward_s + predicted.backward_s)
            totals[stage.device] = (
                compute_s + stage_s,
                busy_s + stage_s + predicted.optimizer_s,
                size_bytes + predicted.memory_bytes,
            )
        return {
            device: DeviceDemand(
                compute_s=compute_s,
                busy_s=busy_s,
                busy_fraction=busy_s / prediction.step_s,
                memory_bytes=size_bytes,
            )
            for device, (compute_s, busy_s, size_bytes) in totals.items()
        }

    def _new_short(self, split: _Split, binding: _Items) -> Mapping[str, int]:
        cluster = self._problem(binding, ()).cluster
        over_bytes = {
            device: asked.memory_bytes - cluster.device(device).memory_bytes
            for device, asked in self._demanded(split, binding).items()
        }
        return {device: size_bytes for device, size_bytes in over_bytes.items() if size_bytes > 0}

    def _new_plan(self, binding: _Items, speeds: _Items) -> PartitionPlan | InfeasiblePlan:
        try:
            return partition(self._problem(binding, speeds), max_chunks=self._max_chunks)
        except InfeasiblePlan as error:
            return error

    def _new_move(self, before: PartitionPlan, after: PartitionPlan, binding: _Items) -> tuple[float, int]:
        problem = self._problem(binding, ())
        sent_bytes = move_bytes(problem.graph, before, after, problem.optimizer_state_ratio)
        return move_s(problem, before, after), sent_bytes


def same_split(a: PartitionPlan, b: PartitionPlan) -> bool:
    """Whether two plans run the same operators in the same way in the same places."""
    return _split(a) == _split(b)


def _split(plan: PartitionPlan) -> _Split:
    return plan.stages, plan.microbatches, plan.schedule


def _items(mapping: Mapping[str, float]) -> _Items:
    return tuple(sorted(mapping.items()))
