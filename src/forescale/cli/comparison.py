"""Runs side by side: figures of a stretch of steps, and what a change of plan was worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forescale.control.report import TrainingReport
    from forescale.engine.messages import StepFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A named stretch of a run: the steps from ``first_step`` to ``end_step``, that one excluded."""

    name: str
    first_step: int
    end_step: int

    def of(self, run: TrainingReport) -> tuple[StepFinished, ...]:
        """The run's steps in it."""
        return tuple(step for step in run.steps if self.first_step <= step.step < self.end_step)


def total_s(steps: Sequence[StepFinished]) -> float:
    return sum(step.step_s for step in steps)


def tokens_per_s(steps: Sequence[StepFinished]) -> float:
    """Mean throughput; 0 when there are no steps."""
    duration_s = total_s(steps)
    return sum(step.tokens for step in steps) / duration_s if duration_s else 0.0


def final_loss(run: TrainingReport) -> float:
    """Mean of the last eight losses: a single batch says little."""
    last = run.losses[-8:]
    return sum(last) / len(last)


def saved_s(run: TrainingReport, other: TrainingReport) -> tuple[float, ...]:
    """Per repartition of ``run``: seconds by which it was faster than ``other`` until the next.

    The repartition's own cost is inside. Steps that only one of the runs has do not count.
    """
    other_s = {step.step: step.step_s for step in other.steps}
    bounds = [*(change.step for change in run.repartitions), run.steps[-1].step + 1]
    return tuple(
        sum(
            other_s[step.step] - step.step_s
            for step in run.steps
            if first <= step.step < end and step.step in other_s
        )
        for first, end in pairwise(bounds)
    )
