"""Joint search for stages, data-parallel and tensor-parallel degrees and recomputation.

Two tables hold what each possible stage costs at least and at most. The best pipeline by the first bounds
all, the best by the second exists. Stages that decide are solved exactly, which brings the two together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.core.errors import InfeasiblePlan, InvalidInput
from forescale.plan.joint.cost import cost
from forescale.plan.joint.downsets import Downsets, all_downsets, downsets_of_orders
from forescale.plan.joint.line import LineStage, best_line
from forescale.plan.joint.problem import JointPlan, JointProblem, JointStage
from forescale.plan.joint.stage import best_stage
from forescale.plan.joint.tables import stage_loads
from forescale.plan.placement.problem import Array

_CELLS = 10_000_000
"""Cells that all tables together may have."""
_MEMBERS = 1_000_000
"""Nodes that all downsets together may have."""
_FEWEST_SETS = 60
_WORK, _WORK_OF_PASS = 60_000_000, 5_000_000
"""Cells that dynamic programming may go through, in all rounds together: with all downsets, and without."""
_MOST_ROUNDS = 200
_PASSES = 4
"""Searches where not all downsets can be had, each near the best plan of the one before."""
_TOLERANCE = 1e-9
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JointAnswer:
    """A plan and its figures.

    Attributes:
        objective: time per sample: the longest load of a stage; ``lower_bound``: no plan is below.
        loads, transfers, memory_bytes: of each stage; the last is that of each of its devices.
    """

    plan: JointPlan
    objective: float
    lower_bound: float
    loads: tuple[float, ...]
    transfers: tuple[float, ...]
    memory_bytes: tuple[float, ...]

    @property
    def gap(self) -> float:
        """How much slower the plan may be than the best, as a fraction of the objective."""
        return 1 - self.lower_bound / self.objective if self.objective else 0.0


def plan_joint(problem: JointProblem, *, seed: int = _SEED) -> JointAnswer:
    """The best plan found.

    Raises:
        InfeasiblePlan: no plan was found that fits the devices' memory.
        InvalidInput: the nodes need more devices than there are, whatever their memory.
    """
    _check_devices(problem)
    degrees = len(problem.tensor_degrees)
    rows = degrees * sum(-(-problem.most_replicas // replicas) for replicas in problem.replicas)
    most = max(min(math.isqrt(2 * _CELLS // rows), _MEMBERS // len(problem.nodes)), _FEWEST_SETS)
    rng = np.random.default_rng(seed)
    sets = all_downsets(problem, most)
    if sets is not None:
        plan, bound = _Search(problem, sets).run(_WORK)
    else:
        plan, bound = None, 0.0
        for _ in range(_PASSES):
            sets = downsets_of_orders(problem, most * 2 // 3, rng, near=plan)
            plan, _ = _Search(problem, sets, plan).run(_WORK_OF_PASS)
        assert plan is not None, "there is at least one pass"
    figures = cost(problem, plan)
    return JointAnswer(
        plan=plan,
        objective=figures.objective,
        lower_bound=min(max(_bound(problem), bound), figures.objective),
        loads=figures.loads,
        transfers=figures.transfers,
        memory_bytes=figures.memory_bytes,
    )


class _Search:
    def __init__(self, problem: JointProblem, sets: Downsets, best: JointPlan | None = None) -> None:
        self._problem = problem
        self._sets = sets
        self._tables = stage_loads(problem, sets)
        self._best = best
        self._objective = cost(problem, best).objective if best else math.inf
        self._node_sets = sets.member_FN.astype(bool)

    def run(self, work: int) -> tuple[JointPlan, float]:
        """The best plan over these downsets, and a bound of all plans over them.

        Args:
            work: cells that dynamic programming may go through, in all rounds together.
        """
        cells = sum(table.lower_YP.size for table in self._tables)
        if max(self._problem.tensor_degrees) > 1:
            cells *= self._problem.devices
        self._consider([table.upper_YP for table in self._tables])
        bound = 0.0
        for _ in range(min(max(work // cells, 1), _MOST_ROUNDS)):
            found = self._consider([table.lower_YP for table in self._tables])
            bound = max(bound, min(found, self._objective))
            if bound >= self._objective * (1 - _TOLERANCE):
                break
        else:
            self._consider([table.upper_YP for table in self._tables])
        if self._best is None:
            raise self._infeasible()
        return self._best, bound

    def _consider(self, load_YP_of: Sequence[Array]) -> float:
        """The best load by these tables, if below the objective; the plan with it is solved and kept."""
        found, line = best_line(self._problem, self._sets, self._tables, load_YP_of, below=self._objective)
        if not line:
            return math.inf
        stages = [self._solved(stage) for stage in line]
        whole = [stage for stage in stages if stage is not None]
        if len(whole) == len(stages):
            plan = JointPlan(stages=tuple(whole))
            objective = cost(self._problem, plan).objective
            if objective < self._objective:
                self._best, self._objective = plan, objective
        return found

    def _solved(self, stage: LineStage) -> JointStage | None:
        """The stage with its best options; its bounds become what that costs."""
        table = self._tables[stage.kind]
        smaller, larger = self._sets.smaller_P[stage.pair], self._sets.larger_P[stage.pair]
        nodes = np.flatnonzero(self._node_sets[larger] & ~self._node_sets[smaller]).tolist()
        choice = best_stage(
            self._problem,
            nodes,
            tensor_degree=table.tensor_degree,
            replicas=table.replicas,
            in_flight=stage.in_flight,
        )
        load = choice.load if choice else math.inf
        row = stage.in_flight - 1
        if choice is None or choice.proven:
            lower_Y = table.lower_YP[row:, stage.pair]
            np.maximum(lower_Y, load, out=lower_Y)
        upper_Y = table.upper_YP[: row + 1, stage.pair]
        if choice is None:
            table.upper_YP[row:, stage.pair] = math.inf
        else:
            np.minimum(upper_Y, load, out=upper_Y)
        return choice.stage if choice else None

    def _infeasible(self) -> InfeasiblePlan | InvalidInput:
        """By how much the tightest stage of the least demanding plan is too large."""
        needed_bytes, _ = best_line(
            self._problem,
            self._sets,
            self._tables,
            [table.least_bytes_YP for table in self._tables],
            below=math.inf,
        )
        devices = self._problem.devices
        if math.isinf(needed_bytes):
            return InvalidInput(f"the options of the nodes need more than {devices} devices together")
        fits = f"with {math.ceil(needed_bytes):,} bytes on each there is a plan"
        return InfeasiblePlan(
            short_bytes=max(math.ceil(needed_bytes - self._problem.memory_bytes), 1),
            device="a device",
            fits=fits,
        )


def _check_devices(problem: JointProblem) -> None:
    for name, by_degree in zip(problem.nodes, problem.options, strict=True):
        if min(by_degree) > problem.devices:
            raise InvalidInput(
                f"node {name} has options for {min(by_degree)} devices and more; there are {problem.devices}"
            )


def _bound(problem: JointProblem) -> float:
    """The work shared out evenly over all devices, and over all replicas; and the slowest node alone."""
    busy = [
        [(degree, option) for degree, options in by_degree.items() for option in options]
        for by_degree in problem.options
    ]
    over_devices = sum(min(degree * option.work for degree, option in options) for options in busy)
    over_replicas = sum(min(option.work for _, option in options) for options in busy)
    sync = 4 / problem.samples / problem.bandwidth_bytes_per_time
    alone = max(
        min(
            option.work / replicas + sync * (1 - 1 / replicas) * option.parameter_bytes
            for degree, option in options
            for replicas in problem.replicas
            if degree * replicas <= problem.devices
        )
        for options in busy
    )
    return max(over_devices / problem.devices, over_replicas / problem.most_replicas, alone)
