"""The load of every stage there could be, from below and from above, for every way to run it.

Sums over a stage are differences of sums over two downsets, so a table costs no more than its cells.

Axes: F = downset, P = pair of downsets (a stage), N = node, L = option, R = swap, Y = samples in flight - 1,
S = sum of data-parallel degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.plan.joint.downsets import Downsets
from forescale.plan.joint.problem import JointProblem, Option
from forescale.plan.joint.swaps import Swaps, swaps
from forescale.plan.placement.problem import Array, IntArray

_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoads:
    """Loads of all stages on ``replicas`` times ``tensor_degree`` devices.

    Attributes:
        lower_YP: none is below; infinite where the stage cannot fit.
        upper_YP: some choice of options reaches it.
        least_bytes_YP: memory of the smallest choice.
    """

    tensor_degree: int
    replicas: int
    lower_YP: Array
    upper_YP: Array
    least_bytes_YP: Array

    @property
    def devices(self) -> int:
        return self.tensor_degree * self.replicas


def stage_loads(problem: JointProblem, sets: Downsets) -> list[StageLoads]:
    """Tables for every pair of degrees that the devices allow."""
    found: list[StageLoads] = []
    for degree in problem.tensor_degrees:
        costs = _costs(problem, sets, degree)
        found += [
            _table(problem, sets, costs, degree, replicas)
            for replicas in problem.replicas
            if replicas * degree <= problem.devices
        ]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """Nodes and transfers at one tensor-parallel degree; the replicas share the time of transfers."""

    work_LN: Array
    parameter_bytes_LN: Array
    stored_bytes_LN: Array
    fixed_bytes_LN: Array
    possible_P: npt.NDArray[np.bool_]
    least_transfer_P: Array
    most_transfer_P: Array


def _costs(problem: JointProblem, sets: Downsets, degree: int) -> _Costs:
    given = [by_degree.get(degree, ()) for by_degree in problem.options]
    count = max(len(options) for options in given)
    none = Option(
        name="",
        work=0.0,
        parameter_bytes=0.0,
        stored_bytes=0.0,
        fixed_bytes=0.0,
        received_bytes={},
        sent_bytes={},
    )
    # Nodes with fewer options than others have their first one several times.
    filled = [
        (*options, *[options[0]] * (count - len(options))) if options else (none,) * count
        for options in given
    ]
    missing_N = np.array([not options for options in given], dtype=np.float64)
    least_P, most_P = _transfers(problem, sets, filled)
    return _Costs(
        work_LN=np.array([[option.work for option in options] for options in filled]).T,
        parameter_bytes_LN=np.array([[option.parameter_bytes for option in options] for options in filled]).T,
        stored_bytes_LN=np.array([[option.stored_bytes for option in options] for options in filled]).T,
        fixed_bytes_LN=np.array([[option.fixed_bytes for option in options] for options in filled]).T,
        possible_P=_over(sets, sets.member_FN @ missing_N) < 0.5,
        least_transfer_P=least_P,
        most_transfer_P=most_P,
    )


def _transfers(
    problem: JointProblem, sets: Downsets, options: list[tuple[Option, ...]]
) -> tuple[Array, Array]:
    """Time that the transfers of each stage take, with each node's best option for it, and with its worst."""
    member_FN = sets.member_FN
    enters_LNF = np.zeros((len(options[0]), *member_FN.T.shape))
    leaves_LNF = np.zeros_like(enters_LNF)
    for edge in problem.edges:
        for option, (source, target) in enumerate(
            zip(options[edge.source], options[edge.target], strict=True)
        ):
            received = edge.transfer_bytes + target.received_bytes.get(edge.source, 0.0)
            sent = edge.transfer_bytes + source.sent_bytes.get(edge.target, 0.0)
            enters_LNF[option, edge.target] += received * member_FN[:, edge.source]
            leaves_LNF[option, edge.source] += sent * (1 - member_FN[:, edge.target])
    boundaries = [
        (enters_LNF.min(axis=0), leaves_LNF.min(axis=0)),
        (enters_LNF.max(axis=0), leaves_LNF.max(axis=0)),
    ]
    least_P, most_P = (
        _crossing(sets, *boundary) * (2 / problem.bandwidth_bytes_per_time) for boundary in boundaries
    )
    return least_P, most_P


def _crossing(sets: Downsets, enters_NF: Array, leaves_NF: Array) -> Array:
    """Sum over each stage of what enters its nodes from the first downset and leaves them past the second."""
    smaller_P, larger_P = sets.smaller_P, sets.larger_P
    enters_FF = sets.member_FN @ enters_NF
    leaves_FF = sets.member_FN @ leaves_NF
    entering_P = enters_FF[larger_P, smaller_P] - enters_FF[smaller_P, smaller_P]
    return entering_P + leaves_FF[larger_P, larger_P] - leaves_FF[smaller_P, larger_P]


