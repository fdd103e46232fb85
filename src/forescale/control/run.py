"""``train``: capture, profile, plan, run; the thin loop between the pure controller and the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forescale.control.costs import ProfiledCosts
from forescale.control.interrupts import Interrupts
from forescale.control.log import Header, encode
from forescale.control.planner import Planner
from forescale.control.policy import Policy
from forescale.control.preparation import Progress, batches_from, prepare
from forescale.control.report import TrainingReport
from forescale.control.state import ControlConfig, ControlState
from forescale.control.training import step as control_step
from forescale.core.clock import SystemClock
from forescale.core.cluster import Cluster
from forescale.core.errors import CheckpointMismatch, InvalidInput, NonFiniteLoss, RunFailed, WorkerLost
from forescale.engine.messages import (
    BatchesAhead,
    CheckpointWritten,
    Event,
    Repartition,
    Repartitioned,
    RunStarted,
    StepFinished,
    Stop,
    WorkerExited,
)
from forescale.engine.runlog import RunLog
from forescale.engine.train.engine import TrainingEngine
from forescale.engine.train.shards import Checkpoint, latest, remove_partial
from forescale.engine.train.task import Batch, TrainingTask
from forescale.plan.partition_plan import PartitionPlan
from forescale.profile.batches import LookAhead
from forescale.profile.devices import find_cluster

# One step runs while the next is queued: no worker ever waits for the coordinator.
_IN_FLIGHT = 2
_LOG = "log.jsonl"
_NOTICE_S = 0.5  # within which Ctrl-C is noticed, even if no worker answers any more


def train(  # noqa: PLR0913 - the public entry; all but the task are keywords
    task: TrainingTask,
    *,
    steps: int,
    devices: int | Sequence[str] | Cluster | None = None,
    adapt: bool = True,
    directory: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    plan: PartitionPlan | None = None,
    policy: Policy | None = None,
    look_ahead: int = 8,
    on_event: Callable[[Event], None] | None = None,
    on_progress: Progress | None = None,
) -> TrainingReport:
    """Trains a model over several devices, and moves parts of it between them while it trains.

    The model is trained in place: its parameters and buffers hold the result afterwards.

    Args:
        steps: number of optimiser steps in total, those before a resume included; fewer if the batches end.
        devices: a number of devices of this machine, their names (``cuda:0``, ``cpu:0-3``), a cluster, or
            None for all there are.
        adapt: whether to change the plan while training.
        directory: where the run's log, its workers' output and checkpoints go (default: ``runs/TIME``).
        checkpoint_every: steps between checkpoints, with one at the end; None for one when interrupted only.
        resume: go on from the newest checkpoint in ``directory``.
        plan: run this plan instead of the one found best.
        policy: thresholds of the adaptation.
        look_ahead: how many batches are read, and their cost predicted, before they run.
        on_event: receives every event.
        on_progress: receives what is being done before the first step, as short sentences.

    Raises:
        InvalidInput: the task, the devices or the checkpoint cannot be used as they are.
        RunFailed: the run could not go on, or Ctrl-C ended it; ``checkpoint`` names where to resume,
            ``report`` says what was done.
    """
    if steps < 1:
        raise InvalidInput(f"steps is {steps}; it must be at least 1")
    cluster = devices if isinstance(devices, Cluster) else find_cluster(devices)
    started = datetime.fromtimestamp(SystemClock().wall_s(), UTC)
    folder = Path(directory) if directory else Path("runs") / started.strftime("%Y%m%d-%H%M%S")
    checkpoint = _checkpoint_to_resume(folder, task) if resume else None
    policy = policy or Policy()
    if not adapt:
        policy = Policy(adapt=False)
    first_step = int(checkpoint.trainer["step"]) if checkpoint else 0
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(folder / _LOG))
        if checkpoint is None and log.size_bytes:
            resume_it = "resume it, or " if latest(folder / "checkpoints") else ""
            raise InvalidInput(f"{folder} already holds a run; {resume_it}choose another directory")
        remove_partial(folder / "checkpoints")
        log.checkpoint = str(checkpoint.path) if checkpoint else None
        engine = stack.enter_context(TrainingEngine(cluster, folder))
        batches = batches_from(task, first_step)
        prepared = prepare(task, batches, cluster, engine, checkpoint, on_progress or (lambda _: None))
        ahead = stack.enter_context(
            LookAhead(prepared.batches, look_ahead, prepared.describe, first=first_step)
        )
        planner = Planner(prepared.costs)
        log.append(encode(Header(policy=policy, run=prepared.costs.to_json())))
        run = _Run(
            engine=engine,
            ahead=ahead,
            log=log,
            config=ControlConfig(policy=policy, planner=planner),
            on_event=on_event or (lambda _: None),
        )
        first_plan = plan or planner.best(ahead.upcoming(1)[0], {})
        engine.start(first_plan, checkpoint)
        run.take(RunStarted(plan=first_plan, next_step=first_step))
        try:
            run.steps(first_step, steps, checkpoint_every)
        except RunFailed as failed:
            failed.report = run.report(prepared.costs, first_plan, {}, log.path) if run.finished else None
            raise
        state = _trained(task, engine)
        engine.close()
    return run.report(prepared.costs, first_plan, state, log.path)


def _checkpoint_to_resume(folder: Path, task: TrainingTask) -> Checkpoint:
    path = latest(folder / "checkpoints")
    if path is None:
        raise InvalidInput(f"no complete checkpoint in {folder / 'checkpoints'}; train without resume first")
    checkpoint = Checkpoint(path)
    if (seed := checkpoint.trainer["seed"]) != task.seed:
        raise CheckpointMismatch(f"{path} was trained with seed {seed}, not {task.seed}; use the same")
    return checkpoint


def _trained(task: TrainingTask, engine: TrainingEngine) -> dict[str, Any]:
    """Brings the trained values together in the task's model."""
    values = engine.gather()
    own = task.model.state_dict(keep_vars=True)
    for name, value in values.items():
        own[name].data.copy_(value)
    return {name: tensor.detach().clone() for name, tensor in own.items()}


