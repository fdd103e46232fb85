"""Places a graph's nodes on devices so that one sample is through it soon, with nothing else there.

Starts: HEFT, everything on one device, the placement with the shortest loads, and intervals of a line cut so
that they take least one after the other. The best is improved by local search: what is on the chain of nodes
that sets the latency is moved in runs, and every placement is judged by its list schedule.

Axes: N = node, A = atom, D = device, K = device kind, B = block along the line, i and j = boundary;
S = number of devices used of each kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np

from forescale.core.errors import InfeasiblePlan
from forescale.plan.placement.atoms import Parts, atoms, blocks, merge
from forescale.plan.placement.bounds import packing_bound
from forescale.plan.placement.coarsening import everywhere
from forescale.plan.placement.cut_moves import CutMoves
from forescale.plan.placement.line import Line, orders
from forescale.plan.placement.list_schedule import Schedule, Timetable
from forescale.plan.placement.loads import lower_bound, memory_bytes, work
from forescale.plan.placement.place import Placement, place
from forescale.plan.placement.problem import Array, IntArray, PlacementProblem, order_of

_SEED = 0
_VISITS = 6_000_000
"""Nodes and their inputs that all schedules of a search may look at together."""
_MOST_TRIES = 8000
_WARMEST = 0.03
"""How much longer a placement may be taken at first, as a fraction; falls to none."""
_LONGEST_RUN = 6
"""Binary logarithm of the length of a run that is moved as one."""
_ORDERS = 8
_MOST_BOUNDARIES = 400

_Devices = list[int]


def place_for_latency(problem: PlacementProblem, *, contiguous: bool, seed: int = _SEED) -> Placement:
    """The placement found that takes one sample the least time; the objective is that time.

    Args:
        contiguous: whether each device holds an interval of the forward pass.

    Raises:
        InfeasiblePlan: no placement was found that fits the devices' memory.
    """
    rng = np.random.default_rng(seed)
    timetable = Timetable(problem)
    atom_N = atoms(problem)
    starts = [*_on_one(problem, atom_N), *_along_lines(problem, atom_N, rng)]
    if not contiguous:
        capacity_D = [problem.kinds[kind].memory_bytes for kind in problem.kind_D.tolist()]
        found = timetable.heft(atom_N, merge(problem, atom_N).memory_bytes_A.tolist(), capacity_D)
        starts += [] if found is None else [found]
    try:
        starts.append(place(problem, contiguous=True, seed=seed).device_N.tolist())
    except InfeasiblePlan:
        if not starts:
            raise
    best = min(starts, key=lambda device_N: timetable.schedule(device_N).latency)
    search = _Search(problem, timetable, atom_N, best, rng)
    bound = latency_bound(problem, search.best)
    search.run(_Cuts(problem, atom_N, rng).move if contiguous else search.move_run, bound)
    return scheduled_as(problem, search.best_N, lower_bound=min(bound, search.best))


def scheduled_as(
    problem: PlacementProblem, device_N: Sequence[int] | IntArray, *, lower_bound: float
) -> Placement:
    """What an assignment of devices takes one sample. Loads are the devices' work alone."""
    device = np.asarray(device_N)
    schedule = Timetable(problem).schedule(device.tolist())
    work_D = work(problem, device)
    return Placement(
        device_N=device,
        objective=schedule.latency,
        lower_bound=lower_bound,
        load_D=work_D,
        work_D=work_D,
        memory_bytes_D=memory_bytes(problem, device),
        start_N=np.array(schedule.start_N),
    )


def latency_bound(problem: PlacementProblem, latency: float) -> float:
    """A time that one sample takes under every assignment; at most ``latency``, that of one that fits.

    The longest path, each node on the kind of device that is best for the path, with the transfers between
    kinds; and all work shared out among the devices, as for throughput.
    """
    atom_N = atoms(problem)
    return min(
        max(
            _longest_path(problem),
            lower_bound(problem, atom_N),
            packing_bound(merge(problem, atom_N), problem.kinds, latency),
        ),
        latency,
    )


