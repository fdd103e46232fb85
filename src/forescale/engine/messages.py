"""What an engine tells the training controller (events) and what it is asked for (commands).

Both are closed unions of small frozen dataclasses; match them with ``assert_never``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forescale.plan.partition_plan import PartitionPlan

Binding = Mapping[str, int]
"""Values of the graph's symbols for one whole batch, e.g. ``{"s0": 32, "s1": 256}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What one stage's worker measured in one step, in seconds of that step.

    Attributes:
        forward_s, backward_s, optimizer_s: time in which the stage computed.
        transfer_s: time spent handing over and taking tensors.
        wait_s: time spent waiting for other stages.
        cpu_s: CPU time the process used in the step.
        memory_bytes: peak of live tensor memory, 0 when not measured.
    """

    device: str
    forward_s: float
    backward_s: float
    optimizer_s: float
    transfer_s: float
    wait_s: float
    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The plan that runs first; ``next_step`` is the first step's number (not 0 after a resume)."""

    plan: PartitionPlan
    next_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchesAhead:
    """Batches that were looked at before they run: symbols' values for ``first_step``, and on."""

    first_step: int
    bindings: tuple[Binding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """One optimiser step is done everywhere.

    ``rows``: batch size; ``tokens``: elements of the model's first input.
    """

    step: int
    step_s: float
    loss: float
    binding: Binding
    rows: int
    tokens: int
    stages: tuple[StageReport, ...]
    predicted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Repartitioned:
    """A new plan took effect before ``step`` ran.

    Attributes:
        pause_s: longest time any worker neither computed nor could have.
        moved_bytes: parameters, buffers and optimiser state that changed hands.
    """

    step: int
    reason: str
    pause_s: float
    moved_bytes: int
    before: PartitionPlan
    after: PartitionPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten:
    """The state after ``step`` steps is complete at ``path``."""

    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited:
    """A worker process ended that should not have."""

    device: str
    cause: str


Event = RunStarted | BatchesAhead | StepFinished | Repartitioned | CheckpointWritten | WorkerExited


@dataclass(frozen=True, slots=True, kw_only=True)
class Repartition:
    """Run ``plan`` from the next step boundary on.

    Attributes:
        before_step: it must be in force when this step runs (None: as soon as possible).
        reason: one sentence for people.
    """

    plan: PartitionPlan
    reason: str
    before_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End the run: it cannot go on."""

    reason: str


Command = Repartition | Stop
