"""In which order a stage works, and how long a training step then takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from forescale.plan.partition_plan import Schedule, Stage, pipeline_positions, replica_groups
from forescale.plan.problem import Array


class Phase(StrEnum):
    """What a stage does with one microbatch."""

    FORWARD = "forward"
    BACKWARD = "backward"


Task = tuple[Phase, int]
"""One piece of a stage's work: a phase and the index of the microbatch."""


def in_flight(schedule: Schedule, stages_after: int, microbatches: int) -> int:
    """Most microbatches between their forward and their backward on a stage with so many after it.

    1F1B (Narayanan et al., *PipeDream*, SOSP 2019; the flushing form of Narayanan et al.,
    *Memory-Efficient Pipeline-Parallel DNN Training*, ICML 2021) holds the fewest that keep every stage at
    work if transfers take no time and all stages take the same. Eager 1F1B (Zhuang et al., *On Optimizing the
    Communication of Model Parallelism*, MLSys 2023) holds one more per stage that follows, which hides
    transfers and uneven times. GPipe (Huang et al., NeurIPS 2019) holds all.
    """
    match schedule:
        case Schedule.ONE_F_ONE_B:
            most = stages_after + 1
        case Schedule.EAGER_1F1B:
            most = 2 * stages_after + 1
        case Schedule.GPIPE:
            most = microbatches
    return min(most, microbatches)


@lru_cache(maxsize=1024)
def schedule_order(schedule: Schedule, stage: int, stages: int, microbatches: int) -> tuple[Task, ...]:
    """The order in which one stage runs its forwards and backwards in a step.

    As many forwards as may be in flight, then a backward and a forward in turn, then the backwards that
    are left. Both run in the order of the microbatches.

    Args:
        stage: position in the pipeline, ``0 <= stage < stages``.
    """
    ahead = in_flight(schedule, stages - stage - 1, microbatches)
    order: list[Task] = [(Phase.FORWARD, microbatch) for microbatch in range(ahead)]
    for microbatch in range(microbatches):
        order.append((Phase.BACKWARD, microbatch))
        if ahead + microbatch < microbatches:
            order.append((Phase.FORWARD, ahead + microbatch))
    return tuple(order)


@lru_cache(maxsize=1024)
def deal(shares: tuple[int, ...], microbatches: int) -> tuple[tuple[int, ...], ...]:
    """The microbatches of every replica, so many of each ``sum(shares)`` that follow each other.

    Each goes to the replica that is furthest behind its share, so that a step of fewer microbatches is
    shared in about the same proportion.
    """
    dealt: list[list[int]] = [[] for _ in shares]
    for microbatch in range(microbatches):
        behind = [
            share * (microbatch + 1) - len(own) * sum(shares)
            for share, own in zip(shares, dealt, strict=True)
        ]
        dealt[behind.index(max(behind))].append(microbatch)
    return tuple(map(tuple, dealt))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which stage runs which of a step's microbatches. Axis S: stages, every replica counts as one.

    Attributes:
        positions_S: place in the pipeline, ascending; replicas have the same.
        runs_S: the microbatches each stage runs, ascending.
    """

    microbatches: int
    positions_S: tuple[int, ...]
    runs_S: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, stages: Sequence[Stage], microbatches: int) -> Layout:
        """Of a plan's stages in a step of so many microbatches."""
        shares = [tuple(stage.share for stage in group) for group in replica_groups(stages)]
        return cls(
            microbatches=microbatches,
            positions_S=pipeline_positions(stages),
            runs_S=tuple(runs for group in shares for runs in deal(group, microbatches)),
        )

    @classmethod
    def pipeline(cls, stages: int, microbatches: int) -> Layout:
        """Of stages without replicas."""
        every = tuple(range(microbatches))
        return cls(microbatches=microbatches, positions_S=tuple(range(stages)), runs_S=(every,) * stages)

    def is_last(self, stage: int) -> bool:
        """Whether the stage ends the pipeline, so that it computes the loss."""
        return self.positions_S[stage] == self.positions_S[-1]

    def runner(self, position: int, microbatch: int) -> int:
        """The stage at a position that runs a microbatch."""
        return next(
            stage
            for stage, (place, runs) in enumerate(zip(self.positions_S, self.runs_S, strict=True))
            if place == position and microbatch in runs
        )

    def order(self, schedule: Schedule, stage: int) -> tuple[Task, ...]:
        """The order in which a stage works: that of a pipeline, of which each replica does its own part.

        Each device that follows may have a microbatch in flight, and so may each other replica; replicas at
        the end need not, as nothing comes back to them.
        """
        return _order(schedule, self, stage)

    def in_flight(self, schedule: Schedule, stage: int) -> int:
        """Most microbatches between their forward and their backward on a stage."""
        most = now = 0
        for phase, _ in self.order(schedule, stage):
            now += 1 if phase is Phase.FORWARD else -1
            most = max(most, now)
        return most


