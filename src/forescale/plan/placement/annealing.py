"""Placements whose devices hold any nodes: simulated annealing on the loads themselves.

Kirkpatrick, Gelatt and Vecchi, 1983. The energy is a high power mean of the loads: it falls also when the
longest load stays and the next ones shrink.

Axes: A = atom, D = device, H = net.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from forescale.plan.placement.atoms import Parts
from forescale.plan.placement.problem import PlacementProblem

_LARGE_NET = 50
"""Readers of a tensor beyond which being one of them says little about where an atom belongs."""
_PER_TEMPERATURE = 1000
_DRAWN = 4096
_DEVICES = 7
_SWAPS, _NEIGHBOURS = 0.3, 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """From one temperature to another, as fractions of the energy; ``exponent``: of the mean of loads.

    For up to seven devices; of more, each has less of the energy, and so has the temperature.
    """

    first: float
    last: float
    exponent: float


class Assignment:
    """A device for every atom, with loads and memory that follow each move."""

    def __init__(self, problem: PlacementProblem, parts: Parts, device_A: Sequence[int]) -> None:
        kind_D = problem.kind_D.tolist()
        kinds = [problem.kinds[kind] for kind in kind_D]
        self.device_A = list(device_A)
        self.devices = len(kinds)
        self._pays_D: list[bool] = problem.pays_D.tolist()
        self._capacity_D = [kind.memory_bytes for kind in kinds]
        self._work_AD = parts.work_KA.T[:, kind_D].tolist()
        self._memory_A = parts.memory_bytes_A.tolist()
        self._cost_H = [net.cost for net in parts.nets]
        self._nets_A: list[list[int]] = [[] for _ in range(parts.count)]
        self._held_HD = [[0] * self.devices for _ in parts.nets]
        for number, net in enumerate(parts.nets):
            for atom in net.nodes:
                self._nets_A[atom].append(number)
                self._held_HD[number][self.device_A[atom]] += 1
        self._span_H = [sum(held > 0 for held in held_D) for held_D in self._held_HD]
        self.load_D = [0.0] * self.devices
        self.memory_D = [0.0] * self.devices
        for atom, device in enumerate(self.device_A):
            self.load_D[device] += self._work_AD[atom][device]
            self.memory_D[device] += self._memory_A[atom]
        self._add_transfers()

    def _add_transfers(self) -> None:
        for cost, held_D, span in zip(self._cost_H, self._held_HD, self._span_H, strict=True):
            for device in range(self.devices):
                if span > 1 and held_D[device] and self._pays_D[device]:
                    self.load_D[device] += cost

    def fits(self, atom: int, device: int, freed_bytes: float = 0.0) -> bool:
        """Whether the device can run the atom and has the memory, once ``freed_bytes`` are gone."""
        needed = self.memory_D[device] - freed_bytes + self._memory_A[atom]
        return needed <= self._capacity_D[device] and self._work_AD[atom][device] < math.inf

    def can_swap(self, a: int, b: int) -> bool:
        """Whether two atoms may exchange their devices."""
        memory_A, device_A = self._memory_A, self.device_A
        return self.fits(a, device_A[b], memory_A[b]) and self.fits(b, device_A[a], memory_A[a])

    def move(self, atom: int, target: int) -> None:
        """Puts an atom on another device."""
        source = self.device_A[atom]
        load_D, held_HD, span_H, cost_H = self.load_D, self._held_HD, self._span_H, self._cost_H
        source_pays, target_pays = self._pays_D[source], self._pays_D[target]
        load_D[source] -= self._work_AD[atom][source]
        load_D[target] += self._work_AD[atom][target]
        for net in self._nets_A[atom]:
            held_D = held_HD[net]
            held_D[source] -= 1
            held_D[target] += 1
            left, came = held_D[source] == 0, held_D[target] == 1
            before = span_H[net]
            after = span_H[net] = before - left + came
            if source_pays:
                load_D[source] += cost_H[net] * ((after > 1 and not left) - (before > 1))
            if target_pays:
                load_D[target] += cost_H[net] * ((after > 1) - (before > 1 and not came))
        self.memory_D[source] -= self._memory_A[atom]
        self.memory_D[target] += self._memory_A[atom]
        self.device_A[atom] = target


class FarAssignment(Assignment):
    """On devices that are not all as far from each other: what moves may change the loads of all."""

    def __init__(self, problem: PlacementProblem, parts: Parts, device_A: Sequence[int]) -> None:
        levels = parts.nets.levels
        self._cost_HL: list[list[float]] = [] if levels is None else levels.cost_LH.T.tolist()
        self._source_H: list[int] = [] if levels is None else levels.source_H.tolist()
        self._level_DD: list[list[int]] = problem.level_DD.tolist()
        super().__init__(problem, parts, device_A)

    def _add_transfers(self) -> None:
        for net in range(len(self._cost_HL)):
            self._charge(net, 1.0)

    def move(self, atom: int, target: int) -> None:
        source = self.device_A[atom]
        self.load_D[source] -= self._work_AD[atom][source]
        self.load_D[target] += self._work_AD[atom][target]
        self.memory_D[source] -= self._memory_A[atom]
        self.memory_D[target] += self._memory_A[atom]
        for net in self._nets_A[atom]:
            self._charge(net, -1.0)
            self._held_HD[net][source] -= 1
            self._held_HD[net][target] += 1
        self.device_A[atom] = target
        for net in self._nets_A[atom]:
            self._charge(net, 1.0)

    def _charge(self, net: int, sign: float) -> None:
        """Adds what the net's devices pay, or takes it away."""
        cost_L = self._cost_HL[net]
        origin = self.device_A[self._source_H[net]]
        level_D = self._level_DD[origin]
        farthest = -1
        for device, held in enumerate(self._held_HD[net]):
            if held and device != origin:
                farthest = max(farthest, level_D[device])
                if self._pays_D[device]:
                    self.load_D[device] += sign * cost_L[level_D[device]]
        if farthest >= 0 and self._pays_D[origin]:
            self.load_D[origin] += sign * cost_L[farthest]


