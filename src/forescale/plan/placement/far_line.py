"""Contiguous placement on devices that are not all as far from each other.

The devices stand in a row, neighbours as near as can be. The programme of
:mod:`forescale.plan.placement.line` then goes along the row: what an interval receives is taken to come from
the device used before it, and what it sends to go to the device used after it. That is exact unless a tensor
skips devices. The exact loads decide between answers that use more or fewer devices, on the best orders for
links of each level; then boundaries of the best one are shifted wherever that helps.

Axes: B = block along the line, i and j = boundary; K = device kind, D = device, L = level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from forescale.plan.placement.atoms import Parts
from forescale.plan.placement.coarsening import around
from forescale.plan.placement.cut_moves import CutMoves
from forescale.plan.placement.line import Line, Placed, best_line
from forescale.plan.placement.loads import loads, memory_bytes
from forescale.plan.placement.problem import Array, IntArray, PlacementProblem

_MOST_BOUNDARIES = 500
_TRIES, _TRIES_PER_BLOCK = 3000, 60
_VISITS = 10_000_000
"""Nodes and pins that all loads of the local search may go over together."""
_EXPONENT = 16

_State = tuple[int, int]
"""Place in the row of the next device, and the level of links from the one used before it."""


def best_far_line(
    problem: PlacementProblem, parts: Parts, edge_XE: IntArray, rng: np.random.Generator
) -> Placed:
    """The best found of intervals of several orders; an infinite load if none fits."""
    found: list[Placed] = []
    for level in range(1 + len(problem.unit_devices)):
        near = best_line(replace(parts, nets=parts.nets.at(level)), edge_XE, problem.kinds, rng)
        if not np.isfinite(near.load):
            return near
        for device_B in (near.device_B, *_along_row(problem, parts, near)):
            load = float(loads(problem, device_B[parts.part_N]).max())
            found.append(Placed(load=load, device_B=device_B, order_B=near.order_B))
    best = min(found, key=lambda placed: placed.load)
    moves = CutMoves(parts.count, edge_XE, len(problem.devices), rng)
    device_B = _shifted(problem, parts, best.device_B, moves)
    return replace(best, load=float(loads(problem, device_B[parts.part_N]).max()), device_B=device_B)


def _shifted(problem: PlacementProblem, parts: Parts, device_B: IntArray, moves: CutMoves) -> IntArray:
    """What local search finds on the loads themselves; the energy is that of annealing."""
    capacity_D = np.array([problem.kinds[kind].memory_bytes for kind in problem.kind_D])
    scale = float(loads(problem, device_B[parts.part_N]).max()) or 1.0
    best = np.inf
    size = len(problem.nodes) + len(problem.pins.node_P)
    for tried in range(min(_TRIES, _TRIES_PER_BLOCK * parts.count, _VISITS // size)):
        moved_B = moves.moved(device_B) if tried and len(capacity_D) > 1 else device_B
        if moved_B is None:
            continue
        device_N = moved_B[parts.part_N]
        load_D = loads(problem, device_N)
        energy = float(((load_D / scale) ** _EXPONENT).sum()) if load_D.max() < np.inf else np.inf
        if energy <= best and (memory_bytes(problem, device_N) <= capacity_D).all():
            device_B, best = moved_B, energy
    return device_B


def _along_row(problem: PlacementProblem, parts: Parts, near: Placed) -> Iterator[IntArray]:
    """Devices of the blocks: intervals of the order of another placement, in its order of devices."""
    used = list(dict.fromkeys(near.device_B[near.order_B].tolist()))
    row = [*used, *(device for device in range(len(problem.devices)) if device not in used)]
    levels = range(1 + len(problem.unit_devices))
    lines = [Line(replace(parts, nets=parts.nets.at(level)), near.order_B, problem.kinds) for level in levels]
    cut_j = np.arange(parts.count + 1)
    if parts.count > _MOST_BOUNDARIES:
        changes = np.flatnonzero(np.diff(near.device_B[near.order_B])) + 1
        reach = 4 * parts.count // _MOST_BOUNDARIES
        cut_j = around(np.append(changes, parts.count), lines[0].crossing_j, reach, _MOST_BOUNDARIES)
    walk = _Walk(problem, row, lines, cut_j)
    for intervals in walk.answers():
        device_B = np.empty(parts.count, dtype=np.int64)
        for start, end, device in intervals:
            device_B[near.order_B[start:end]] = device
        yield device_B


class _Walk:
    """Along the row of devices; each holds the interval behind that of the device used before it."""

    def __init__(
        self, problem: PlacementProblem, row: Sequence[int], lines: Sequence[Line], cut_j: IntArray
    ) -> None:
        self._row, self._cut_j, self._problem = row, cut_j, problem
        self._work_Kij = lines[0].work(cut_j)
        self._sent_L = [line.sent(cut_j) for line in lines]
        self._received_L = [
            line.transfers(cut_j) - sent for line, sent in zip(lines, self._sent_L, strict=True)
        ]
        start_j = np.full(len(cut_j), np.inf)
        start_j[0] = 0.0
        self._best_S: dict[_State, Array] = {(0, 0): start_j}
        self._before_S: dict[_State, list[tuple[_State, int]]] = {}
        for place in range(len(row)):
            for state in [state for state in self._best_S if state[0] == place]:
                for following in self._following(place):
                    self._go(state, following)

    def _following(self, place: int) -> list[_State]:
        """The nearest device of every level behind a place; the end of the row if there is none."""
        level_D = self._problem.level_DD[self._row[place]]
        first: dict[int, int] = {}
        for behind in range(place + 1, len(self._row)):
            first.setdefault(int(level_D[self._row[behind]]), behind)
        return [(behind, level) for level, behind in first.items()] or [(len(self._row), 0)]

    def _go(self, state: _State, following: _State) -> None:
        device = self._row[state[0]]
        load_ij = self._work_Kij[self._problem.kind_D[device]]
        if self._problem.pays_D[device]:
            load_ij = load_ij + self._received_L[state[1]] + self._sent_L[following[1]]
        reached_ij = np.maximum(self._best_S[state][:, None], load_ij)
        from_j = reached_ij.argmin(axis=0)
        reached_j = reached_ij[from_j, np.arange(len(from_j))]
        known_j = self._best_S.setdefault(following, np.full(len(from_j), np.inf))
        before = self._before_S.setdefault(following, [(state, 0)] * len(from_j))
        for j in np.flatnonzero(reached_j < known_j).tolist():
            known_j[j], before[j] = reached_j[j], (state, int(from_j[j]))

    def answers(self) -> Iterator[list[tuple[int, int, int]]]:
        """For each last device, intervals: first block, the block behind the last, device."""
        for state in [state for state, best_j in self._best_S.items() if best_j[-1] < np.inf]:
            intervals: list[tuple[int, int, int]] = []
            at, end = state, len(self._cut_j) - 1
            while end:
                at, start = self._before_S[at][end]
                intervals.append((int(self._cut_j[start]), int(self._cut_j[end]), self._row[at[0]]))
                end = start
            yield intervals
