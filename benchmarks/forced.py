"""Runs given plans on the engine, without profiling or a controller."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import forescale as fs
from forescale.control.preparation import capture_task
from forescale.core.cluster import Cluster
from forescale.engine.messages import Event, Repartition, Repartitioned, StepFinished
from forescale.engine.train.engine import TrainingEngine
from forescale.engine.train.optimizer import OptimizerTemplate, optimizer_template
from forescale.engine.train.shards import Checkpoint
from forescale.graph.capture import CapturedModel
from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage, StagePrediction

_NOTHING = StagePrediction(
    forward_s=0.0, backward_s=0.0, transfer_s=0.0, optimizer_s=0.0, busy_s=0.0, memory_bytes=0
)


def cut_plan(graph: ModelGraph, cluster: Cluster, cuts: tuple[int, ...], microbatches: int) -> PartitionPlan:
    """Stages of captured order, cut before the operators ``cuts``."""
    bounds = (0, *cuts, len(graph.operators))
    stages = tuple(
        Stage(device=cluster.devices[i].name, operators=tuple(range(start, end)))
        for i, (start, end) in enumerate(pairwise(bounds))
    )
    return PartitionPlan(
        stages=stages,
        microbatches=microbatches,
        schedule=Schedule.ONE_F_ONE_B,
        prediction=Prediction(step_s=0.0, stages=(_NOTHING,) * len(stages)),
    )


@dataclass(slots=True)
class Outcome:
    steps: list[StepFinished] = field(default_factory=list[StepFinished])
    repartitions: list[Repartitioned] = field(default_factory=list[Repartitioned])

    def note(self, event: Event | None) -> None:
        if isinstance(event, StepFinished):
            self.steps.append(event)
        elif isinstance(event, Repartitioned):
            self.repartitions.append(event)


class ForcedRun:
    """An engine that is set up for a task, and takes plans by hand."""

    def __init__(self, engine: TrainingEngine, captured: CapturedModel, batches: Iterable[Any]) -> None:
        self.engine, self.captured, self.graph = engine, captured, captured.graph
        self.outcome = Outcome()
        self._batches = iter(batches)
        self._next = 0

    def start(self, plan: PartitionPlan, checkpoint: Checkpoint | None = None) -> None:
        self.engine.start(plan, checkpoint)

    def steps(
        self, count: int, plans: Mapping[int, PartitionPlan] | None = None, *, measure_memory: bool = False
    ) -> Outcome:
        """Runs ``count`` more steps; ``plans``: step number -> plan in force from that step on."""
        for number in range(self._next, self._next + count):
            if plans and number in plans:
                self.engine.execute(Repartition(plan=plans[number], reason="forced", before_step=number))
            self.engine.submit(number, next(self._batches), lambda _: 0.0, measure_memory=measure_memory)
            while self.engine.in_flight > 1:
                self.outcome.note(self.engine.next_event())
        while self.engine.in_flight or self.engine.busy:
            self.outcome.note(self.engine.next_event())
        self._next += count
        return self.outcome


@contextmanager
def forced_run(task: fs.TrainingTask, cluster: Cluster, directory: Path) -> Generator[ForcedRun]:
    """Context of a :class:`ForcedRun`; the task's batches are read into memory."""
    batches = list(task.batches)
    with TrainingEngine(cluster, directory) as engine:
        captured, _ = capture_task(task, batches[0])
        engine.set_up(task, captured, template_of(task, captured))
        yield ForcedRun(engine, captured, batches)
        engine.close()


def template_of(task: fs.TrainingTask, captured: CapturedModel) -> OptimizerTemplate:
    return optimizer_template(task, {name: captured.state[name] for name in captured.graph.parameters})
