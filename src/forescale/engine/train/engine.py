"""The training engine: starts workers, hands them batches and plans, and tells what happened."""

from __future__ import annotations

import math
import pickle
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from forescale.core.cluster import Cluster
from forescale.core.errors import CheckpointFailed, RunFailed, TaskFailed
from forescale.engine.messages import (
    Binding,
    CheckpointWritten,
    Event,
    Repartition,
    Repartitioned,
    StageReport,
    StepFinished,
)
from forescale.engine.tensors import pack, unpack
from forescale.engine.train.assignment import Assignment
from forescale.engine.train.crew import START_LIMIT_S, Crew
from forescale.engine.train.hand_over import encode_batch
from forescale.engine.train.optimizer import OptimizerTemplate
from forescale.engine.train.parts import cut
from forescale.engine.train.profiling import WorkerProfile
from forescale.engine.train.shards import Checkpoint, Shard, checkpoint_path, complete
from forescale.engine.train.task import Batch, TrainingTask, batch_rows, microbatch_rows, split_rows
from forescale.engine.train.wiring import fed_inputs
from forescale.engine.wire import Message
from forescale.graph.capture import CapturedModel
from forescale.plan.moves import held_by, holdings
from forescale.plan.partition_plan import PartitionPlan, replica_groups
from forescale.plan.replicas import check_replicas, check_turns


@dataclass(slots=True)
class _StepInFlight:
    """A step that was handed to the workers."""

    binding: Binding
    rows: int
    tokens: int
    predicted_s: float
    losses: dict[str, float] = field(default_factory=dict[str, float])
    reports: dict[str, StageReport] = field(default_factory=dict[str, StageReport])
    ended_s: float = 0.0


@dataclass(slots=True)
class _Switch:
    """A plan on its way: prepared by the workers, not yet in force."""

    command: Repartition
    before: PartitionPlan
    step: int = -1
    answers: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])


