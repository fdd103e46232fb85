"""The best pipeline of stages whose loads are given: exact dynamic programming over pairs of downsets.

Tarnawski et al., *Piper*, NeurIPS 2021, §4, over fewer downsets and from the last stage to the first, so that
the samples in flight in a stage, which depend on the stages behind it, are known when it is added.

Axes: K = devices used, at most; S = sum of data-parallel degrees, at most; F = downset; P = pair of downsets;
Y = samples in flight - 1; J = pair with the downset at hand as the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.plan.joint.downsets import Downsets
from forescale.plan.joint.problem import JointProblem
from forescale.plan.joint.tables import StageLoads
from forescale.plan.placement.problem import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class LineStage:
    """A stage of the pipeline: which kind, which pair of downsets, and how many samples in flight."""

    kind: int
    pair: int
    in_flight: int


def best_line(
    problem: JointProblem,
    sets: Downsets,
    kinds: Sequence[StageLoads],
    load_YP_of: Sequence[Array],
    *,
    below: float,
) -> tuple[float, list[LineStage]]:
    """The smallest longest load and its stages; infinite if none is below ``below``.

    Args:
        load_YP_of: for each kind, loads that do not fall as more samples are in flight.
    """
    tables = [
        _Moves(problem, sets, kind, load_YP, below, counts_devices=max(problem.tensor_degrees) > 1)
        for kind, load_YP in zip(kinds, load_YP_of, strict=True)
    ]
    # With one device per replica, the sum of the degrees counts the devices.
    devices = problem.devices if max(problem.tensor_degrees) > 1 else 0
    last = len(sets.member_FN) - 1
    load_FKS = np.full((last + 1, devices + 1, problem.most_replicas + 1), np.inf)
    load_FKS[last] = 0.0
    for first in range(last - 1, -1, -1):
        best_KS = load_FKS[first].copy()
        for moves in tables:
            moves.improve(best_KS, load_FKS, first)
        np.minimum.accumulate(best_KS, axis=0, out=best_KS)
        load_FKS[first] = np.minimum.accumulate(best_KS, axis=1)
    load = float(load_FKS[0, -1, -1])
    return load, _traced(tables, load_FKS) if np.isfinite(load) else []


class _Moves:
    """Stages of one kind whose load is below a limit."""

    def __init__(
        self,
        problem: JointProblem,
        sets: Downsets,
        kind: StageLoads,
        load_YP: Array,
        below: float,
        *,
        counts_devices: bool,
    ) -> None:
        self.replicas = kind.replicas
        self.devices = kind.devices if counts_devices else 0
        (self._kept_P,) = np.nonzero(load_YP[0] < below)
        in_flight_S = -(-np.arange(self.replicas, problem.most_replicas + 1) // self.replicas)
        load_PS = load_YP.T[self._kept_P][:, in_flight_S - 1]
        self._load_PS = np.where(load_PS < below, load_PS, np.inf)
        self._larger_P = sets.larger_P[self._kept_P]
        self._begin_F = np.searchsorted(sets.smaller_P[self._kept_P], np.arange(len(sets.member_FN) + 1))

    def improve(self, best_KS: Array, load_FKS: Array, first: int) -> None:
        """Lowers ``best_KS`` by what a stage that begins with a downset can reach."""
        begin, end = self._begin_F[first], self._begin_F[first + 1]
        if begin == end:
            return
        rest_JKS = load_FKS[:, : load_FKS.shape[1] - self.devices, : load_FKS.shape[2] - self.replicas]
        rest_JKS = rest_JKS[self._larger_P[begin:end]]
        np.maximum(rest_JKS, self._load_PS[begin:end, None], out=rest_JKS)
        target_KS = best_KS[self.devices :, self.replicas :]
        np.minimum(target_KS, rest_JKS.min(axis=0), out=target_KS)

    def reaching(self, load_FKS: Array, at: tuple[int, int, int]) -> tuple[float, int, int] | None:
        """The best stage from a state: what it reaches, its pair and its second downset."""
        devices, degrees, first = at
        begin, end = self._begin_F[first], self._begin_F[first + 1]
        if begin == end or devices < self.devices or degrees < self.replicas:
            return None
        larger_J = self._larger_P[begin:end]
        stage_J = self._load_PS[begin:end, degrees - self.replicas]
        reached_J = np.maximum(load_FKS[larger_J, devices - self.devices, degrees - self.replicas], stage_J)
        best = int(reached_J.argmin())
        return float(reached_J[best]), int(self._kept_P[begin + best]), int(larger_J[best])


def _traced(tables: Sequence[_Moves], load_FKS: Array) -> list[LineStage]:
    """Walks along the stages that make the best load."""
    last = len(load_FKS) - 1
    # The smallest sum of degrees with that load: the samples in flight are then exact.
    degrees = int(load_FKS[0, -1].argmin())
    devices, first = load_FKS.shape[1] - 1, 0
    stages: list[LineStage] = []
    while first != last:
        reached = [moves.reaching(load_FKS, (devices, degrees, first)) for moves in tables]
        kind = min(range(len(tables)), key=lambda kind: (reached[kind] or (np.inf,))[0])
        found = reached[kind]
        assert found is not None, "a state with a finite load has a stage"
        moves = tables[kind]
        stages.append(LineStage(kind=kind, pair=found[1], in_flight=-(-degrees // moves.replicas)))
        devices, degrees, first = devices - moves.devices, degrees - moves.replicas, found[2]
    return stages
