"""Good pipelines over many devices, where there are too many patterns of stages and replicas to try all.

Devices stand in a row. Each stage is an interval of the line and runs on a group of neighbours in the row,
its replicas. Exact dynamic programming over (boundary, devices behind it) goes from the last stage to the
first, in the manner of Zheng et al., *Alpa*, OSDI 2022, §5.2, and Tarnawski et al., *Piper*, NeurIPS 2021,
§4, with intervals of a line in place of ideals. A step of M microbatches takes about

    M · max(load) + Σ latency,

load being the seconds in which a group is done with one, latency those that one takes on its way. For bounds
on the load, the programme finds the least sum of latencies. What is proposed is judged by the simulated step.

Axes: G = devices used, from the end of the row; Q, T, K as in :mod:`forescale.plan.interval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from forescale.plan.evaluation import Pricing
from forescale.plan.interval import IntervalProgram
from forescale.plan.line import Line
from forescale.plan.partition_plan import Schedule
from forescale.plan.problem import Array
from forescale.plan.replicas import share_out
from forescale.plan.schedule import in_flight
from forescale.plan.workload import IntArray, Workload

_SIZES = (*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of devices that a stage may have, beside all there are."""
_BOUNDARIES_PER_DEVICE, _LEAST_BOUNDARIES, _MOST_BOUNDARIES = 2, 64, 96
_SLACKS = (1.0, 1.01, 1.03, 1.08, 1.2, 1.5)
_FEW_DEVICES, _SLACKS_OF_FEWER = 8, (1.03,)
"""How far above the least possible the longest load may be, with all devices and with fewer."""


