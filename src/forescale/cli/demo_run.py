"""Training while real processes compete for one device, twice: with and without adaptation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from forescale.cli.comparison import Phase
from forescale.cli.competition import Competition
from forescale.control.report import TrainingReport
from forescale.control.run import train
from forescale.core.cluster import Cluster
from forescale.engine.messages import Event, Repartitioned, StepFinished
from forescale.engine.train.task import TrainingTask

LEAST_STEPS = 32
MOST_STEPS = 120

_SLOW_FRACTION = 0.42
"""Of its own speed, what a device shall have left; above it one more process competes. With half of it left,
replicas that share out the microbatches are best for short sequences as for long ones."""
_OBSERVED_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What happens when: ``slow_from`` the competition begins, ``long_from`` sequences are twice as long."""

    steps: int
    slow_from: int
    long_from: int

    @classmethod
    def of(cls, steps: int) -> Course:
        return cls(steps=steps, slow_from=steps // 4, long_from=steps * 68 // 100)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(name="steady", first_step=0, end_step=self.slow_from),
            Phase(name="slowed", first_step=self.slow_from, end_step=self.long_from),
            Phase(name="slowed, long", first_step=self.long_from, end_step=self.steps),
        )

    @classmethod
    def within(cls, budget_s: float, step_s: float, long_step_s: float) -> Course:
        """As many steps as two runs have time for.

        Args:
            step_s, long_step_s: a step before and after the sequences grow, while nothing competes.
        """
        # A device at a third of its speed: the whole is slower by 1.6 when the model moves, by 3 if not.
        slowed = 1.6 + 3.0
        course = cls.of(1000)
        mean_s = sum(
            factor * duration_s * (phase.end_step - phase.first_step) / course.steps
            for phase, factor, duration_s in zip(
                course.phases, (2.0, slowed, slowed), (step_s, step_s, long_step_s), strict=True
            )
        )
        return cls.of(min(max(int(budget_s / mean_s), LEAST_STEPS), MOST_STEPS))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestedRun:
    """A run under competition; ``competitors`` of them (values) ran from certain steps on (keys)."""

    report: TrainingReport
    competitors: Mapping[int, int]


def train_contested(
    task: TrainingTask,
    cluster: Cluster,
    course: Course,
    directory: Path,
    *,
    like: ContestedRun | None = None,
    on_event: Callable[[Event], None] = lambda _: None,
    on_competitor: Callable[[int, str], None] = lambda *_: None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ContestedRun:
    """Trains while real processes compete for the last device, from ``course.slow_from`` on to the end.

    Args:
        like: without it, the run adapts, and as many processes compete as it takes to slow the device
            down; with it, that run's first plan stays, and they compete as they did then.
        on_competitor: called with their number and the device's name when there is one more.
    """
    device = cluster.devices[-1]
    with Competition(device.cores[0]) as competition:
        pressure = _Pressure(competition, device.name, course.slow_from, like.competitors if like else None)

        def note(event: Event) -> None:
            on_event(event)
            if pressure.take(event):
                on_competitor(len(competition.pids), device.name)

        report = train(
            task,
            steps=course.steps,
            devices=cluster,
            adapt=like is None,
            plan=like.report.plans[0] if like else None,
            directory=directory,
            on_event=note,
            on_progress=on_progress,
        )
    return ContestedRun(report=report, competitors=pressure.competitors)


class _Pressure:
    """Lets processes compete for a device until it is slow enough, or as they did in another run.

    Args:
        known: the competitors of that run.
    """

    def __init__(
        self, competition: Competition, device: str, slow_from: int, known: Mapping[int, int] | None
    ) -> None:
        self._competition = competition
        self._device = device
        self._slow_from = slow_from
        self._known = known
        self._alone_s: list[float] = []
        self._contested_s: list[float] = []
        self.competitors: dict[int, int] = {}

    def take(self, event: Event) -> bool:
        """Whether it was time to start a process, which it did."""
        if isinstance(event, Repartitioned):
            # Another part of the model: its seconds say nothing about what the device has lost.
            self._alone_s.clear()
            self._contested_s.clear()
        if not isinstance(event, StepFinished):
            return False
        following = event.step + 1
        due = self._measured(event) if self._known is None else following in self._known
        if due:
            self._competition.add()
            self._contested_s.clear()
            self.competitors[following] = len(self._competition.pids)
        return due

    def _measured(self, event: StepFinished) -> bool:
        """Whether one more process is needed, from what the device took for this step and those before."""
        compute_s = sum(r.forward_s + r.backward_s for r in event.stages if r.device == self._device)
        following = event.step + 1
        (self._alone_s if event.step < self._slow_from else self._contested_s).append(compute_s)
        if following == self._slow_from:
            return True
        # The first contested step may have begun before the process did.
        if not self._alone_s or len(self._contested_s) != _OBSERVED_STEPS + 1:
            return False
        return median(self._alone_s) > _SLOW_FRACTION * median(self._contested_s[1:])
