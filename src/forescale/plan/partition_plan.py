"""The planner's answer: which operators run where, and what that is predicted to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby


class Schedule(StrEnum):
    """Order of a stage's forwards and backwards.

    ``interleaved-1f1b`` lets every device run several stages. ``zero-bubble`` computes gradients of
    parameters apart from the rest of the backwards, and later.
    """

    ONE_F_ONE_B = "1f1b"
    EAGER_1F1B = "eager-1f1b"
    GPIPE = "gpipe"
    INTERLEAVED = "interleaved-1f1b"
    ZERO_BUBBLE = "zero-bubble"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One device's part of the operators that several devices split between them: tensor parallelism.

    Attributes:
        index: which part it is, from 0.
        weights: sizes of all the parts, in proportion; each at least 1.
    """

    index: int
    weights: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Operators that run together on one device.

    Stages that follow each other with the same operators are replicas: they share the microbatches of a
    step, and sum their gradients. A replica may be several stages, the shards of its operators in order: they
    run the same microbatches together.

    Attributes:
        operators: indices into ``graph.operators``, ascending (which is the order they run in).
        recompute: keep only the stage's inputs and run the forward again in the backward.
        share: of the microbatches, in proportion to the other replicas' shares; at least 1. The shards of
            one replica say the same.
        shard: which part of its operators the device runs; None if it runs them whole.
    """

    device: str
    operators: tuple[int, ...]
    recompute: bool = False
    share: int = 1
    shard: Shard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """Per stage: seconds of one microbatch (forward, backward), seconds per step (the rest), bytes."""

    forward_s: float
    backward_s: float
    transfer_s: float
    optimizer_s: float
    busy_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    step_s: float
    stages: tuple[StagePrediction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """Stages in pipeline order, with the predicted cost and the reasons.

    The stages' order is topological: a tensor only travels from a stage to a later one that is no replica.
    Under ``interleaved-1f1b`` the devices take turns, so that each has several stages: 0, 1, 0, 1.
    """

    stages: tuple[Stage, ...]
    microbatches: int
    schedule: Schedule
    prediction: Prediction
    rationale: tuple[str, ...] = ()


def replica_groups(stages: Sequence[Stage]) -> tuple[tuple[Stage, ...], ...]:
    """The pipeline's stages in order, each with all its replicas."""
    return tuple(tuple(group) for _, group in groupby(stages, lambda stage: stage.operators))


def pipeline_positions(stages: Sequence[Stage]) -> tuple[int, ...]:
    """Place of every stage in the pipeline, from 0; replicas have the same."""
    return tuple(place for place, group in enumerate(replica_groups(stages)) for _ in group)


def shards_of(group: Sequence[Stage]) -> int:
    """In how many shards each replica of a group is split."""
    return len(group[0].shard.weights) if group[0].shard else 1


def replicas(group: Sequence[Stage]) -> tuple[tuple[Stage, ...], ...]:
    """The replicas of a group, each with all its shards."""
    shards = shards_of(group)
    return tuple(tuple(group[first : first + shards]) for first in range(0, len(group), shards))


def shards_with(stages: Sequence[Stage], index: int) -> tuple[Stage, ...]:
    """The shards of a stage's replica in order; the stage alone if it is not split."""
    every = (replica for group in replica_groups(stages) for replica in replicas(group))
    return next(replica for replica in every if stages[index] in replica)
