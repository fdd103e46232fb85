"""In which order a stage works, and how long a training step then takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

from forescale.plan.partition_plan import Schedule, Stage, pipeline_positions, replica_groups, replicas
from forescale.plan.problem import Array


class Phase(StrEnum):
    """What a stage does with one microbatch.

    ``WEIGHT`` computes gradients of parameters, where the schedule takes that out of the backward.
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT = "weight"


Task = tuple[Phase, int]
"""One piece of a stage's work: a phase and the index of the microbatch."""

StageTask = tuple[int, Phase, int]
"""One piece of a device's work: which stage, and what of it."""


def in_flight(schedule: Schedule, stages_after: int, microbatches: int) -> int:
    """Most microbatches between their forward and their backward on a device's only stage.

    Args:
        stages_after: stages that follow it.


    1F1B (Narayanan et al., *PipeDream*, SOSP 2019; the flushing form of Narayanan et al.,
    *Memory-Efficient Pipeline-Parallel DNN Training*, ICML 2021) holds the fewest that keep every stage at
    work if transfers take no time and all stages take the same. Eager 1F1B (Zhuang et al., *On Optimizing the
    Communication of Model Parallelism*, MLSys 2023) holds one more per stage that follows, which hides
    transfers and uneven times. GPipe (Huang et al., NeurIPS 2019) holds all. ZB-H1 (Qi et al., *Zero Bubble
    Pipeline Parallelism*, ICLR 2024, §2.3) holds as many as 1F1B.
    """
    match schedule:
        case Schedule.ONE_F_ONE_B | Schedule.ZERO_BUBBLE:
            most = stages_after + 1
        case Schedule.EAGER_1F1B | Schedule.INTERLEAVED:
            most = 2 * stages_after + 1
        case Schedule.GPIPE:
            most = microbatches
    return min(most, microbatches)


@lru_cache(maxsize=1024)
def schedule_order(schedule: Schedule, stage: int, stages: int, microbatches: int) -> tuple[Task, ...]:
    """The order in which one stage works in a step.

    As many forwards as may be in flight, then a backward and a forward in turn, then the backwards that
    are left. Both run in the order of the microbatches.

    In ZB-H1, gradients of parameters wait, of as many microbatches as there are stages before this one; after
    each further backward those of the oldest are computed. All stages then keep something of equally many
    microbatches, and where tasks take F, B and W seconds, a step loses ``(stages - 1) * (F + B - W)``.

    Args:
        stage: position in the pipeline, ``0 <= stage < stages``.
    """
    ahead = in_flight(schedule, stages - stage - 1, microbatches)
    order: list[Task] = [(Phase.FORWARD, microbatch) for microbatch in range(ahead)]
    for microbatch in range(microbatches):
        order.append((Phase.BACKWARD, microbatch))
        if schedule is Schedule.ZERO_BUBBLE and microbatch >= stage:
            order.append((Phase.WEIGHT, microbatch - stage))
        if ahead + microbatch < microbatches:
            order.append((Phase.FORWARD, ahead + microbatch))
    if schedule is Schedule.ZERO_BUBBLE:
        order += [(Phase.WEIGHT, left) for left in range(max(microbatches - stage, 0), microbatches)]
    return tuple(order)


