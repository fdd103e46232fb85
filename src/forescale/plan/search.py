"""Finds the split whose simulated step is shortest.

If a line has few enough cuts all are simulated, which is always so for two stages of up to a thousand
operators. Otherwise :mod:`forescale.plan.interval` proposes, and the best proposals' boundaries are
moved, in steps large and small, while the simulated step gets shorter. Of many devices not all patterns are
tried: :mod:`forescale.plan.groups` proposes patterns, devices and boundaries together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, combinations, islice, pairwise, product
from math import comb
from operator import add

import numpy as np

from forescale.plan.evaluation import INFEASIBLE, Mode, Pricing, evaluate
from forescale.plan.groups import Proposal, device_kinds, propose_groups
from forescale.plan.interval import IntervalProgram
from forescale.plan.line import Line, Splits, cut
from forescale.plan.partition_plan import Schedule
from forescale.plan.patterns import Pattern, arrangements, patterns, positions, uniform
from forescale.plan.problem import Array
from forescale.plan.regrouping import regroupings
from forescale.plan.replicas import share_out
from forescale.plan.schedule import Layout, deal
from forescale.plan.workload import IntArray, Workload

_MOST_CUTS = 5_000
_MOST_CUTS_OF_REPLICAS = 200
_MOST_CELLS = 1_500_000
_MOST_SEQUENCES = 24
_REFINED = 6
_PAIR_SHIFTS = tuple(sign * size for size in (1, 4, 16) for sign in (1, -1))
_SHIFTS = tuple(sign * size for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) for sign in (1, -1))
_SHORTER = 1 - 1e-9  # what moving a boundary must gain, so that rounding does not move it for ever
_AS_GOOD = 1.001
_MOST_PATTERNED = 4
"""Devices up to which all patterns are tried."""
_MOST_ARRANGED = 8
"""Devices up to which all orders are tried in which they may stand, if those are not too many."""
_MOST_REGROUPED, _REGROUPED_DEVICES, _MOST_REGROUPINGS = 16, 24, 64
"""Devices up to which they are moved between groups, of all candidates together, and how many such moves."""
_FEWEST_SCHEDULED, _SCHEDULED_DEVICES = 6, 400
"""Proposals that are simulated with all schedules, or if that is more, as many as have so many devices."""
_MOST_PAIRS = 500_000
"""Pairs of stages of all candidates that are simulated together."""
MOST_CHUNKS = 4
_WITHIN_REACH = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One split: boundaries on a line, positions of the devices in the cluster, and its score.

    ``devices`` has one more per replica.
    """

    score: float
    line: int
    bounds: tuple[int, ...]
    devices: tuple[int, ...]
    mode: Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The space that is searched.

    Attributes:
        order: positions of the devices that must follow one another so.
        programs: for lines that were cut, by their identity; made once.
    """

    workload: Workload
    pricing: Pricing
    lines: Sequence[Line]
    schedules: Sequence[Schedule]
    order: tuple[int, ...] | None
    programs: dict[int, IntervalProgram] = field(default_factory=dict[int, IntervalProgram])

    def run(self, most_stages: int, most_replicas: int, most_chunks: int) -> list[Candidate]:
        """The best candidate of every pattern, microbatch count and schedule, the simplest first."""
        few = most_stages <= _MOST_PATTERNED
        tried = patterns(most_stages, most_replicas) if few else uniform(most_replicas)
        explored = [(pattern, winner) for pattern in tried for winner in self._explore(pattern)]
        proposed = [winner for pattern, winner in explored if not self._tries_all(pattern)]
        grouped = [] if few else self._grouped(most_stages, most_replicas)
        proposed = sorted([*proposed, *grouped], key=lambda candidate: candidate.score)
        refined = {candidate: self._refine(candidate) for candidate in proposed[:_REFINED]}
        found = [*(winner for _, winner in explored), *grouped]
        candidates = [refined.get(c, c) for c in found if c.score < np.inf]
        return candidates + self._interleaved(candidates, most_chunks)

    def _interleaved(self, candidates: Sequence[Candidate], most_chunks: int) -> list[Candidate]:
        """The devices of the best pipeline take turns, more and more often while that is faster."""
        pipelines = [
            c for c in candidates if c.mode.microbatches > 1 and len(c.bounds) == len(c.devices) + 1 > 2
        ]
        found: list[Candidate] = []
        if Schedule.INTERLEAVED not in self.schedules or not pipelines:
            return found
        best = min(pipelines, key=lambda candidate: candidate.score)
        line, devices, choice = self.lines[best.line], best.devices, best.mode.choice
        intervals = len(self._program(line).at_Q) - 1  # no more stages than these can be proposed
        for chunks in range(2, min(most_chunks, intervals // len(devices)) + 1):
            layout = Layout.pipeline(chunks * len(devices), best.mode.microbatches, chunks)
            mode = Mode(choice=choice, layout=layout, schedule=Schedule.INTERLEAVED)
            bounds_BN = self._program(line).propose(chunks * devices, mode)
            bounds_BN[-1] = line.length + 1
            devices_SN = np.repeat(np.array([chunks * devices]).T, bounds_BN.shape[1], axis=1)
            start = self._best(cut([line], [bounds_BN]), devices_SN, mode)
            start = replace(start, line=best.line)
            so_far = min(candidate.score for candidate in (*candidates, *found))
            # Moving boundaries of a good proposal gains little, and takes long with many stages.
            found.append(self._refine(start) if start.score < _WITHIN_REACH * so_far else start)
            if found[-1].score >= so_far:
                break
        return found

    def _grouped(self, most_stages: int, most_replicas: int) -> list[Candidate]:
        """What is proposed for many devices, the best with all schedules; fewer devices first."""
        rows = self._rows(most_stages)
        proposals = propose_groups(self.lines, self.pricing, rows, most_replicas, self.schedules[0])
        first = [(self._simulated(proposal, self.schedules[0]), proposal) for proposal in proposals]
        first.sort(key=lambda pair: pair[0].score)
        found = [candidate for candidate, _ in first]
        most = max(_FEWEST_SCHEDULED, _SCHEDULED_DEVICES // most_stages)
        for _, proposal in first[:most]:
            others = self._orders(proposal.pattern, self.workload.counts[proposal.choice])[1:]
            found += [self._simulated(proposal, schedule) for schedule in others]
        if self.order is None and most_stages <= _MOST_REGROUPED:
            found.sort(key=lambda candidate: candidate.score)
            likely = found[: max(_REGROUPED_DEVICES // most_stages, 1)]
            found += [self._regroup(candidate, most_stages, most_replicas) for candidate in likely]
        return sorted(found, key=lambda candidate: len(candidate.devices))

    def _regroup(self, candidate: Candidate, most_stages: int, most_replicas: int) -> Candidate:
        """With devices moved between groups while the step gets shorter, and the line cut anew."""
        classes = self._device_classes()
        while True:
            found = [candidate]
            changed = regroupings(candidate.devices, candidate.mode.layout.positions_S, classes)
            for groups in islice(changed, _MOST_REGROUPINGS):
                pattern = tuple(map(len, groups))
                if max(pattern) <= most_replicas and sum(pattern) <= most_stages:
                    found += self._cut_anew(candidate, pattern, tuple(d for group in groups for d in group))
            best = min(found, key=lambda other: other.score)
            if best.score >= candidate.score * _SHORTER:
                return candidate
            candidate = best

    def _cut_anew(self, candidate: Candidate, pattern: Pattern, devices: tuple[int, ...]) -> list[Candidate]:
        """The best cuts that are proposed for a pattern; none if a device would get no microbatch."""
        layout = self._layout(pattern, devices, candidate.mode.choice)
        line = self.lines[candidate.line]
        if layout is None or len(pattern) > line.length:
            return []
        mode = replace(candidate.mode, layout=layout)
        bounds_BN = self._program(line).propose(devices, mode)
        bounds_BN[-1] = line.length + 1
        splits = cut([line], [np.unique(bounds_BN, axis=1)], layout.positions_S)
        devices_SN = np.repeat(np.array(devices)[:, None], len(splits.line_N), axis=1)
        return [replace(self._best(splits, devices_SN, mode), line=candidate.line)]

    def _program(self, line: Line) -> IntervalProgram:
        if id(line) not in self.programs:
            self.programs[id(line)] = IntervalProgram(line, self.pricing)
        return self.programs[id(line)]

    def _simulated(self, proposal: Proposal, schedule: Schedule) -> Candidate:
        layout = self._layout(proposal.pattern, proposal.devices, proposal.choice)
        assert layout is not None, "every device of a group has a microbatch"
        mode = Mode(choice=proposal.choice, layout=layout, schedule=schedule)
        splits = cut([self.lines[proposal.line]], [np.array(proposal.bounds)[:, None]], layout.positions_S)
        found = self._best(splits, np.array(proposal.devices)[:, None], mode)
        return replace(found, line=proposal.line)

    def _rows(self, most_stages: int) -> list[tuple[int, ...]]:
        """Orders of the devices in which groups may stand: alike ones together, or unlike ones."""
        if self.order is not None:
            return [self.order] if len(self.order) == most_stages else self._sequences(most_stages)[:1]
        slowness_D = (self.workload.forward_s_CDO + self.workload.backward_s_CDO)[0].sum(axis=1)
        fastest = np.argsort(slowness_D, kind="stable")[:most_stages].tolist()
        kinds = device_kinds(self.workload, self.pricing)
        number = {
            device: [kinds[d] for d in fastest[:place]].count(kinds[device])
            for place, device in enumerate(fastest)
        }
        rows = [fastest, fastest[::-1], sorted(fastest), sorted(fastest, key=lambda device: number[device])]
        if most_stages <= _MOST_ARRANGED:
            rows += map(list, self._sequences(most_stages))
        classes = self._device_classes()
        return list({tuple(classes[device] for device in row): tuple(row) for row in rows}.values())

    def _orders(self, pattern: Pattern, count: int) -> Sequence[Schedule]:
        """Schedules that differ: with one microbatch, only zero-bubble does from the first."""
        if len(pattern) == 1:
            return self.schedules[:1]
        known = [s for s in self.schedules if s is not Schedule.INTERLEAVED] or self.schedules
        return [s for n, s in enumerate(known) if not n or count > 1 or s is Schedule.ZERO_BUBBLE]

    def _layout(self, pattern: Pattern, devices: tuple[int, ...], choice: int) -> Layout | None:
        """How replicas on these devices share the microbatches; None if one would get none."""
        work, count = self.workload, self.workload.counts[choice]
        seconds_D = (work.forward_s_CDO[choice] + work.backward_s_CDO[choice]).sum(axis=1)
        ends = list(accumulate(pattern))
        shares = [
            share_out(seconds_D[list(devices[end - number : end])], count)
            for number, end in zip(pattern, ends, strict=True)
        ]
        if min(map(min, shares)) == 0:
            return None
        return Layout(
            microbatches=count,
            positions_S=positions(pattern),
            runs_S=tuple(runs for group in shares for runs in deal(group, count)),
        )

    def _tries_all(self, pattern: Pattern) -> bool:
        cuts = comb(self.lines[0].length - 1, len(pattern) - 1)
        sequences = len(self._sequences(sum(pattern)))
        # Of patterns with replicas there are many, and what they lose to the best cut is little.
        most = _MOST_CUTS if max(pattern) == 1 else _MOST_CUTS_OF_REPLICAS
        return cuts * sequences <= most and cuts * self.lines[0].length <= _MOST_CELLS

    def _explore(self, pattern: Pattern) -> list[Candidate]:
        sequences, choices = self._sequences(sum(pattern)), range(len(self.workload.counts))
        layouts = [[self._layout(pattern, devices, choice) for devices in sequences] for choice in choices]
        if not any(layout for row in layouts for layout in row):
            return []
        if self._tries_all(pattern):
            every_BN = _all_bounds(self.lines[0].length, len(pattern))
            bounds = [every_BN] * len(self.lines)
            index_N, sequence_N = (
                axis.ravel() for axis in np.indices((len(self.lines) * every_BN.shape[1], len(sequences)))
            )
        else:
            bounds, index_N, sequence_N = self._proposals(pattern, sequences)
        splits = cut(self.lines, bounds, positions(pattern)).take(index_N)
        devices_SN = np.array(sequences).T[:, sequence_N]
        winners: list[Candidate] = []
        for choice, count in enumerate(self.workload.counts):
            row = layouts[choice]
            for schedule in self._orders(pattern, count):
                found: list[Candidate] = []
                for layout in dict.fromkeys(layout for layout in row if layout is not None):
                    chosen_N = np.flatnonzero(np.array([other == layout for other in row])[sequence_N])
                    mode = Mode(choice=choice, layout=layout, schedule=schedule)
                    found.append(self._best(splits.take(chosen_N), devices_SN[:, chosen_N], mode))
                if found:
                    winners.append(min(found, key=lambda candidate: candidate.score))
        return winners

    def _best(self, splits: Splits, devices_SN: IntArray, mode: Mode) -> Candidate:
        score_N = evaluate(self.pricing, splits, devices_SN, mode).score_N
        best = int(score_N.argmin())
        return Candidate(
            score=float(score_N[best]),
            line=int(splits.line_N[best]),
            bounds=tuple(splits.bounds_BN[:, best].tolist()),
            devices=tuple(devices_SN[:, best].tolist()),
            mode=mode,
        )

    def _proposals(
        self, pattern: Pattern, sequences: Sequence[tuple[int, ...]]
    ) -> tuple[list[IntArray], IntArray, IntArray]:
        """Distinct boundaries per line, and the pairs of boundaries (over all lines) and device sequence."""
        asked = [
            (number, devices, Mode(choice=choice, layout=layout, schedule=self.schedules[0]))
            for number, devices in enumerate(sequences)
            for choice in range(len(self.workload.counts))
            if (layout := self._layout(pattern, devices, choice)) is not None
        ]
        bounds: list[IntArray] = []
        pairs: list[IntArray] = []
        for line in self.lines:
            program = self._program(line)
            proposed = [program.propose(devices, mode) for _, devices, mode in asked]
            sequence_N = np.repeat([number for number, _, _ in asked], proposed[0].shape[1])
            proposed_BN = np.concatenate(proposed, axis=1)
            proposed_BN[-1] = line.length + 1
            distinct_BN, index_N = np.unique(proposed_BN, axis=1, return_inverse=True)
            offset = sum(b.shape[1] for b in bounds)
            bounds.append(distinct_BN)
            pairs.append(np.unique(np.stack([index_N.ravel() + offset, sequence_N]), axis=1))
        index_N, sequence_N = np.concatenate(pairs, axis=1)
        return bounds, index_N, sequence_N

    def _refine(self, candidate: Candidate) -> Candidate:
        heaviest = range(len(candidate.bounds) - 2)
        while True:
            line = self.lines[candidate.line]
            most = max(_MOST_PAIRS // len(candidate.devices) ** 2, 1)
            moved = [candidate.bounds, *islice(_moves(candidate.bounds, heaviest), most)]
            swapped = list(islice(self._swaps(candidate.devices), most))
            bounds_BN = np.array([*moved, *[candidate.bounds] * len(swapped)]).T
            devices_SN = np.array([*[candidate.devices] * len(moved), *swapped]).T
            positions_S = candidate.mode.layout.positions_S
            splits = cut([line], [bounds_BN], positions_S)
            found = evaluate(self.pricing, splits, devices_SN, candidate.mode)
            best = int(found.score_N.argmin())
            if found.score_N[best] >= candidate.score * _SHORTER:
                return candidate
            candidate = replace(
                candidate,
                score=float(found.score_N[best]),
                bounds=tuple(bounds_BN[:, best].tolist()),
                devices=tuple(devices_SN[:, best].tolist()),
            )
            heaviest = _by_load(positions_S, found.busy_s_SN[:, best])

    def _swaps(self, devices: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The same stages with two devices exchanged, or one that had nothing to do taken in."""
        if self.order is not None:
            return
        classes = self._device_classes()
        for stage, device in enumerate(devices):
            for other, kind in enumerate(classes):
                if kind != classes[device] and other not in devices[:stage]:
                    exchange = {device: other, other: device}
                    yield tuple(exchange.get(d, d) for d in devices)

    def _sequences(self, stages: int) -> list[tuple[int, ...]]:
        """Devices of the stages in pipeline order: all that differ, or likely ones if those are too many."""
        if self.order is not None:
            return list(combinations(self.order, stages))
        classes = self._device_classes()
        distinct = list(islice(arrangements(classes, stages), _MOST_SEQUENCES + 1))
        if len(distinct) <= _MOST_SEQUENCES:
            return distinct
        slowness_D = (self.workload.forward_s_CDO + self.workload.backward_s_CDO)[0].sum(axis=1)
        fastest = np.argsort(slowness_D, kind="stable")[:stages].tolist()
        largest = np.argsort(-self.pricing.capacity_bytes_D, kind="stable")[:stages].tolist()
        orders = (fastest, fastest[::-1], sorted(fastest), largest)
        return list(dict.fromkeys(tuple(order) for order in orders))

    def _device_classes(self) -> list[int]:
        """Equal numbers for devices that are interchangeable."""
        problem = self.pricing.problem
        if problem.cluster.links:
            return list(range(len(problem.cluster.devices)))
        return device_kinds(self.workload, self.pricing)


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The first that is as good as the best, which is the simplest: predictions are not exact to 0.1 %."""
    best = min(candidate.score for candidate in candidates)
    enough = best * _AS_GOOD if best < INFEASIBLE else best
    return next(candidate for candidate in candidates if candidate.score <= enough)


def _all_bounds(length: int, stages: int) -> IntArray:
    bounds = [(0, *cuts, length + 1) for cuts in combinations(range(1, length), stages - 1)]
    return np.array(bounds, dtype=np.int64).T


def _by_load(positions_S: Sequence[int], busy_s_S: Array) -> list[int]:
    """Inner boundaries, those of the busiest stages first."""
    busy_s_B = np.zeros(positions_S[-1] + 1)
    np.maximum.at(busy_s_B, list(positions_S), busy_s_S)
    return np.argsort(-np.maximum(busy_s_B[:-1], busy_s_B[1:]), kind="stable").tolist()


def _moves(bounds: tuple[int, ...], places: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Boundaries with one of them moved, or two neighbours.

    Args:
        places: inner boundaries, in the order in which they are moved.
    """
    inner, end = bounds[1:-1], bounds[-1] - 1
    alone = [(shift,) for shift in _SHIFTS]
    both = list(product(_PAIR_SHIFTS, repeat=2))
    for place in places:
        for shift in (*alone, *both):
            stop = place + len(shift)
            if stop > len(inner):
                continue
            moved = (*inner[:place], *map(add, inner[place:stop], shift), *inner[stop:])
            if all(a < b for a, b in pairwise((0, *moved, end))):
                yield (0, *moved, bounds[-1])