def assignment_of(problem: PlacementProblem, parts: Parts, device_A: Sequence[int]) -> Assignment:
    """The quicker of the two that is right for the problem."""
    kind = Assignment if parts.nets.levels is None else FarAssignment
    return kind(problem, parts, device_A)


def anneal(
    assignment: Assignment,
    parts: Parts,
    movable: Sequence[int],
    *,
    moves: int,
    cooling: Cooling,
    rng: np.random.Generator,
) -> tuple[float, list[int]]:
    """The longest load of the best assignment met on the way, and its devices.

    Args:
        movable: atoms that may change device.
    """
    search = _Walk(assignment, parts, movable, cooling, rng)
    share = min(1.0, _DEVICES / assignment.devices)
    for tried in range(0, moves, _PER_TEMPERATURE):
        temperature = cooling.first * (cooling.last / cooling.first) ** (tried / moves)
        search.walk(_PER_TEMPERATURE, temperature * share * cooling.exponent)
    return search.best, search.best_device_A


class _Walk:
    def __init__(
        self,
        assignment: Assignment,
        parts: Parts,
        movable: Sequence[int],
        cooling: Cooling,
        rng: np.random.Generator,
    ) -> None:
        self._assignment = assignment
        self._movable = list(movable)
        self._exponent = cooling.exponent
        # One at a time from a generator of numpy would cost more than a move.
        blocks = iter(lambda: rng.random(_DRAWN).tolist(), None)
        self._random: Callable[[], float] = chain.from_iterable(blocks).__next__
        self._scale = max(assignment.load_D) or 1.0  # nothing takes any time
        self._power_D = [self._power(load) for load in assignment.load_D]
        self._energy = sum(self._power_D)
        self._all_touched = range(assignment.devices if isinstance(assignment, FarAssignment) else 0)
        self.best, self.best_device_A = max(assignment.load_D), assignment.device_A.copy()
        neighbours: list[set[int]] = [set() for _ in range(parts.count)]
        for net in parts.nets:
            for atom in net.nodes if len(net.nodes) <= _LARGE_NET else ():
                neighbours[atom].update(net.nodes)
        self._neighbours_A = [sorted(known - {atom}) for atom, known in enumerate(neighbours)]

    def _power(self, load: float) -> float:
        return (load / self._scale) ** self._exponent

    def walk(self, steps: int, tolerance: float) -> None:
        """Tries moves and swaps; takes one that raises the energy by a fraction x with chance exp(-x / T)."""
        for _ in range(steps):
            self._try(tolerance)

    def _try(self, tolerance: float) -> None:
        assignment, draw = self._assignment, self._random
        atom = self._movable[int(draw() * len(self._movable))]
        source = assignment.device_A[atom]
        other, target = self._propose(atom)
        if target == source:
            return
        if not (assignment.fits(atom, target) if other is None else assignment.can_swap(atom, other)):
            return
        load_D, power_D = assignment.load_D, self._power_D
        touched = self._all_touched or (source, target)
        before = [(device, load_D[device], power_D[device]) for device in touched]
        assignment.move(atom, target)
        if other is not None:
            assignment.move(other, source)
        for device in touched:
            power_D[device] = self._power(load_D[device])
        energy = sum(power_D)
        if energy <= self._energy * (1 - tolerance * math.log(1 - draw())):
            self._energy = energy
            if (longest := max(load_D)) < self.best:
                self.best, self.best_device_A = longest, assignment.device_A.copy()
            return
        if other is not None:
            assignment.move(other, target)
        assignment.move(atom, source)
        # Exactly as it was: rounding must not add up over many moves.
        for device, load, power in before:
            load_D[device], power_D[device] = load, power

    def _propose(self, atom: int) -> tuple[int | None, int]:
        """An atom to swap with, if any, and the device to go to."""
        assignment, draw = self._assignment, self._random
        kind = draw()
        if kind < _SWAPS:
            other = self._movable[int(draw() * len(self._movable))]
            return other, assignment.device_A[other]
        if kind < _NEIGHBOURS and (neighbours := self._neighbours_A[atom]):
            return None, assignment.device_A[neighbours[int(draw() * len(neighbours))]]
        return None, int(draw() * assignment.devices)