def _over(sets: Downsets, sum_F: Array) -> Array:
    """Sum over each stage."""
    return sum_F[sets.larger_P] - sum_F[sets.smaller_P]


def _table(problem: JointProblem, sets: Downsets, costs: _Costs, degree: int, replicas: int) -> StageLoads:
    sync = 4 * (replicas - 1) / replicas / problem.samples / problem.bandwidth_bytes_per_time
    cost_LN = costs.work_LN / replicas + sync * costs.parameter_bytes_LN
    most_in_flight = -(-problem.most_replicas // replicas)
    shape = (most_in_flight, len(sets.smaller_P))
    lower_YP, upper_YP, least_YP = np.full(shape, np.inf), np.full(shape, np.inf), np.full(shape, np.inf)
    for number in range(most_in_flight):
        bytes_LN = costs.stored_bytes_LN * (number + 1) + costs.fixed_bytes_LN
        least_P = _over(sets, sets.member_FN @ bytes_LN.min(axis=0))
        least_YP[number] = np.where(costs.possible_P, least_P, np.inf)
        fits_P = np.flatnonzero(least_YP[number] <= problem.memory_bytes * (1 + _ROUNDING))
        if not len(fits_P):
            continue
        stages = Downsets(
            member_FN=sets.member_FN,
            complete=sets.complete,
            smaller_P=sets.smaller_P[fits_P],
            larger_P=sets.larger_P[fits_P],
        )
        lower_P, upper_P = _loads(stages, swaps(cost_LN, bytes_LN), cost_LN, bytes_LN, problem.memory_bytes)
        lower_YP[number, fits_P] = lower_P + costs.least_transfer_P[fits_P] / replicas
        upper_YP[number, fits_P] = upper_P + costs.most_transfer_P[fits_P] / replicas
    # What fits more samples fits fewer; only rounding can say otherwise.
    np.maximum.accumulate(lower_YP, axis=0, out=lower_YP)
    upper_YP = np.minimum.accumulate(upper_YP[::-1], axis=0)[::-1]
    return StageLoads(
        tensor_degree=degree,
        replicas=replicas,
        lower_YP=lower_YP,
        upper_YP=upper_YP,
        least_bytes_YP=least_YP,
    )


def _loads(
    stages: Downsets, made: Swaps, cost_LN: Array, bytes_LN: Array, memory_bytes: float
) -> tuple[Array, Array]:
    """Bounds of the loads without transfers, by as many swaps as a stage needs to fit."""
    nodes = np.arange(len(made.first_N))
    fastest_P = _over(stages, stages.member_FN @ cost_LN[made.first_N, nodes])
    excess_P = _over(stages, stages.member_FN @ bytes_LN[made.first_N, nodes]) - memory_bytes
    short_P = np.flatnonzero(excess_P > memory_bytes * _ROUNDING)
    lower_P, upper_P = fastest_P, fastest_P.copy()
    if not (len(short_P) and len(made.node_R)):
        return lower_P, upper_P
    saved = _Running(stages, made.saving_R, made.node_R, short_P)
    spent = _Running(stages, made.cost_R, made.node_R, short_P)
    needed_P = excess_P[short_P]
    last_P = saved.first_reaching(needed_P)
    before_P, after_P = spent.at(last_P), spent.at(last_P + 1)
    step_P = made.saving_R[last_P]
    part_P = np.clip((needed_P - saved.at(last_P)) / step_P, 0.0, 1.0)
    lower_P[short_P] += before_P + part_P * (after_P - before_P)
    upper_P[short_P] += after_P
    return lower_P, upper_P


class _Running:
    """Sums over the first so many swaps of the nodes of each stage."""

    def __init__(self, stages: Downsets, value_R: Array, node_R: IntArray, which_P: IntArray) -> None:
        sums_FR = np.cumsum(stages.member_FN[:, node_R] * value_R, axis=1)
        self._width = len(value_R) + 1
        self._sums = np.pad(sums_FR, ((0, 0), (1, 0))).ravel()
        self._smaller_P = stages.smaller_P[which_P] * self._width
        self._larger_P = stages.larger_P[which_P] * self._width

    def at(self, count_P: IntArray) -> Array:
        return self._sums[self._larger_P + count_P] - self._sums[self._smaller_P + count_P]

    def first_reaching(self, wanted_P: Array) -> IntArray:
        """The swap with which each stage has saved what it needs; the last one if rounding hides it."""
        low_P = np.zeros(len(wanted_P), dtype=np.int64)
        high_P = np.full(len(wanted_P), self._width - 2)
        while (low_P < high_P).any():
            middle_P = (low_P + high_P) // 2
            enough_P = self.at(middle_P + 1) >= wanted_P
            high_P = np.where(enough_P, middle_P, high_P)
            low_P = np.where(enough_P, low_P, middle_P + 1)
        return low_P