_MOST_LINES, _MOST_COUNTS = 2, 3
_FEWEST_PROPOSED, _PROPOSED_DEVICES = 24, 800
"""Proposals, or if that is more, as many as have so many devices together: they are quick to simulate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A pipeline, and about how long a step would take.

    Attributes:
        line: which of the lines it cuts.
        choice: position of the microbatch count on axis C.
        pattern: on how many devices each stage runs; ``devices`` has them in order.
        bounds: boundaries on the line.
    """

    estimate_s: float
    line: int
    choice: int
    pattern: tuple[int, ...]
    bounds: tuple[int, ...]
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What every interval would cost as a stage on some devices, by its boundaries."""

    devices: int
    load_s_QQ: Array
    latency_s_QQ: Array


_Link = tuple[float, float, bool] | None
"""Latency, seconds per byte, and whether it occupies its ends."""

_Member = tuple[int, int, int, tuple[_Link, _Link]]
"""What a device of a group costs depends on: its kind, its microbatches in flight and in all, its links."""

_Choice = tuple[IntArray, IntArray]
"""For each bound and boundary: which group comes first (-1: the device stays idle), and where it ends."""


def propose_groups(
    lines: Sequence[Line],
    pricing: Pricing,
    rows: Sequence[Sequence[int]],
    most_replicas: int,
    schedule: Schedule,
) -> list[Proposal]:
    """The likely ones of all lines, orders of the devices and microbatch counts; the shortest first.

    The best pipeline without replicas is always among them.

    Args:
        rows: positions of the devices in the cluster, in the orders in which groups may stand.
    """
    # Those whose cuts send the fewest bytes.
    narrow = sorted(range(len(lines)), key=lambda index: float(lines[index].crossing_bytes_P().sum()))
    found: list[Proposal] = []
    plain: list[Proposal] = []
    for line in narrow[: _MOST_LINES if len(rows[0]) <= _FEW_DEVICES else 1]:
        for row in rows:
            program = GroupProgram(line, lines[line], pricing, row, schedule)
            counts = range(len(lines[line].workload.counts))
            for choice in sorted(counts, key=partial(program.least_s, most_replicas=most_replicas))[
                :_MOST_COUNTS
            ]:
                found += program.propose(choice, most_replicas)
                plain += program.propose(choice, 1)
    found.sort(key=lambda proposal: proposal.estimate_s)
    best = min(plain, key=lambda proposal: proposal.estimate_s)
    most = max(_FEWEST_PROPOSED, _PROPOSED_DEVICES // len(rows[0]))
    return list(dict.fromkeys([*found[:most], best]))


class GroupProgram:
    """The dynamic programme on one line, for devices in one row."""

    def __init__(
        self, number: int, line: Line, pricing: Pricing, row: Sequence[int], schedule: Schedule
    ) -> None:
        """Coarsens the line.

        Args:
            number: of the line, for the proposals.
            row: positions of the devices in the cluster, in pipeline order; some may stay idle.
            schedule: says how many microbatches are in flight.
        """
        most = min(max(_BOUNDARIES_PER_DEVICE * len(row), _LEAST_BOUNDARIES), _MOST_BOUNDARIES)
        self._intervals = IntervalProgram(line, pricing, most)
        self._number, self._length = number, line.length
        self._workload, self._pricing, self._schedule = line.workload, pricing, schedule
        self._row, self._kind_D = list(row), device_kinds(line.workload, pricing)
        self._ample: dict[int, bool] = {}
        self._seconds_CD = (line.workload.forward_s_CDO + line.workload.backward_s_CDO).sum(axis=2).tolist()
        self._unit_s_DD = pricing.unit_s_DD * ~np.eye(len(pricing.unit_s_DD), dtype=bool)

    def least_s(self, choice: int, most_replicas: int) -> float:
        """About the least a step can take with a microbatch count: one on its way, and the longest load."""
        steps = self._steps(choice, most_replicas)
        latency_s = min(float(group.latency_s_QQ[0, -1]) for group in steps[-1])
        return latency_s + (self._workload.counts[choice] - 1) * float(_least_loads(steps)[-1, 0])

    def propose(self, choice: int, most_replicas: int) -> list[Proposal]:
        """The best for each bound on the load, with all devices and with fewer; the shortest first.

        Args:
            choice: position of the microbatch count on axis C.
        """
        steps = self._steps(choice, most_replicas)
        least_GQ = _least_loads(steps)
        devices = len(self._row)
        few = devices <= _FEW_DEVICES
        fewer = range(1, devices) if few else [2**power for power in range((devices - 1).bit_length())]
        asked = [(devices, slack) for slack in _SLACKS]
        asked += [(used, slack) for used in fewer for slack in (_SLACKS if few else _SLACKS_OF_FEWER)]
        bound_s_T11 = np.array([[[least_GQ[used, 0] * slack]] for used, slack in asked])
        choices = _cheapest(steps, bound_s_T11)
        found = [self._traced(choice, steps, choices, row, used) for row, (used, _) in enumerate(asked)]
        distinct = {(proposal.bounds, proposal.devices): proposal for proposal in found}
        return sorted(distinct.values(), key=lambda proposal: proposal.estimate_s)

    def _steps(self, choice: int, most_replicas: int) -> list[list[_Group]]:
        """For every number of devices used, the groups that may come first of them."""
        known: dict[object, _Group] = {}
        sizes = sorted({*_SIZES, len(self._row)})
        steps: list[list[_Group]] = []
        for used in range(len(self._row) + 1):
            groups = [
                self._group(used, size, choice, known) for size in sizes if size <= min(used, most_replicas)
            ]
            steps.append([group for group in groups if group is not None])
        return steps

    def _group(self, used: int, size: int, choice: int, known: dict[object, _Group]) -> _Group | None:
        """The first ``size`` of the last ``used`` devices; None if one would get no microbatch."""
        first, count = len(self._row) - used, self._workload.counts[choice]
        devices = self._row[first : first + size]
        shares = self._shares(devices, choice)
        if min(shares) == 0:
            return None
        before = self._row[first - 1] if first else None
        after = self._row[first + size] if used > size else None
        # Nothing comes back to the last stage.
        ahead = 1 if used == size else in_flight(self._schedule, used - 1, count)
        members: dict[_Member, tuple[int, int, int]] = {}
        for device, share in zip(devices, shares, strict=True):
            held = 0 if self._is_ample(choice) else -(-ahead * share // count)
            links = (self._link(device, before), self._link(device, after))
            members[self._kind_D[device], held, share, links] = (device, held, share)
        key = (size, frozenset(members), self._unit_s_DD[np.ix_(devices, devices)].max())
        if key not in known:
            known[key] = self._priced(devices, (before, after), list(members.values()), choice)
        return known[key]

    def _priced(
        self,
        devices: Sequence[int],
        beside: tuple[int | None, int | None],
        members: Sequence[tuple[int, int, int]],
        choice: int,
    ) -> _Group:
        """``members``: one of the devices of each sort, its microbatches in flight, and in all."""
        count = self._workload.counts[choice]
        loads: list[Array] = []
        latencies: list[Array] = []
        for device, held, share in members:
            time_K, wire_K, excess_K = self._intervals.alone(
                device, beside=beside, choice=choice, microbatches=count, in_flight=held
            )
            loads.append(time_K * (share / count) + excess_K)
            latencies.append(time_K + wire_K)
        load_K = np.max(loads, axis=0) + self._intervals.closing_s_K(devices) / count
        if len(devices) > 1:
            load_K += self._intervals.barred_K
        return _Group(
            devices=len(devices),
            load_s_QQ=self._intervals.square(load_K),
            latency_s_QQ=self._intervals.square(np.max(latencies, axis=0)),
        )

    def _shares(self, devices: Sequence[int], choice: int) -> tuple[int, ...]:
        seconds_D = self._seconds_CD[choice]
        return _shared_out(tuple([seconds_D[device] for device in devices]), self._workload.counts[choice])

    def _is_ample(self, choice: int) -> bool:
        """Whether memory is enough on all devices whatever is in flight."""
        if choice not in self._ample:
            count = self._workload.counts[choice]
            bytes_K = self._intervals.footprint(choice, microbatches=count, in_flight=count)
            least_bytes = self._pricing.capacity_bytes_D[self._row].min()
            self._ample[choice] = bool(bytes_K.peak_bytes_K.max() <= least_bytes)
        return self._ample[choice]

    def _link(self, device: int, other: int | None) -> _Link:
        if other is None:
            return None
        pricing, ends = self._pricing, (device, other)
        return pricing.latency_s_DD[ends], pricing.unit_s_DD[ends], bool(pricing.occupies_DD[ends])

    def _traced(
        self,
        choice: int,
        steps: Sequence[Sequence[_Group]],
        choices: Sequence[_Choice],
        bound: int,
        used: int,
    ) -> Proposal:
        """The pipeline found for one bound and number of devices."""
        at, pattern, bounds, devices = 0, list[int](), [0], list[int]()
        loads: list[float] = []
        latencies: list[float] = []
        end = len(self._intervals.at_Q) - 1
        while at < end:
            group_TQ, next_TQ = choices[used]
            chosen = int(group_TQ[bound, at])
            if chosen < 0:
                used -= 1
                continue
            group, following = steps[used][chosen], int(next_TQ[bound, at])
            first = len(self._row) - used
            devices += self._row[first : first + group.devices]
            pattern.append(group.devices)
            loads.append(float(group.load_s_QQ[at, following]))
            latencies.append(float(group.latency_s_QQ[at, following]))
            bounds.append(int(self._intervals.at_Q[following]))
            used, at = used - group.devices, following
        slowest = int(np.argmax(loads))
        step_s = self._workload.counts[choice] * loads[slowest] + sum(latencies) - latencies[slowest]
        return Proposal(
            estimate_s=step_s,
            line=self._number,
            choice=choice,
            pattern=tuple(pattern),
            bounds=(*bounds[:-1], self._length + 1),
            devices=tuple(devices),
        )


def _least_loads(steps: Sequence[Sequence[_Group]]) -> Array:
    """The least longest load from each boundary to the end, with at most so many devices: shape (G, Q)."""
    size = len(steps[1][0].load_s_QQ)
    least_GQ = np.full((len(steps), size), np.inf)
    least_GQ[:, -1] = 0.0
    for used, groups in enumerate(steps[1:], start=1):
        least_GQ[used] = least_GQ[used - 1]
        for group in groups:
            reached_Q = np.maximum(group.load_s_QQ, least_GQ[used - group.devices]).min(axis=1)
            np.minimum(least_GQ[used], reached_Q, out=least_GQ[used])
    return least_GQ


def _cheapest(steps: Sequence[Sequence[_Group]], bound_s_T11: Array) -> list[_Choice]:
    """Of every number of devices used, the choices with the least sum of latencies within the bounds."""
    size = len(steps[1][0].load_s_QQ)
    best_GTQ = np.full((len(steps), len(bound_s_T11), size), np.inf)
    best_GTQ[:, :, -1] = 0.0
    nothing_TQ = np.full(best_GTQ.shape[1:], -1)
    choices: list[_Choice] = [(nothing_TQ, nothing_TQ)]
    for used, groups in enumerate(steps[1:], start=1):
        best_TQ = best_GTQ[used]
        best_TQ[:] = best_GTQ[used - 1]
        group_TQ, next_TQ = nothing_TQ.copy(), nothing_TQ.copy()
        for number, group in enumerate(groups):
            allowed_TQQ = np.where(group.load_s_QQ <= bound_s_T11, group.latency_s_QQ, np.inf)
            allowed_TQQ += best_GTQ[used - group.devices][:, None, :]
            end_TQ = allowed_TQQ.argmin(axis=2)
            reached_TQ = np.take_along_axis(allowed_TQQ, end_TQ[..., None], axis=2)[..., 0]
            better_TQ = reached_TQ < best_TQ
            best_TQ[better_TQ], next_TQ[better_TQ] = reached_TQ[better_TQ], end_TQ[better_TQ]
            group_TQ[better_TQ] = number
        choices.append((group_TQ, next_TQ))
    return choices


@lru_cache(maxsize=4096)
def _shared_out(seconds: tuple[float, ...], microbatches: int) -> tuple[int, ...]:
    return share_out(np.array(seconds), microbatches)


def device_kinds(workload: Workload, pricing: Pricing) -> list[int]:
    """Equal numbers for devices that cost the same and hold as much, however they are joined."""
    seen: dict[bytes, int] = {}
    kinds: list[int] = []
    for device, capacity_bytes in enumerate(pricing.capacity_bytes_D):
        rows = (workload.forward_s_CDO[:, device].tobytes(), workload.backward_s_CDO[:, device].tobytes())
        rest = np.array([capacity_bytes, pricing.problem.optimizer_s_per_byte_D[device]]).tobytes()
        kinds.append(seen.setdefault(b"".join((*rows, rest)), device))
    return kinds
