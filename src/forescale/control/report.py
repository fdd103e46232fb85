"""What a training run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from forescale.control.costs import ProfiledCosts
from forescale.engine.messages import Repartitioned, StepFinished
from forescale.plan.partition_plan import PartitionPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """Everything that happened in a run.

    Attributes:
        steps: one entry per step, in order.
        repartitions: changes of plan, in order.
        plans: the first plan, then every plan that was switched to.
        costs: what the plans were made from.
        overhead_s: time the adaptation machinery took in the coordinator, in total.
        log_path: events and commands, for ``forescale replay``.
        checkpoint: the last complete checkpoint.
    """

    steps: tuple[StepFinished, ...]
    repartitions: tuple[Repartitioned, ...]
    plans: tuple[PartitionPlan, ...]
    costs: ProfiledCosts
    overhead_s: float
    log_path: Path
    checkpoint: Path | None
    _state: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(step.loss for step in self.steps)

    @property
    def step_s(self) -> tuple[float, ...]:
        return tuple(step.step_s for step in self.steps)

    @property
    def predicted_s(self) -> tuple[float, ...]:
        return tuple(step.predicted_s for step in self.steps)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model under its original names, for the plain model's ``load_state_dict``."""
        return dict(self._state)
