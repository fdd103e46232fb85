"""The best options for the nodes of one given stage.

The multiple-choice knapsack of ``swaps``, solved exactly: options that no better choice can contain are
discarded by their reduced cost, then the sets of choices that none beats in both time and memory are grown
node by node (Nemhauser and Ullmann, *Discrete Dynamic Programming and Capital Allocation*, 1969).

Axes: L = option, N = node of the stage, C = choice of options for the first nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np

from forescale.plan.joint.problem import JointProblem, JointStage
from forescale.plan.joint.swaps import swaps
from forescale.plan.placement.problem import Array, IntArray

_MOST_CHOICES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """The fastest choice that fits; ``proven`` unless choices had to be thinned out on the way."""

    stage: JointStage
    load: float
    proven: bool


def best_stage(
    problem: JointProblem, nodes: Sequence[int], *, tensor_degree: int, replicas: int, in_flight: int
) -> StageChoice | None:
    """The best options of a stage with ``in_flight`` samples; none if no choice fits."""
    cost_LN, bytes_LN = _options(problem, nodes, tensor_degree, replicas, in_flight)
    found = _Knapsack(cost_LN, bytes_LN, problem.memory_bytes).solve()
    if found is None:
        return None
    option_N, proven = found
    load = fsum(cost_LN[option_N, np.arange(len(nodes))].tolist())
    options = tuple(option_N.tolist())
    stage = JointStage(nodes=tuple(nodes), replicas=replicas, tensor_degree=tensor_degree, options=options)
    return StageChoice(stage=stage, load=load, proven=proven)


def _options(
    problem: JointProblem, nodes: Sequence[int], degree: int, replicas: int, in_flight: int
) -> tuple[Array, Array]:
    """Load and memory that each option adds; infinite where a node has fewer options than others."""
    inside = set(nodes)
    width = max(len(problem.options[node][degree]) for node in nodes)
    cost_LN, bytes_LN = (np.full((width, len(nodes)), np.inf) for _ in range(2))
    sync = 4 * (replicas - 1) / replicas / problem.samples
    for position, node in enumerate(nodes):
        before = [edge for edge in problem.edges_into[node] if edge.source not in inside]
        after = [edge for edge in problem.edges_from[node] if edge.target not in inside]
        crossing = sum(edge.transfer_bytes for edge in (*before, *after))
        for number, option in enumerate(problem.options[node][degree]):
            moved = crossing + sum(option.received_bytes.get(edge.source, 0.0) for edge in before)
            moved += sum(option.sent_bytes.get(edge.target, 0.0) for edge in after)
            moved = 2 * moved / replicas + sync * option.parameter_bytes
            cost_LN[number, position] = option.work / replicas + moved / problem.bandwidth_bytes_per_time
            bytes_LN[number, position] = option.stored_bytes * in_flight + option.fixed_bytes
    return cost_LN, bytes_LN


class _Knapsack:
    def __init__(self, cost_LN: Array, bytes_LN: Array, memory_bytes: float) -> None:
        self._cost_LN = cost_LN
        self._bytes_LN = bytes_LN
        self._memory_bytes = memory_bytes
        self._nodes = np.arange(cost_LN.shape[1])

    def solve(self) -> tuple[IntArray, bool] | None:
        """Option of each node, and whether none is better."""
        greedy = self._greedy()
        if greedy is None:
            return None
        option_N, price = greedy
        if not price:
            return option_N, True
        most = self._cost(option_N)
        reduced_LN = self._cost_LN + price * self._bytes_LN
        least_N = reduced_LN.min(axis=0)
        slack = most - (fsum(least_N.tolist()) - price * self._memory_bytes)
        # Not one that just equals the choice at hand is needed, but rounding must not discard a better one.
        kept_LN = reduced_LN - least_N <= slack + 1e-9 * most
        better_N, proven = self._grow(kept_LN, price, most)
        return (option_N if better_N is None else better_N), proven

    def _cost(self, option_N: IntArray) -> float:
        return fsum(self._cost_LN[option_N, self._nodes].tolist())

    def _fits(self, option_N: IntArray) -> bool:
        return fsum(self._bytes_LN[option_N, self._nodes].tolist()) <= self._memory_bytes

    def _greedy(self) -> tuple[IntArray, float] | None:
        """Swaps in the order of price until the stage fits, and the price of the last one."""
        made = swaps(self._cost_LN, self._bytes_LN)
        option_N, price = made.first_N.copy(), 0.0
        held_bytes = float(self._bytes_LN[option_N, self._nodes].sum())
        for node, option, cost, saving in zip(
            made.node_R, made.option_R, made.cost_R, made.saving_R, strict=True
        ):
            if held_bytes <= self._memory_bytes * (1 + 1e-9) and self._fits(option_N):
                return option_N, price
            option_N[node], price = option, float(cost / saving)
            held_bytes -= saving
        return (option_N, price) if self._fits(option_N) else None

    def _grow(
        self, kept_LN: np.ndarray[tuple[int, int], np.dtype[np.bool_]], price: float, most: float
    ) -> tuple[IntArray | None, bool]:
        """The best choice among the options kept, if it costs less than ``most``."""
        reduced_LN = self._cost_LN + price * self._bytes_LN
        ahead_N = np.cumsum(reduced_LN.min(axis=0)[::-1])[::-1]
        cost_C, bytes_C = np.zeros(1), np.zeros(1)
        steps: list[tuple[IntArray, IntArray]] = []
        proven = True
        for node in self._nodes:
            (kept_L,) = np.nonzero(kept_LN[:, node])
            grown_LC = cost_C + self._cost_LN[kept_L, node][:, None]
            taken_LC = bytes_C + self._bytes_LN[kept_L, node][:, None]
            rest = ahead_N[node + 1] if node + 1 < len(ahead_N) else 0.0
            bound_LC = grown_LC + price * (taken_LC - self._memory_bytes) + rest
            hopeful = np.flatnonzero((bound_LC < most) & (taken_LC <= self._memory_bytes))
            order = hopeful[np.lexsort((grown_LC.ravel()[hopeful], taken_LC.ravel()[hopeful]))]
            cheapest = np.minimum.accumulate(grown_LC.ravel()[order])
            order = order[np.append(True, cheapest[1:] < cheapest[:-1])[: len(order)]]
            if len(order) > _MOST_CHOICES:
                proven = False
                promising = np.argsort(bound_LC.ravel()[order], kind="stable")[:_MOST_CHOICES]
                order = order[promising]
            steps.append((kept_L[order // len(cost_C)], order % len(cost_C)))
            cost_C, bytes_C = grown_LC.ravel()[order], taken_LC.ravel()[order]
        return self._traced(steps, cost_C), proven

    def _traced(self, steps: list[tuple[IntArray, IntArray]], cost_C: Array) -> IntArray | None:
        """The cheapest choice of all nodes that fits without any allowance for rounding."""
        for choice in np.argsort(cost_C, kind="stable").tolist():
            option_N = np.zeros(len(self._nodes), dtype=np.int64)
            at = choice
            for node in reversed(range(len(self._nodes))):
                option_N[node] = steps[node][0][at]
                at = int(steps[node][1][at])
            if self._fits(option_N):
                return option_N
        return None