@lru_cache(maxsize=1024)
def interleaved_order(device: int, devices: int, chunks: int, microbatches: int) -> tuple[StageTask, ...]:
    """The order in which one of ``devices`` that take turns works through its stages.

    Interleaved 1F1B (Narayanan et al., *Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM*, SC 2021, §2.2): as many microbatches as there are devices go through one stage of the device
    after another, with forwards and backwards in turn once enough forwards are done. Fewer microbatches
    than a multiple of ``devices`` leave gaps.

    Args:
        device: place among the devices, ``0 <= device < devices``; its stages are ``device``,
            ``device + devices`` and so on.
        chunks: stages of each device.
    """
    most = -(-microbatches // devices) * devices
    rounds = product(range(0, most, devices), range(chunks), range(devices))
    forwards = [(chunk, first + within) for first, chunk, within in rounds]
    ahead = 2 * (devices - device - 1) + (chunks - 1) * devices
    order = [(chunk, Phase.FORWARD, microbatch) for chunk, microbatch in forwards[:ahead]]
    for number, (chunk, microbatch) in enumerate(forwards):
        if ahead + number < len(forwards):
            order.append((forwards[ahead + number][0], Phase.FORWARD, forwards[ahead + number][1]))
        order.append((chunks - 1 - chunk, Phase.BACKWARD, microbatch))
    return tuple(
        (device + chunk * devices, phase, microbatch)
        for chunk, phase, microbatch in order
        if microbatch < microbatches
    )


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
        runs_S: the microbatches each stage runs, ascending. Shards of one replica run the same.
        chunks: stages of each device, which then take turns.
    """

    microbatches: int
    positions_S: tuple[int, ...]
    runs_S: tuple[tuple[int, ...], ...]
    chunks: int = 1

    @classmethod
    def of(cls, stages: Sequence[Stage], microbatches: int) -> Layout:
        """Of a plan's stages in a step of so many microbatches."""
        runs_S: list[tuple[int, ...]] = []
        for group in map(replicas, replica_groups(stages)):
            dealt = deal(tuple(replica[0].share for replica in group), microbatches)
            runs_S += [runs for runs, replica in zip(dealt, group, strict=True) for _ in replica]
        return cls(
            microbatches=microbatches,
            positions_S=pipeline_positions(stages),
            runs_S=tuple(runs_S),
            chunks=len(stages) // len({stage.device for stage in stages}),
        )

    @classmethod
    def pipeline(cls, stages: int, microbatches: int, chunks: int = 1) -> Layout:
        """Of stages without replicas."""
        every = tuple(range(microbatches))
        return cls(
            microbatches=microbatches,
            positions_S=tuple(range(stages)),
            runs_S=(every,) * stages,
            chunks=chunks,
        )

    @property
    def devices(self) -> int:
        return len(self.positions_S) // self.chunks

    def stages_of(self, device: int) -> range:
        """The stages of a device, devices being numbered in the order of their first stages."""
        return range(device, len(self.positions_S), self.devices)

    def is_last(self, stage: int) -> bool:
        """Whether the stage ends the pipeline, so that it computes the loss."""
        return self.positions_S[stage] == self.positions_S[-1]

    def runners(self, position: int, microbatch: int) -> tuple[int, ...]:
        """The stages at a position that run a microbatch: the shards of one replica, in order."""
        return tuple(
            stage
            for stage, (place, runs) in enumerate(zip(self.positions_S, self.runs_S, strict=True))
            if place == position and microbatch in runs
        )

    def order(self, schedule: Schedule, stage: int) -> tuple[Task, ...]:
        """The order in which a stage works: that of a pipeline, of which each replica does its own part.

        Each replica that follows may have a microbatch in flight, and so may each other one of its own
        stage; replicas at the end need not, as nothing comes back to them.
        """
        agenda = self.agenda(schedule, stage % self.devices)
        return tuple((phase, microbatch) for own, phase, microbatch in agenda if own == stage)

    def agenda(self, schedule: Schedule, device: int) -> tuple[StageTask, ...]:
        """The order in which a device works through the tasks of all its stages."""
        return _agenda(schedule, self, device)

    def in_flight(self, schedule: Schedule, stage: int) -> int:
        """Most microbatches between their forward and their backward on a stage."""
        return _most_between(self.order(schedule, stage), Phase.FORWARD, Phase.BACKWARD)

    def waiting(self, schedule: Schedule, stage: int) -> int:
        """Most microbatches between their backward and the gradients of parameters, if those are apart."""
        order = self.order(schedule, stage)
        split = any(phase is Phase.WEIGHT for phase, _ in order)
        return _most_between(order, Phase.BACKWARD, Phase.WEIGHT) if split else 0


def _most_between(order: Sequence[Task], begin: Phase, end: Phase) -> int:
    most = now = 0
    for phase, _ in order:
        now += (phase is begin) - (phase is end)
        most = max(most, now)
    return most


@lru_cache(maxsize=1024)
def _agenda(schedule: Schedule, layout: Layout, device: int) -> tuple[StageTask, ...]:
    stage = device
    if layout.chunks > 1:
        return interleaved_order(device, layout.devices, layout.chunks, layout.microbatches)
    distinct = dict.fromkeys(zip(layout.positions_S, layout.runs_S, strict=True))  # shards count once
    stages, positions = len(distinct), [position for position, _ in distinct]
    place = stages - 1 if layout.is_last(stage) else positions.index(layout.positions_S[stage])
    own = frozenset(layout.runs_S[stage])
    whole = schedule_order(schedule, place, stages, layout.microbatches)
    return tuple((stage, phase, microbatch) for phase, microbatch in whole if microbatch in own)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimes:
    """What one training step is made of, for N candidate pipelines of S stages at once.

    Axes: S = stage (each replica), N = candidate. Where there are two S, the first sends and the second
    receives: activations of one microbatch go to later stages, their gradients to earlier ones.

    Attributes:
        forward_s_SN, backward_s_SN: one microbatch; the last stage's contain the loss.
        weight_s_SN: gradients of parameters of one microbatch, where the schedule has them apart.
        wire_s_SSN: time on a link that works beside the devices; ``-inf`` where nothing is sent.
        sending_s_SSN, receiving_s_SSN: time a transfer takes from each end; 0 where nothing is sent.
        shares_SSN: whether two stages hold one parameter (a tied one, or they are replicas), so that they
            sum its gradients.
        exchange_s_SN: time of a stage's sums of such gradients, once per step.
        reduction_s_N: time to agree on the gradients' global norm after all backwards; ``-inf``
            where no norm is needed and every stage updates its parameters as soon as it can.
        optimizer_s_SN: the update, once per step.
    """

    forward_s_SN: Array
    backward_s_SN: Array
    weight_s_SN: Array
    wire_s_SSN: Array
    sending_s_SSN: Array
    receiving_s_SSN: Array
    shares_SSN: npt.NDArray[np.bool_]
    exchange_s_SN: Array
    reduction_s_N: Array
    optimizer_s_SN: Array


def simulate_step(schedule: Schedule, layout: Layout, times: PipelineTimes) -> Array:
    """Seconds of one training step of every candidate, shape (N,), event by event.

    All devices start together and each works through its agenda. A task starts when its device is free and
    everything it reads has come. A transfer that occupies the devices delays the sender after its task and
    the receiver before its own, at the same time if the receiver is idle; one that does not queues behind
    earlier ones on its link while both ends compute.
    """
    stages, candidates = times.forward_s_SN.shape
    post = _Post(times, layout.devices)
    free_DN = [np.zeros(candidates) for _ in range(layout.devices)]
    runs_S = [frozenset(runs) for runs in layout.runs_S]
    running_M = [[s for s in range(stages) if m in runs_S[s]] for m in range(layout.microbatches)]
    for stage, phase, microbatch in _events(schedule, layout):
        device = stage % layout.devices
        if phase is Phase.WEIGHT:
            free_DN[device] = free_DN[device] + times.weight_s_SN[stage]
            continue
        forward = phase is Phase.FORWARD
        with_it = running_M[microbatch]
        earlier = [other for other in with_it if other < stage]
        later = [other for other in reversed(with_it) if other > stage]
        start_s_N = post.receive(stage, earlier if forward else later, microbatch, free_DN[device])
        end_s_N = start_s_N + (times.forward_s_SN if forward else times.backward_s_SN)[stage]
        nearest_first = reversed(later) if forward else reversed(earlier)
        free_DN[device] = post.send(stage, nearest_first, microbatch, end_s_N)
    return _finish(np.stack(free_DN), times)


class _Post:
    """Messages under way: when each was (or arrived as) ready to be taken by its receiver."""

    def __init__(self, times: PipelineTimes, devices: int) -> None:
        self._times = times
        self._devices = devices
        self._ready_s_N: dict[tuple[int, int, int], Array] = {}
        self._link_free_s_N: dict[tuple[int, int], Array] = {}
        self._used = _pairs(times.wire_s_SSN > -np.inf)
        self._wired = _pairs(times.wire_s_SSN != 0)
        self._occupying = _pairs(times.sending_s_SSN > 0)

    def receive(self, stage: int, sources: Iterable[int], microbatch: int, time_s_N: Array) -> Array:
        for source in sources:
            if (source, stage) in self._used:
                time_s_N = np.maximum(time_s_N, self._ready_s_N.pop((source, stage, microbatch)))
                if (source, stage) in self._occupying:
                    time_s_N = time_s_N + self._times.receiving_s_SSN[source, stage]
        return time_s_N

    def send(self, stage: int, targets: Iterable[int], microbatch: int, time_s_N: Array) -> Array:
        for target in targets:
            if (stage, target) not in self._used:
                continue
            ready_s_N = time_s_N
            if (stage, target) in self._wired:
                link = (stage % self._devices, target % self._devices)
                ready_s_N = np.maximum(time_s_N, self._link_free_s_N.get(link, -np.inf))
                ready_s_N = ready_s_N + self._times.wire_s_SSN[stage, target]
                self._link_free_s_N[link] = ready_s_N
            if (stage, target) in self._occupying:
                sending_s_N = self._times.sending_s_SSN[stage, target]
                # Nobody has received it before it is sent.
                ready_s_N = ready_s_N + np.maximum(
                    0.0, sending_s_N - self._times.receiving_s_SSN[stage, target]
                )
                time_s_N = time_s_N + sending_s_N
            self._ready_s_N[stage, target, microbatch] = ready_s_N
        return time_s_N


def _pairs(mask_SSN: npt.NDArray[np.bool_]) -> set[tuple[int, int]]:
    """Pairs of stages for which the mask holds in any candidate."""
    return {(source, target) for source, target in np.argwhere(mask_SSN.any(axis=2)).tolist()}


def _finish(end_s_DN: Array, times: PipelineTimes) -> Array:
    """Sum shared gradients, agree on the norm, update; the step ends when the last device has."""

    def by_device(value_SN: Array) -> Array:
        return value_SN.reshape(-1, *end_s_DN.shape).sum(axis=0)

    if times.shares_SSN.any():
        devices, candidates = end_s_DN.shape
        chunks = len(times.shares_SSN) // devices
        shares_DDN = times.shares_SSN.reshape(chunks, devices, chunks, devices, candidates).any(axis=(0, 2))
        holders_s_DN = np.where(shares_DDN, end_s_DN, -np.inf).max(axis=1)
        end_s_DN = np.maximum(end_s_DN, holders_s_DN) + by_device(times.exchange_s_SN)
    end_s_DN = np.maximum(end_s_DN, end_s_DN.max(axis=0) + times.reduction_s_N)
    return (end_s_DN + by_device(times.optimizer_s_SN)).max(axis=0)


@lru_cache(maxsize=1024)
def _events(schedule: Schedule, layout: Layout) -> tuple[StageTask, ...]:
    """All devices' tasks in an order in which everything a task may wait for comes before it."""
    agendas = [layout.agenda(schedule, device) for device in range(layout.devices)]
    last = layout.positions_S[-1]
    done = [0] * len(agendas)
    finished: set[tuple[int, Task]] = set()
    events: list[StageTask] = []
    while len(events) < sum(map(len, agendas)):
        for device, agenda in enumerate(agendas):
            while done[device] < len(agenda):
                stage, phase, microbatch = agenda[done[device]]
                position, task = layout.positions_S[stage], (phase, microbatch)
                giver = position - 1 if phase is Phase.FORWARD else position + 1
                waits = phase is not Phase.WEIGHT and 0 <= giver <= last
                if waits and (giver, task) not in finished:
                    break
                finished.add((position, task))
                done[device] += 1
                events.append((stage, phase, microbatch))
    return tuple(events)