def _longest_path(problem: PlacementProblem) -> float:
    """For each node and kind, a time before which it cannot end there.

    Two devices of one kind may be the same device; of two kinds, one of which pays, a tensor costs at least
    what it does between neighbours.
    """
    present = [number for number, kind in enumerate(problem.kinds) if kind.count]
    pays_K = np.array([problem.kinds[number].pays_transfers for number in present])
    apart_KK = (pays_K[:, None] | pays_K) & ~np.eye(len(present), dtype=bool)
    inputs: list[list[tuple[int, float]]] = [[] for _ in problem.nodes]
    for net in problem.nets:
        for reader in net.nodes[1:]:
            inputs[reader].append((net.nodes[0], net.cost))
    end_NK = np.zeros((len(problem.nodes), len(present)))
    for node in order_of(len(problem.nodes), problem.edge_XE.T, problem.nodes):
        ready_K = np.zeros(len(present))
        for source, cost in inputs[node]:
            ready_K = np.maximum(ready_K, (end_NK[source] + cost * apart_KK).min(axis=1))
        end_NK[node] = ready_K + problem.work_KN[present, node]
    return float(end_NK.min(axis=1).max())


def _on_one(problem: PlacementProblem, atom_N: IntArray) -> Iterator[_Devices]:
    """Everything on the first device of every kind that can hold it."""
    all_bytes = problem.memory_bytes_N.sum()
    for number, kind in enumerate(problem.kinds):
        if kind.count and all_bytes <= kind.memory_bytes and np.isfinite(problem.work_KN[number]).all():
            device = int(np.flatnonzero(problem.kind_D == number)[0])
            yield [device] * len(atom_N)


def _along_lines(problem: PlacementProblem, atom_N: IntArray, rng: np.random.Generator) -> Iterator[_Devices]:
    """Of some orders, intervals that take least one after the other, with what is sent between them."""
    block_N, edge_XE = blocks(problem, atom_N)
    parts = merge(problem, block_N)
    for order_B in orders(parts.count, edge_XE, _ORDERS, rng, long=parts.count > _MOST_BOUNDARIES):
        device_B = _cut(problem, parts, order_B)
        if device_B is not None:
            yield device_B[block_N].tolist()


def _cut(problem: PlacementProblem, parts: Parts, order_B: IntArray) -> IntArray | None:
    """Exact where each device waits for the one before it, and for its dearest tensor; None if none fits."""
    line = Line(parts, order_B, problem.kinds)
    cut_j = np.union1d(everywhere(line.crossing_j, line.weight_j, _MOST_BOUNDARIES), line.filled())
    work_Kij = line.work(cut_j)
    sending_j = _dearest(parts, order_B)[cut_j]
    states = list(product(*(range(kind.count + 1) for kind in problem.kinds)))
    best_S: dict[tuple[int, ...], Array] = {states[0]: np.where(np.arange(len(cut_j)) > 0, np.inf, 0.0)}
    from_S: dict[tuple[int, ...], tuple[IntArray, IntArray]] = {}
    for state in states[1:]:
        kinds = [kind for kind, used in enumerate(state) if used]
        reached = [
            best_S[_less(state, kind)][:, None] + sending_j[:, None] + work_Kij[kind] for kind in kinds
        ]
        from_Kj = np.stack([reached_ij.argmin(axis=0) for reached_ij in reached])
        time_Kj = np.stack([reached_ij.min(axis=0) for reached_ij in reached])
        kind_j = time_Kj.argmin(axis=0)
        at_j = np.arange(len(cut_j))
        best_S[state] = time_Kj[kind_j, at_j]
        from_S[state] = np.array(kinds)[kind_j], from_Kj[kind_j, at_j]
    state = min(states, key=lambda state: best_S[state][-1])
    if not np.isfinite(best_S[state][-1]):
        return None
    device_B = np.empty(parts.count, dtype=np.int64)
    first_K = np.cumsum([0, *(kind.count for kind in problem.kinds)])
    end = len(cut_j) - 1
    while end:
        kind, start = (int(choice_j[end]) for choice_j in from_S[state])
        state = _less(state, kind)
        device_B[order_B[cut_j[start] : cut_j[end]]] = first_K[kind] + state[kind]
        end = start
    return device_B


def _less(state: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*state[:kind], state[kind] - 1, *state[kind + 1 :])