@lru_cache(maxsize=1024)
def _order(schedule: Schedule, layout: Layout, stage: int) -> tuple[Task, ...]:
    stages = len(layout.positions_S)
    place = stages - 1 if layout.is_last(stage) else layout.positions_S.index(layout.positions_S[stage])
    own = frozenset(layout.runs_S[stage])
    whole = schedule_order(schedule, place, stages, layout.microbatches)
    return tuple(task for task in whole if task[1] in own)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimes:
    """What one training step is made of, for N candidate pipelines of S stages at once.

    Axes: S = stage (each replica), N = candidate. Where there are two S, the first sends and the second
    receives: activations of one microbatch go to later stages, their gradients to earlier ones.

    Attributes:
        forward_s_SN, backward_s_SN: one microbatch; the last stage's contain the loss.
        wire_s_SSN: time on a link that works beside the devices; ``-inf`` where nothing is sent.
        occupied_s_SSN: time a transfer takes from both ends; 0 where nothing is sent.
        shares_SSN: whether two stages hold one parameter (a tied one, or they are replicas), so that they
            sum its gradients.
        exchange_s_SN: time of a stage's sums of such gradients, once per step.
        reduction_s_N: time to agree on the gradients' global norm after all backwards; ``-inf``
            where no norm is needed and every stage updates its parameters as soon as it can.
        optimizer_s_SN: the update, once per step.
    """

    forward_s_SN: Array
    backward_s_SN: Array
    wire_s_SSN: Array
    occupied_s_SSN: Array
    shares_SSN: npt.NDArray[np.bool_]
    exchange_s_SN: Array
    reduction_s_N: Array
    optimizer_s_SN: Array


def simulate_step(schedule: Schedule, layout: Layout, times: PipelineTimes) -> Array:
    """Seconds of one training step of every candidate, shape (N,), event by event.

    All stages start together and each works through its part of :func:`schedule_order`. A task starts when
    its stage is free and everything it reads has come. A transfer that occupies the devices delays the
    sender after its task and the receiver before its own, at the same time if the receiver is idle; one
    that does not queues behind earlier ones on its link while both ends compute.
    """
    stages, candidates = times.forward_s_SN.shape
    post = _Post(times)
    free_SN = [np.zeros(candidates) for _ in range(stages)]
    runs_S = [frozenset(runs) for runs in layout.runs_S]
    running_M = [[s for s in range(stages) if m in runs_S[s]] for m in range(layout.microbatches)]
    for stage, phase, microbatch in _events(schedule, layout):
        forward = phase is Phase.FORWARD
        with_it = running_M[microbatch]
        earlier = [other for other in with_it if other < stage]
        later = [other for other in reversed(with_it) if other > stage]
        start_s_N = post.receive(stage, earlier if forward else later, microbatch, free_SN[stage])
        end_s_N = start_s_N + (times.forward_s_SN if forward else times.backward_s_SN)[stage]
        nearest_first = reversed(later) if forward else reversed(earlier)
        free_SN[stage] = post.send(stage, nearest_first, microbatch, end_s_N)
    return _finish(np.stack(free_SN), times)


class _Post:
    """Messages under way: when each was (or arrived as) ready to be taken by its receiver."""

    def __init__(self, times: PipelineTimes) -> None:
        self._times = times
        self._ready_s_N: dict[tuple[int, int, int], Array] = {}
        self._link_free_s_N: dict[tuple[int, int], Array] = {}
        self._used = _pairs(times.wire_s_SSN > -np.inf)
        self._wired = _pairs(times.wire_s_SSN != 0)
        self._occupying = _pairs(times.occupied_s_SSN > 0)

    def receive(self, stage: int, sources: Iterable[int], microbatch: int, time_s_N: Array) -> Array:
        for source in sources:
            if (source, stage) in self._used:
                time_s_N = np.maximum(time_s_N, self._ready_s_N.pop((source, stage, microbatch)))
                if (source, stage) in self._occupying:
                    time_s_N = time_s_N + self._times.occupied_s_SSN[source, stage]
        return time_s_N

    def send(self, stage: int, targets: Iterable[int], microbatch: int, time_s_N: Array) -> Array:
        for target in targets:
            if (stage, target) not in self._used:
                continue
            ready_s_N = time_s_N
            if (stage, target) in self._wired:
                link = (stage, target)
                ready_s_N = np.maximum(time_s_N, self._link_free_s_N.get(link, -np.inf))
                ready_s_N = self._link_free_s_N[link] = ready_s_N + self._times.wire_s_SSN[link]
            self._ready_s_N[stage, target, microbatch] = ready_s_N
            if (stage, target) in self._occupying:
                time_s_N = time_s_N + self._times.occupied_s_SSN[stage, target]
        return time_s_N


def _pairs(mask_SSN: npt.NDArray[np.bool_]) -> set[tuple[int, int]]:
    """Pairs of stages for which the mask holds in any candidate."""
    return {(source, target) for source, target in np.argwhere(mask_SSN.any(axis=2)).tolist()}


def _finish(end_s_SN: Array, times: PipelineTimes) -> Array:
    """Sum shared gradients, agree on the norm, update; the step ends when the last stage has."""
    if times.shares_SSN.any():
        holders_s_SN = np.where(times.shares_SSN, end_s_SN, -np.inf).max(axis=1)
        end_s_SN = np.maximum(end_s_SN, holders_s_SN) + times.exchange_s_SN
    end_s_SN = np.maximum(end_s_SN, end_s_SN.max(axis=0) + times.reduction_s_N)
    return (end_s_SN + times.optimizer_s_SN).max(axis=0)


@lru_cache(maxsize=1024)
def _events(schedule: Schedule, layout: Layout) -> tuple[tuple[int, Phase, int], ...]:
    """All stages' tasks in an order in which everything a task may wait for comes before it."""
    orders = [layout.order(schedule, stage) for stage in range(len(layout.positions_S))]
    last = layout.positions_S[-1]
    done = [0] * len(orders)
    finished: set[tuple[int, Task]] = set()
    events: list[tuple[int, Phase, int]] = []
    while len(events) < sum(map(len, orders)):
        for stage, order in enumerate(orders):
            position = layout.positions_S[stage]
            while done[stage] < len(order):
                phase, microbatch = task = order[done[stage]]
                giver = position - 1 if phase is Phase.FORWARD else position + 1
                if 0 <= giver <= last and (giver, task) not in finished:
                    break
                finished.add((position, task))
                done[stage] += 1
                events.append((stage, phase, microbatch))
    return tuple(events)
