"""The placement problem as a mixed-integer program for HiGHS (Huangfu and Hall, 2018).

Tarnawski et al., NeurIPS 2020, §5, with two changes that make the bounds tighter. A device pays for a net
what separates the greatest from the least of its atoms' indicators, so no variable says whether a net is
cut. Contiguous devices stand in a line whose places may have any kind each, and an atom's indicator of
being at or before a place falls along every edge; that also rules out devices that wait for each other,
and leaves no two equal devices to be exchanged.

Axes: A = atom, D = device, E = entry of the matrix, S = slot: a place with a kind; each free device has a
place of its own, X = column, Y = row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from forescale.plan.placement.atoms import Parts
from forescale.plan.placement.problem import Array, DeviceKind, IntArray

_MARGIN = 5e-6
"""By which fraction of the known load another must be shorter: more than the solver's tolerances."""
_WANTED = 1 - _MARGIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The best found, if any; ``lower_bound`` in the unit of the costs, minus infinity if none was."""

    device_A: IntArray | None
    lower_bound: float
    elapsed_s: float


def solve(
    parts: Parts,
    kinds: Sequence[DeviceKind],
    *,
    edges: Sequence[tuple[int, int]] | None,
    bounds: tuple[float, float],
    time_limit_s: float,
) -> Solved:
    """Looks for a placement that is shorter than a known one, or for a proof that there is none.

    The known placement is not given to the solver: HiGHS 1.15 then proves too much where its presolve found
    the objective to be whole but for an offset. That its longest load is to be undercut serves as well.

    Args:
        edges: if devices must hold intervals, what must go forward along them.
        bounds: the longest load is at least the first; the second is that of the known placement.
    """
    program = _Program(parts, kinds, edges, bounds)
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("time_limit", time_limit_s)
    solver.setOptionValue("mip_rel_gap", _MARGIN / 10)
    solver.setOptionValue("mip_abs_gap", _MARGIN / 10)
    solver.passModel(program.model())
    solver.run()
    info = solver.getInfo()
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    proven = info.mip_dual_bound
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        proven = _WANTED
    return Solved(
        device_A=program.read(np.array(solver.getSolution().col_value)) if found else None,
        lower_bound=min(proven, _WANTED) * bounds[1],
        elapsed_s=solver.getRunTime(),
    )


class _Program:
    """Columns and rows; times are fractions of the known longest load, memory of the device's."""

    def __init__(
        self,
        parts: Parts,
        kinds: Sequence[DeviceKind],
        edges: Sequence[tuple[int, int]] | None,
        bounds: tuple[float, float],
    ) -> None:
        self._parts, self._kinds, self._contiguous = parts, kinds, edges is not None
        self._unit = bounds[1]
        self._kind_D = [number for number, kind in enumerate(kinds) for _ in range(kind.count)]
        places = range(len(self._kind_D))
        if edges is None:
            self._slots = list(zip(places, self._kind_D, strict=True))
        else:
            self._slots = [(place, kind) for place in places for kind in sorted(set(self._kind_D))]
        self._lower_X: list[float] = []
        self._upper_X: list[float] = []
        self._whole_X: list[bool] = []
        self._most_Y: list[float] = []
        self._first_Y: list[int] = [0]
        self._column_E: list[int] = []
        self._value_E: list[float] = []
        self._longest = self._column(0.0, _WANTED)
        self._lower_X[self._longest] = min(bounds[0] / self._unit, _WANTED)
        self._x_AS = [self._indicators(atom) for atom in range(parts.count)]
        self._used_S: list[int] = []
        self._prefix: dict[tuple[int, int], int] = {}
        for slot in range(len(self._slots)):
            self._add_load(slot)
        if edges is None:
            self._forbid_exchanges()
        else:
            self._add_kinds()
            self._add_order(edges)

    def model(self) -> highspy.HighsLp:
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self._lower_X), len(self._most_Y)
        cost_X = np.zeros(model.num_col_)
        cost_X[self._longest] = 1.0
        model.col_cost_ = cost_X
        model.col_lower_, model.col_upper_ = np.array(self._lower_X), np.array(self._upper_X)
        model.row_lower_ = np.full(model.num_row_, -math.inf)
        model.row_upper_ = np.array(self._most_Y)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(self._first_Y, np.int32)
        model.a_matrix_.index_ = np.array(self._column_E, np.int32)
        model.a_matrix_.value_ = np.array(self._value_E)
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        model.integrality_ = [kinds[whole] for whole in self._whole_X]
        return model

    def read(self, value_X: Array) -> IntArray:
        """Device of each atom."""
        slot_A = value_X[np.array(self._x_AS)].argmax(axis=1)
        if not self._contiguous:
            return slot_A
        waiting = {kind: [d for d, k in enumerate(self._kind_D) if k == kind] for kind in set(self._kind_D)}
        device_S = {slot: waiting[self._slots[slot][1]].pop(0) for slot in np.unique(slot_A).tolist()}
        return np.array([device_S[slot] for slot in slot_A.tolist()])

    def _by_work(self) -> IntArray:
        """Atoms, those first that take the longest on their best device."""
        return np.argsort(-self._parts.work_KA.min(axis=0), kind="stable")

    def _column(self, lower: float, upper: float, *, whole: bool = False) -> int:
        self._lower_X.append(lower)
        self._upper_X.append(upper)
        self._whole_X.append(whole)
        return len(self._lower_X) - 1

    def _at_most(self, most: float, entries: Iterable[tuple[int, float]]) -> None:
        for column, value in entries:
            if value:
                self._column_E.append(column)
                self._value_E.append(value)
        self._most_Y.append(most)
        self._first_Y.append(len(self._column_E))

    def _exactly(self, value: float, entries: Sequence[tuple[int, float]]) -> None:
        self._at_most(value, entries)
        self._at_most(-value, [(column, -factor) for column, factor in entries])

    def _indicators(self, atom: int) -> list[int]:
        columns: list[int] = []
        for _, number in self._slots:
            kind, work = self._kinds[number], self._parts.work_KA[number, atom]
            can = work <= self._unit
            can &= self._parts.memory_bytes_A[atom] <= kind.memory_bytes
            columns.append(self._column(0.0, float(can), whole=True))
        self._exactly(1.0, [(column, 1.0) for column in columns])
        return columns

    def _add_load(self, slot: int) -> None:
        number = self._slots[slot][1]
        kind = self._kinds[number]
        x_A = [columns[slot] for columns in self._x_AS]
        work_A = [work if work <= 2 * self._unit else 0.0 for work in self._parts.work_KA[number].tolist()]
        terms = [(column, work / self._unit) for column, work in zip(x_A, work_A, strict=True)]
        for atoms, cost in _joined(self._parts).items() if kind.pays_transfers else ():
            greatest, least = self._column(0.0, 1.0), self._column(0.0, 1.0)
            for atom in atoms:
                self._at_most(0.0, [(x_A[atom], 1.0), (greatest, -1.0)])
                self._at_most(0.0, [(least, 1.0), (x_A[atom], -1.0)])
            terms += [(greatest, cost / self._unit), (least, -cost / self._unit)]
        self._at_most(0.0, [*terms, (self._longest, -1.0)])
        if math.isfinite(kind.memory_bytes) and kind.memory_bytes:
            fraction_A = (self._parts.memory_bytes_A / kind.memory_bytes).tolist()
            self._at_most(1.0, zip(x_A, fraction_A, strict=True))

    def _forbid_exchanges(self) -> None:
        """Of equal devices, the n-th holds none of the first n - 1 atoms: devices go by their first one."""
        number_of: dict[int, int] = {}
        for slot, kind in self._slots:
            number = number_of[kind] = number_of.get(kind, -1) + 1
            for atom in self._by_work()[:number]:
                self._upper_X[self._x_AS[atom][slot]] = 0.0

    def _add_kinds(self) -> None:
        """Every place has one kind, every kind as many places as devices."""
        present = sorted(set(self._kind_D))
        if len(present) == 1:
            return
        self._used_S = [self._column(0.0, 1.0, whole=True) for _ in self._slots]
        for kind in present:
            same = [used for used, slot in zip(self._used_S, self._slots, strict=True) if slot[1] == kind]
            self._exactly(float(self._kinds[kind].count), [(used, 1.0) for used in same])
        for start in range(0, len(self._slots), len(present)):
            self._exactly(1.0, [(used, 1.0) for used in self._used_S[start : start + len(present)]])
        for x_S in self._x_AS:
            for x, used in zip(x_S, self._used_S, strict=True):
                self._at_most(0.0, [(x, 1.0), (used, -1.0)])

    def _add_order(self, edges: Sequence[tuple[int, int]]) -> None:
        width = len(set(self._kind_D))
        last = len(self._kind_D) - 1
        for atom in sorted({atom for edge in edges for atom in edge}):
            before: list[tuple[int, float]] = []
            for place in range(last):
                column = self._prefix[atom, place] = self._column(0.0, 1.0, whole=True)
                here = self._x_AS[atom][place * width : (place + 1) * width]
                self._exactly(0.0, [(column, -1.0), *before, *((x, 1.0) for x in here)])
                before = [(column, 1.0)]
        for source, target in edges:
            for place in range(last):
                self._at_most(0.0, [(self._prefix[target, place], 1.0), (self._prefix[source, place], -1.0)])


def _joined(parts: Parts) -> dict[tuple[int, ...], float]:
    """Cost of all nets between the same atoms."""
    cost: dict[tuple[int, ...], float] = {}
    for net in parts.nets:
        atoms = tuple(sorted(net.nodes))
        cost[atoms] = cost.get(atoms, 0.0) + net.cost
    return cost
