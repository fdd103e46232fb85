"""The planner's answer: which operators run where, and what that is predicted to take."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Schedule(StrEnum):
    """Order of a stage's forwards and backwards."""

    ONE_F_ONE_B = "1f1b"
    EAGER_1F1B = "eager-1f1b"
    GPIPE = "gpipe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Operators that run together on one device.

    Attributes:
        operators: indices into ``graph.operators``, ascending (which is the order they run in).
        recompute: keep only the stage's inputs and run the forward again in the backward.
    """

    device: str
    operators: tuple[int, ...]
    recompute: bool = False


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

    The stages' order is topological: a tensor only travels from a stage to a later one.
    """

    stages: tuple[Stage, ...]
    microbatches: int
    schedule: Schedule
    prediction: Prediction
    rationale: tuple[str, ...] = ()