class TrainingEngine:
    """Workers on every device of a cluster, training one model together.

    Use it from one thread, as a context manager: leaving it ends every process it started.

    Workers start when the context is entered and import what they need while the caller captures and
    measures; :meth:`set_up` waits for them.

    Args:
        directory: the run's directory; logs of workers and checkpoints go there.
    """

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self._directory = directory
        self._crew = Crew(cluster, directory)
        self._names = self._crew.names
        self._ranks = {name: rank for rank, name in enumerate(self._names)}
        self._task: TrainingTask
        self._captured: CapturedModel
        self._template: OptimizerTemplate
        self._plan: PartitionPlan
        self._fed: Mapping[str, tuple[str, ...]]  # device -> the batch inputs its stages read
        self._ends: Set[str]  # the devices of the last stage
        self._steps: dict[int, _StepInFlight] = {}
        self._switches: dict[int, _Switch] = {}
        self._next_switch: int | None = None
        self._plans_made = 0
        self._steps_since_prepare = 0
        self._writing: dict[int, list[tuple[Shard, Any, Any]]] = {}
        self._events: deque[Event] = deque()
        self._last_end_s = 0.0

    def __enter__(self) -> Self:
        self._crew.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._crew.__exit__()

    def close(self) -> None:
        """Asks every worker to end, and waits for them."""
        self._crew.stop()

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of this run."""
        return self._crew.checkpoint

    def set_up(self, task: TrainingTask, captured: CapturedModel, template: OptimizerTemplate) -> None:
        """Waits for the workers and tells them what they will train."""
        self._task, self._captured, self._template = task, captured, template
        self._answers("ready", START_LIMIT_S)
        buffers = {n: v.detach().cpu() for n, v in captured.state.items() if n in captured.graph.buffers}
        assignment = Assignment(
            captured=replace(captured, state=buffers),
            optimizer=template,
            scheduler=task.scheduler,
            loss=task.loss,
            clip_norm=task.clip_norm,
            autocast=task.autocast,
            seed=task.seed,
            ranks=self._ranks,
        )
        try:
            encoded = assignment.encode(task.model)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise TaskFailed(
                f"the task cannot be sent to the workers: {type(error).__name__}: {error}; keep locks, open "
                "files and threads out of the model, the loss and the optimizer"
            ) from error
        self._crew.broadcast({"type": "setup"}, [encoded])

    def profile(self, microbatches: Sequence[Batch], budget_s: float) -> tuple[WorkerProfile, ...]:
        """Measures the model with microbatches of some sizes, on all workers at once; one answer per device.

        Args:
            budget_s: about how long to take for each size.
        """
        for number, batch in enumerate(microbatches, start=1):
            meta, frames = encode_batch(self._captured.inputs.feed(*self._task.call(batch)), batch)
            header = {
                "type": "profile",
                "tensors": meta,
                "more": number < len(microbatches),
                "budget_s": budget_s,
            }
            self._crew.broadcast(header, frames)
        answers = self._answers("profiled")
        return tuple(pickle.loads(answers[name].frames[0]) for name in self._names)  # noqa: S301 - our own

    def start(self, plan: PartitionPlan, checkpoint: Checkpoint | None = None) -> None:
        """Gives every worker its part of the model, with the state of ``checkpoint`` if there is one.

        Raises:
            InvalidInput: the plan has replicas or shards that cannot train as one.
        """
        check_replicas(self._captured.graph, plan.stages)
        self._template.check(plan)
        check_turns(plan.stages, plan.schedule)
        self._enact(plan)
        held = holdings(self._captured.graph, plan)
        persistent = set(checkpoint.names()) if checkpoint else set[str]()
        header = {
            "type": "start",
            "checkpoint": str(checkpoint.path) if checkpoint else None,
            "groups": checkpoint.trainer["groups"] if checkpoint else None,
            "schedule": checkpoint.trainer["schedule"] if checkpoint else None,
        }
        for name in self._names:
            mine = held_by(held, name)
            values = {n: cut(self._captured.state[n], mine[n]) for n in mine if n not in persistent}
            meta, frames = pack(values)
            self._crew.send(name, {**header, "tensors": meta}, [pickle.dumps(plan), *frames])
        self._answers("started")
        self._crew.checkpoint = checkpoint.path if checkpoint else None
        self._last_end_s = time.monotonic()

    @property
    def in_flight(self) -> int:
        """Steps that were submitted and have not finished."""
        return len(self._steps)

    @property
    def busy(self) -> bool:
        """Whether a switch or a checkpoint is still under way."""
        return bool(self._writing) or any(switch.step >= 0 for switch in self._switches.values())

    def submit(
        self,
        step: int,
        batch: Batch,
        predict_s: Callable[[PartitionPlan], float],
        *,
        measure_memory: bool = False,
    ) -> None:
        """Queues one step; returns at once.

        Args:
            predict_s: what the step should take under the plan it will run with.
            measure_memory: whether CPU workers measure their peak memory, which slows this step down (GPU
                workers always do).
        """
        self._switch_if_due(step)
        args, kwargs = self._task.call(batch)
        rows = batch_rows(args, kwargs)
        inputs = self._captured.inputs.feed(args, kwargs)
        binding = self._captured.graph.bind({n: tuple(t.shape) for n, t in inputs.items()})
        parts = microbatch_rows(rows, self._plan.microbatches)
        bindings = [self._captured.graph.part(binding, rows, part) for part in parts]
        for one in bindings:
            self._captured.check(one)
        header = {
            "type": "step",
            "step": step,
            "rows": parts,
            "bindings": bindings,
            "weights": self._weights(batch, parts),
            "measure_memory": measure_memory,
        }
        # The batch is known to be good: from here on, the workers will answer.
        self._steps[step] = _StepInFlight(
            binding=binding,
            rows=rows,
            tokens=next(iter(inputs.values())).numel(),
            predicted_s=predict_s(self._plan),
        )
        for name in self._names:
            fed = {n: inputs[n] for n in self._fed.get(name, ())}
            meta, frames = encode_batch(fed, batch if name in self._ends else None)
            self._crew.send(name, {**header, "tensors": meta}, frames)
        self._steps_since_prepare += 1

    def _enact(self, plan: PartitionPlan) -> None:
        self._plan = plan
        self._fed = fed_inputs(self._captured.graph, plan)
        self._ends = {stage.device for stage in replica_groups(plan.stages)[-1]}

    def _weights(self, batch: Batch, parts: Sequence[int]) -> list[float]:
        if self._task.weight is None:
            return [part / sum(parts) for part in parts]
        try:
            weights = [float(self._task.weight(piece)) for piece in split_rows(batch, parts)]
        except Exception as error:
            raise TaskFailed(f"weight(batch) raised {type(error).__name__}: {error}") from error
        if not (min(weights) >= 0.0 and 0.0 < (total := sum(weights)) < math.inf):
            raise TaskFailed(f"the weights of a batch's parts are {weights}; their sum must be above 0")
        return [weight / total for weight in weights]

    def execute(self, command: Repartition) -> None:
        """Lets the workers prepare a plan; it is switched to at a step boundary soon after.

        Raises:
            InvalidInput: the plan has replicas or shards that cannot train as one.
        """
        check_replicas(self._captured.graph, command.plan.stages)
        self._template.check(command.plan)
        check_turns(command.plan.stages, command.plan.schedule)
        self._plans_made += 1
        self._switches[self._plans_made] = _Switch(command=command, before=self._plan)
        self._next_switch = self._plans_made
        self._steps_since_prepare = 0
        self._crew.broadcast({"type": "prepare", "plan": self._plans_made}, [pickle.dumps(command.plan)])

    def _switch_if_due(self, step: int) -> None:
        if self._next_switch is None:
            return
        switch = self._switches[self._next_switch]
        before = switch.command.before_step
        # One step runs while the workers prepare; a plan needed for a certain step waits for that step.
        due = step >= before if before is not None else self._steps_since_prepare >= 1
        if due:
            switch.step, switch.before = step, self._plan
            self._crew.broadcast({"type": "switch", "plan": self._next_switch})
            self._enact(switch.command.plan)
            self._next_switch = None

    def checkpoint(self, step: int) -> None:
        """Writes the state after the steps submitted so far, ``step`` in number; returns at once."""
        partial = self._partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise self._not_written(step, str(error)) from error
        self._writing[step] = []
        self._crew.broadcast({"type": "checkpoint", "directory": str(partial), "step": step})

    def _partial(self, step: int) -> Path:
        return checkpoint_path(self._directory / "checkpoints", step).with_suffix(".partial")

    def gather(self) -> dict[str, torch.Tensor]:
        """Every parameter and persistent buffer, by name, after the steps submitted so far."""
        self._crew.broadcast({"type": "gather"})
        answers = self._answers("gathered")
        return {n: t for m in answers.values() for n, t in unpack(m.header["tensors"], m.frames).items()}

    def next_event(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None after ``timeout_s``.

        Raises:
            RunFailed: a worker failed, or a checkpoint could not be written.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._events:
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s < 0:
                return None
            if (message := self._crew.receive(left_s)) is not None:
                self._note(message)
        return self._events.popleft()

    def _note(self, message: Message) -> None:
        header = message.header
        match header["type"]:
            case "stepped":
                self._stepped(message.sender, header)
            case "switched":
                self._switched(header)
            case "checkpointed":
                self._checkpointed(message)
            case other:
                raise RunFailed(
                    f"unexpected message {other!r} from {message.sender}", checkpoint=self._crew.kept()
                )

    def _stepped(self, sender: str, header: Mapping[str, Any]) -> None:
        step = self._steps[header["step"]]
        step.reports[sender] = StageReport(**header["report"])
        step.losses[sender] = header["loss"]
        step.ended_s = max(step.ended_s, header["end_s"])
        if len(step.reports) < len(self._names):
            return
        del self._steps[header["step"]]
        self._events.append(
            StepFinished(
                step=header["step"],
                step_s=step.ended_s - self._last_end_s,
                loss=sum(step.losses[name] for name in self._names),
                binding=step.binding,
                rows=step.rows,
                tokens=step.tokens,
                stages=tuple(step.reports[name] for name in self._names),
                predicted_s=step.predicted_s,
            )
        )
        self._last_end_s = step.ended_s

    def _switched(self, header: Mapping[str, Any]) -> None:
        switch = self._switches[header["plan"]]
        switch.answers.append(header)
        if len(switch.answers) < len(self._names):
            return
        del self._switches[header["plan"]]
        self._events.append(
            Repartitioned(
                step=switch.step,
                reason=switch.command.reason,
                pause_s=max(a["pause_s"] for a in switch.answers),
                moved_bytes=sum(a["moved_bytes"] for a in switch.answers),
                before=switch.before,
                after=switch.command.plan,
            )
        )

    def _checkpointed(self, message: Message) -> None:
        step = message.header["step"]
        if (error := message.header["error"]) is not None:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            raise self._not_written(step, error)
        written = self._writing[step]
        written.append(pickle.loads(message.frames[0]))  # noqa: S301 - our own worker
        if len(written) < len(self._names):
            return
        shards = [shard for shard, _, _ in written]
        _, groups, schedule = written[0]
        final = checkpoint_path(self._directory / "checkpoints", step)
        trainer = {"step": step, "seed": self._task.seed, "groups": groups, "schedule": schedule}
        try:
            complete(self._partial(step), final, self._captured.graph, shards, trainer)
        except OSError as error:
            raise self._not_written(step, str(error)) from error
        del self._writing[step]
        self._crew.checkpoint = final
        self._events.append(CheckpointWritten(step=step, path=str(final)))

    def _not_written(self, step: int, error: str) -> CheckpointFailed:
        return CheckpointFailed(
            f"the checkpoint of step {step} could not be written: {error}", checkpoint=self._crew.kept()
        )

    def _answers(self, kind: str, limit_s: float | None = None) -> dict[str, Message]:
        return self._crew.answers(kind, self._note, limit_s)