@dataclass(slots=True)
class _Run:
    """The state of a run that is going on."""

    engine: TrainingEngine
    ahead: LookAhead[Batch]
    log: RunLog
    config: ControlConfig
    on_event: Callable[[Event], None]
    control: ControlState = field(default_factory=ControlState)
    finished: list[StepFinished] = field(default_factory=list[StepFinished])
    repartitions: list[Repartitioned] = field(default_factory=list[Repartitioned])
    interrupts: Interrupts = field(default_factory=Interrupts)
    announced: int = 0
    checkpointed: int = 0
    overhead_s: float = 0.0
    stop: Stop | None = None

    def take(self, event: Event) -> None:
        """Logs an event, lets the controller decide on it, and carries out what it decides."""
        start_s = time.perf_counter()
        self.log.append(encode(event))
        self.control, commands = control_step(self.control, event, self.config)
        for command in commands:
            self.log.append(encode(command))
            if isinstance(command, Repartition):
                self.engine.execute(command)
            else:
                self.stop = command
        self.overhead_s += time.perf_counter() - start_s
        if isinstance(event, StepFinished):
            self.finished.append(event)
        elif isinstance(event, Repartitioned):
            self.repartitions.append(event)
        elif isinstance(event, CheckpointWritten):
            self.log.checkpoint, self.checkpointed = event.path, event.step
        self.on_event(event)

    def steps(self, first: int, last: int, checkpoint_every: int | None) -> None:
        """Runs the steps ``first`` to ``last`` (excluded).

        An interrupt, or a batch that cannot be used, ends them with a checkpoint.
        """
        try:
            with self.interrupts:
                self._keep_if_ended(first, last, checkpoint_every)
        except WorkerLost as lost:
            self.take(WorkerExited(device=lost.device, cause=lost.cause))
            raise
        if self.stop is not None:
            raise RunFailed(self.stop.reason, checkpoint=self.log.checkpoint)

    def _keep_if_ended(self, first: int, last: int, checkpoint_every: int | None) -> None:
        try:
            self._steps(first, last, checkpoint_every)
        except KeyboardInterrupt as interrupt:
            self._keep()
            raise RunFailed(
                f"interrupted after {self.done} steps", checkpoint=self.log.checkpoint
            ) from interrupt
        except InvalidInput as error:
            self._keep()
            raise RunFailed(str(error), checkpoint=self.log.checkpoint) from error

    def _steps(self, first: int, last: int, checkpoint_every: int | None) -> None:
        for number in range(first, last):
            if not self._submit(number) or self.stop is not None:
                break
            if checkpoint_every and (number + 1) % checkpoint_every == 0:
                self._checkpoint(number + 1)
            self._settle(_IN_FLIGHT - 1)
        self._settle(0)
        if checkpoint_every and self.done % checkpoint_every:
            self._checkpoint(self.done)
            self._settle(0)

    def _checkpoint(self, step: int) -> None:
        with self.interrupts.held():
            self.engine.checkpoint(step)

    def _submit(self, number: int) -> bool:
        """Hands over the next step; False when the batches have ended."""
        with self.interrupts.held():
            self._announce(number)
        try:
            batch, binding = next(self.ahead)
        except StopIteration:
            return False
        speeds = self.control.speeds
        with self.interrupts.held():
            self.engine.submit(
                number, batch, lambda plan: self.config.planner.prediction(plan, binding, speeds).step_s
            )
        return True

    def _announce(self, number: int) -> None:
        """Tells the controller about batches it has not heard of."""
        start_s = time.perf_counter()
        upcoming = self.ahead.upcoming()
        self.announced = max(self.announced, number)
        new = upcoming[self.announced - number :]
        self.overhead_s += time.perf_counter() - start_s
        if new:
            event = BatchesAhead(first_step=self.announced, bindings=new)
            self.announced += len(new)
            self.take(event)

    def _settle(self, in_flight: int) -> None:
        """Takes events until no more than ``in_flight`` steps are under way."""
        while self.engine.in_flight > in_flight or (in_flight == 0 and self.engine.busy):
            with self.interrupts.held():
                if (event := self.engine.next_event(_NOTICE_S)) is None:
                    continue
                self.take(event)
            if isinstance(event, StepFinished) and not math.isfinite(event.loss):
                raise NonFiniteLoss(step=event.step, loss=event.loss, checkpoint=self.log.checkpoint)

    def _keep(self) -> None:
        """Finishes what is under way and writes a checkpoint."""
        self._settle(0)
        if self.checkpointed < self.done:
            self._checkpoint(self.done)
            self._settle(0)
        self.engine.close()

    @property
    def done(self) -> int:
        """Steps that are done, those before a resume included."""
        return self.finished[-1].step + 1 if self.finished else 0

    def report(
        self, costs: ProfiledCosts, first_plan: PartitionPlan, state: dict[str, Any], log_path: Path
    ) -> TrainingReport:
        return TrainingReport(
            steps=tuple(self.finished),
            repartitions=tuple(self.repartitions),
            plans=(first_plan, *(r.after for r in self.repartitions)),
            costs=costs,
            overhead_s=self.overhead_s,
            log_path=log_path,
            checkpoint=self.engine.last_checkpoint,
            _state=state,
        )
