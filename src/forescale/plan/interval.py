"""Good places to cut a line that has too many of them to try all: exact interval dynamic programming.

A pipeline of M microbatches takes about ``sum(w) + (M - 1) * max(w)``, with ``w`` a stage's seconds per
microbatch, transfers included (Huang et al., *GPipe*, 2019, §2.3). For a bound on ``max(w)``, dynamic
programming over (boundary, stages behind it) finds the least ``sum(w)`` (in the manner of Narayanan et
al., *PipeDream*, SOSP 2019, §3.1); the bounds tried start at the least possible one, found by the same
recursion with ``max`` for ``+``. What is proposed here is then judged by the simulated step.

Axes: Q = boundary on the coarse line, K = interval, T = bound; those of :mod:`forescale.plan.line`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.plan.evaluation import INFEASIBLE, Mode, Pricing, recompute_where_needed
from forescale.plan.line import Line
from forescale.plan.memory import footprint
from forescale.plan.problem import Array
from forescale.plan.workload import IntArray

_BOUNDARIES = 80
_LEAST_S = 1e-12
_SLACK_T1 = np.array([[1.0], [1.01], [1.03], [1.08], [1.2], [1.5], [np.inf]])


class IntervalProgram:
    """The dynamic programme on one line, coarsened to at most 80 intervals between likely cuts."""

    def __init__(self, line: Line, pricing: Pricing) -> None:
        self._pricing = pricing
        self._at_Q = _likely_cuts(line)
        self._length = len(self._at_Q) - 1
        coarse_O = np.searchsorted(self._at_Q[1:-1], line.position_O[:-1], side="right")
        coarse = Line(line.workload, coarse_O.tolist(), self._length)
        self._start_K, self._end_K = np.triu_indices(self._length + 1, k=1)
        last_K = self._end_K == self._length
        self._spans = coarse.spans(self._start_K, self._end_K + last_K)

    def propose(self, devices: Sequence[int], mode: Mode) -> IntArray:
        """Boundaries on the line of stages on these devices (of all replicas), shape (B, T)."""
        places = range(mode.layout.positions_S[-1] + 1)
        layers = [self._layer(devices, place, mode) for place in places]
        least = _at_end(self._length)
        for layer in reversed(layers):
            least = np.maximum(layer.load_s_QQ, least).min(axis=1)
        bound_s_T11 = least[0] * _SLACK_T1[:, :, None]
        best_TQ = np.broadcast_to(_at_end(self._length), (len(_SLACK_T1), self._length + 1))
        choices: list[IntArray] = []
        for layer in reversed(layers):
            allowed_TQQ = np.where(layer.load_s_QQ <= bound_s_T11, layer.total_s_QQ, np.inf)
            through_TQQ = allowed_TQQ + best_TQ[:, None, :]
            choices.append(through_TQQ.argmin(axis=2))
            best_TQ = np.take_along_axis(through_TQQ, choices[-1][..., None], axis=2)[..., 0]
        boundary_T = np.zeros(len(_SLACK_T1), dtype=np.int64)
        bounds = [boundary_T]
        for next_TQ in reversed(choices):
            boundary_T = next_TQ[np.arange(len(boundary_T)), boundary_T]
            bounds.append(boundary_T)
        return self._at_Q[np.stack(bounds)]

    def _layer(self, devices: Sequence[int], place: int, mode: Mode) -> _Layer:
        """What every interval would cost at this place: if it does not fit, more than any that does.

        Replicas together take the fraction of the time in which one of them is done.
        """
        stages = [stage for stage, other in enumerate(mode.layout.positions_S) if other == place]
        alone = [self._alone(devices, stage, mode) for stage in stages]
        load_K = alone[0][0]
        if len(stages) > 1:
            load_K = 1 / sum(1 / np.maximum(time_K, _LEAST_S) for time_K, _, _ in alone)
        wire_K = alone[0][1] / len(stages)
        load_K = load_K + self._closing_s_K(devices, stages) / mode.microbatches
        load_K = load_K + np.max([excess_K for _, _, excess_K in alone], axis=0)
        return _Layer(load_s_QQ=self._square(load_K), total_s_QQ=self._square(load_K + wire_K))

    def _closing_s_K(self, devices: Sequence[int], stages: Sequence[int]) -> Array:
        """Seconds once per step: replicas sum their gradients, and the parameters are updated."""
        pricing, trainable_bytes_K = self._pricing, self._spans.trainable_bytes_K
        places = [devices[stage] for stage in stages]
        closing_s_K = trainable_bytes_K * pricing.problem.optimizer_s_per_byte_D[places].max()
        if len(places) > 1:
            unit_s = pricing.unit_s_DD[np.ix_(places, places)][~np.eye(len(places), dtype=bool)].max()
            sent = 2 * (len(places) - 1) / len(places) * (1 + pricing.occupies_DD[places[0], places[1]])
            closing_s_K = closing_s_K + sent * unit_s * trainable_bytes_K
        return closing_s_K

    def _alone(self, devices: Sequence[int], stage: int, mode: Mode) -> tuple[Array, Array, Array]:
        """Seconds per microbatch of a stage and of its links, and the penalty for what does not fit."""
        pricing, spans, choice = self._pricing, self._spans, mode.choice
        device = devices[stage]
        bytes_K = footprint(
            spans,
            choice,
            microbatches=mode.microbatches,
            in_flight_K=mode.layout.in_flight(mode.schedule, stage),
            waiting_K=mode.layout.waiting(mode.schedule, stage),
            optimizer_state_ratio=pricing.problem.optimizer_state_ratio,
        )
        recompute_K = recompute_where_needed(bytes_K, pricing.capacity_bytes_D[device])
        needed_K = np.where(recompute_K, bytes_K.recomputed_bytes_K, bytes_K.peak_bytes_K)
        excess_K = np.maximum(needed_K - pricing.capacity_bytes_D[device], 0)
        load_K = (
            spans.forward_s_CDK[choice, device] * (1 + recompute_K) + spans.backward_s_CDK[choice, device]
        )
        wire_K = np.zeros_like(load_K)
        for other, size_bytes_K in self._neighbours(devices, stage, mode):
            transfer_K = 2 * (size_bytes_K > 0) * pricing.latency_s_DD[device, other]
            transfer_K = transfer_K + 2 * size_bytes_K * pricing.unit_s_DD[device, other]
            if pricing.occupies_DD[device, other]:
                load_K = load_K + transfer_K
            else:
                wire_K = wire_K + transfer_K / 2  # both ends count it
        return load_K, wire_K, np.where(excess_K > 0, INFEASIBLE + excess_K, 0)

    def _neighbours(self, devices: Sequence[int], stage: int, mode: Mode) -> list[tuple[int, Array]]:
        """Devices before and after a stage, with the bytes exchanged as if all went to and came from them."""
        positions_S, spans = mode.layout.positions_S, self._spans
        before, after = positions_S.index(positions_S[stage]) - 1, stage
        while after < len(devices) and positions_S[after] == positions_S[stage]:
            after += 1
        found: list[tuple[int, Array]] = []
        if before >= 0:
            found.append((devices[before], spans.received_bytes_CK[mode.choice]))
        if after < len(devices):
            found.append((devices[after], spans.sent_bytes_CK[mode.choice]))
        return found

    def _square(self, value_K: Array) -> Array:
        value_QQ = np.full((self._length + 1, self._length + 1), np.inf)
        value_QQ[self._start_K, self._end_K] = value_K
        return value_QQ


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Seconds per microbatch of interval ``[i, j)`` as one certain stage; inf where there is none."""

    load_s_QQ: Array
    total_s_QQ: Array


def _at_end(length: int) -> Array:
    cost_Q = np.full(length + 1, np.inf)
    cost_Q[length] = 0.0
    return cost_Q


def _likely_cuts(line: Line) -> IntArray:
    """Boundaries of a coarse line, 0 and P among them: of every part of the work the cheapest cut."""
    if line.length <= _BOUNDARIES:
        return np.arange(line.length + 1)
    start_P = np.arange(line.length)
    spans = line.spans(start_P, start_P + 1)
    work_P = (spans.forward_s_CDK + spans.backward_s_CDK).mean(axis=(0, 1))
    # As much again for every operator, so that stretches of cheap ones are cut too.
    part_P = np.cumsum(work_P + work_P.mean())
    part_P = np.minimum((part_P / part_P[-1] * _BOUNDARIES).astype(np.int64), _BOUNDARIES - 1)
    cuts_P, bytes_P = start_P[1:], line.crossing_bytes_P()[1 : line.length]
    by_bytes = np.lexsort((bytes_P, part_P[1:]))
    first = np.append(True, np.diff(part_P[1:][by_bytes]) > 0)
    return np.array([0, *cuts_P[by_bytes][first].tolist(), line.length], dtype=np.int64)