def _dearest(parts: Parts, order_B: IntArray) -> Array:
    """The dearest tensor across each boundary; nothing at the ends."""
    position_B = np.empty(parts.count, dtype=np.int64)
    position_B[order_B] = np.arange(parts.count)
    nets = parts.nets
    dearest_j = np.zeros(parts.count + 1)
    if len(nets):
        at_P = position_B[nets.node_P]
        first_H = np.minimum.reduceat(at_P, nets.start_H)
        last_H = np.maximum.reduceat(at_P, nets.start_H)
        for net in np.argsort(nets.cost_H).tolist():  # the dearest last: it is what stays
            dearest_j[first_H[net] + 1 : last_H[net] + 1] = nets.cost_H[net]
    return dearest_j


class _Search:
    """Local search from one placement; with time, only what is no longer is taken."""

    def __init__(
        self,
        problem: PlacementProblem,
        timetable: Timetable,
        atom_N: IntArray,
        device_N: _Devices,
        rng: np.random.Generator,
    ) -> None:
        self._problem, self._timetable, self._rng = problem, timetable, rng
        self._atom_N = atom_N.tolist()
        self._nodes_A: list[list[int]] = [[] for _ in range(max(self._atom_N) + 1)]
        for node, atom in enumerate(self._atom_N):
            self._nodes_A[atom].append(node)
        self._capacity_D = np.array([problem.kinds[kind].memory_bytes for kind in problem.kind_D])
        self._device_N = device_N
        self._schedule = timetable.schedule(device_N)
        self.best, self.best_N = self._schedule.latency, device_N

    def run(self, propose: Callable[[_Devices, Schedule], _Devices | None], bound: float) -> None:
        """Up to a placement that takes no longer than ``bound``."""
        tries = min(_VISITS // self._timetable.size, _MOST_TRIES) if len(self._capacity_D) > 1 else 0
        for tried in range(tries):
            if self.best <= bound:
                break
            proposed_N = propose(self._device_N, self._schedule)
            if proposed_N is None or not self._fits(proposed_N):
                continue
            schedule = self._timetable.schedule(proposed_N)
            slack = _WARMEST * (1 - tried / tries) ** 2 * -math.log(1 - self._rng.random())
            if schedule.latency <= self._schedule.latency * (1 + slack):
                self._device_N, self._schedule = proposed_N, schedule
                if schedule.latency < self.best:
                    self.best, self.best_N = schedule.latency, proposed_N

    def _fits(self, device_N: _Devices) -> bool:
        problem, device = self._problem, np.array(device_N)
        able = np.isfinite(problem.work_KN[problem.kind_D[device], np.arange(len(device))]).all()
        return bool(able and (memory_bytes(problem, device) <= self._capacity_D).all())

    def move_run(self, device_N: _Devices, schedule: Schedule) -> _Devices | None:
        """A run of the chain, to the device of a neighbour on it or to any."""
        chain, rng = schedule.chain, self._rng
        first = int(rng.integers(len(chain)))
        length = 1 << int(rng.integers(min(len(chain).bit_length(), _LONGEST_RUN)))
        beside = [node for node in (first - 1, first + length) if 0 <= node < len(chain)]
        if beside and rng.random() < 0.5:
            target = device_N[chain[int(rng.choice(beside))]]
        else:
            target = int(rng.integers(len(self._capacity_D)))
        proposed_N = device_N.copy()
        for node in chain[first : first + length]:
            for mate in self._nodes_A[self._atom_N[node]]:
                proposed_N[mate] = target
        return proposed_N if proposed_N != device_N else None


class _Cuts:
    """The same for intervals: moves of blocks along a line."""

    def __init__(self, problem: PlacementProblem, atom_N: IntArray, rng: np.random.Generator) -> None:
        self._block_N, edge_XE = blocks(problem, atom_N)
        # The backward pass may stand anywhere: a node of the forward pass, if any, says where a block is.
        node_N = np.lexsort((problem.backward_N, self._block_N))
        self._first_B = node_N[np.unique(self._block_N[node_N], return_index=True)[1]]
        self._moves = CutMoves(len(self._first_B), edge_XE, len(problem.devices), rng)

    def move(self, device_N: _Devices, _: Schedule) -> _Devices | None:
        device_B = self._moves.moved(np.array(device_N)[self._first_B])
        return None if device_B is None else device_B[self._block_N].tolist()
