"""Trains tasks on real workers under forced plans, and in the plain loop they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from forescale.core.cluster import Cluster, Device, DeviceKind, Link
from forescale.engine.messages import CheckpointWritten, Repartition, Repartitioned, StepFinished
from forescale.engine.train.engine import TrainingEngine
from forescale.engine.train.optimizer import optimizer_template
from forescale.engine.train.shards import Checkpoint
from forescale.engine.train.task import TrainingTask, batch_rows, microbatch_rows, split_rows
from forescale.engine.wire import Message
from forescale.graph.capture import capture
from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Shard, Stage, StagePrediction


def cpus(count: int) -> Cluster:
    return Cluster(
        devices=tuple(
            Device(name=f"cpu{i}", kind=DeviceKind.CPU, memory_bytes=1 << 32) for i in range(count)
        ),
        default_link=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4),
    )


THREE_CPUS = cpus(3)
_NO_COST = StagePrediction(
    forward_s=0.0, backward_s=0.0, transfer_s=0.0, optimizer_s=0.0, busy_s=0.0, memory_bytes=0
)


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """How a model is cut: at fractions of its operators, or scattered at random behind one another.

    Attributes:
        at: ascending fractions; n of them make n + 1 stages.
        scatter: seed that shuffles operators between neighbouring stages, as far as order allows.
        devices: device number of each stage, and of each replica (default: 0, 1, ...).
        shares: of the microbatches, for each replica of each stage (default: no replicas).
        weights: of the shards of each stage's replicas, None for stages that run whole (default: all do).
    """

    at: tuple[float, ...] = (0.5,)
    scatter: int | None = None
    microbatches: int = 4
    schedule: Schedule = Schedule.ONE_F_ONE_B
    recompute: bool = False
    devices: tuple[int, ...] | None = None
    shares: tuple[tuple[int, ...], ...] | None = None
    weights: tuple[tuple[int, ...] | None, ...] | None = None

    def plan(self, graph: ModelGraph, kind: DeviceKind = DeviceKind.CPU) -> PartitionPlan:
        stage_of = self._stages(graph)
        shares = self.shares or ((1,),) * (len(self.at) + 1)
        weights = self.weights or (None,) * len(shares)
        places = [
            (number, share, shard)
            for number, group in enumerate(shares)
            for share in group
            for shard in _shards(weights[number])
        ]
        devices = self.devices or tuple(range(len(places)))
        stages = tuple(
            Stage(
                device=f"{kind}{device}",
                operators=tuple(i for i, s in enumerate(stage_of) if s == number),
                recompute=self.recompute,
                share=share,
                shard=shard,
            )
            for device, (number, share, shard) in zip(devices, places, strict=True)
        )
        assert all(stage.operators for stage in stages), "a forced plan left a stage empty"
        return PartitionPlan(
            stages=stages,
            microbatches=self.microbatches,
            schedule=self.schedule,
            prediction=Prediction(step_s=0.0, stages=(_NO_COST,) * len(stages)),
        )

    def _stages(self, graph: ModelGraph) -> list[int]:
        count = len(graph.operators)
        positions = np.arange(count) / count
        if self.scatter is not None:
            positions = positions + np.random.default_rng(self.scatter).normal(0.0, 0.15, count)
        stage_of = [int(s) for s in np.searchsorted(self.at, positions, side="right")]
        before = None
        while stage_of != before:  # an operator never runs before what it reads, nor apart from its group
            before = list(stage_of)
            for index, predecessors in enumerate(graph.predecessors):
                stage_of[index] = max([stage_of[index], *(stage_of[p] for p in predecessors)])
            for group in graph.colocated:
                for index in group:
                    stage_of[index] = max(stage_of[i] for i in group)
        return stage_of


def _shards(weights: tuple[int, ...] | None) -> list[Shard | None]:
    return [Shard(index=i, weights=weights) for i in range(len(weights))] if weights else [None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run did: losses by step, final parameters and buffers."""

    losses: list[float]
    state: Mapping[str, torch.Tensor]
    steps: tuple[StepFinished, ...] = ()
    repartitions: tuple[Repartitioned, ...] = ()
    checkpoint: Path | None = None


def plain(task: TrainingTask, steps: int, microbatches: int | Callable[[int], int]) -> Trained:
    """The task in the loop everybody writes: microbatches one after the other, gradients accumulated.

    It runs where the task's model and batches lie.
    """
    factory = task.optimizer
    if isinstance(factory, Optimizer):
        model, optimizer = copy.deepcopy((task.model, factory))
    else:
        model = copy.deepcopy(task.model)
        optimizer = factory(model.parameters())
    if not model.training:
        model.train()
    scheduler = task.scheduler(optimizer) if task.scheduler else None
    own = replace(task, model=model)
    losses: list[float] = []
    for step, batch in zip(range(steps), task.batches, strict=False):
        count = microbatches(step) if callable(microbatches) else microbatches
        losses.append(_accumulate(own, batch, count))
        if task.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return Trained(losses=losses, state={n: t.detach() for n, t in model.state_dict().items()})


def _accumulate(task: TrainingTask, batch: Any, microbatches: int) -> float:
    parts = microbatch_rows(batch_rows(*task.call(batch)), microbatches)
    pieces = split_rows(batch, parts)
    weights = [float(task.weight(piece)) for piece in pieces] if task.weight else list(map(float, parts))
    total = 0.0
    for piece, weight in zip(pieces, weights, strict=True):
        args, kwargs = task.call(piece)
        kind = next(task.model.parameters()).device.type
        casting = torch.autocast(kind, task.autocast) if task.autocast else nullcontext()
        with casting:
            loss = task.loss(task.model(*args, **kwargs), piece)
        loss = loss * (weight / sum(weights))
        loss.backward()
        total += loss.item()
    return total


class _ReusedEngine(TrainingEngine):
    """An engine whose workers take one task after another: starting them costs most of a short run."""

    _greeted = False

    def _answers(self, kind: str, limit_s: float | None = None) -> dict[str, Message]:
        if kind == "ready" and self._greeted:
            return {}
        self._greeted = True
        return super()._answers(kind, limit_s)


class Workers:
    """Workers on every device of a cluster; they are started anew only after a run that failed."""

    def __init__(self, directory: Path, cluster: Cluster = THREE_CPUS) -> None:
        self._directory = directory
        self._cluster = cluster
        self._stack = ExitStack()
        self._engine: TrainingEngine | None = None
        self._runs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def train(
        self,
        task: TrainingTask,
        cuts: Cuts | Mapping[int, Cuts],
        steps: int,
        *,
        checkpoint_at: int | None = None,
        resume: Path | None = None,
    ) -> Trained:
        """Trains ``steps`` steps in total.

        Args:
            cuts: one for the whole run, or by the step before which they come into force.
            checkpoint_at: number of steps after which a checkpoint is written.
            resume: checkpoint to go on from.
        """
        by_step = {0: cuts} if isinstance(cuts, Cuts) else dict(cuts)
        engine = self._started()
        try:
            return self._run(engine, task, by_step, steps, checkpoint_at, resume)
        except BaseException:
            self._stack.close()
            self._engine = None
            raise

    def _started(self) -> TrainingEngine:
        if self._engine is None:
            self._engine = self._stack.enter_context(_ReusedEngine(self._cluster, self._directory))
        return self._engine

    def _run(
        self,
        engine: TrainingEngine,
        task: TrainingTask,
        cuts: Mapping[int, Cuts],
        steps: int,
        checkpoint_at: int | None,
        resume: Path | None,
    ) -> Trained:
        batches = list(task.batches)
        args, kwargs = task.call(batches[0])
        captured = capture(task.model, args, kwargs, task.autocast)
        parameters = {
            n: p for n in captured.graph.parameters if isinstance(p := captured.state[n], nn.Parameter)
        }
        engine.set_up(task, captured, optimizer_template(task, parameters))
        kind = self._cluster.devices[0].kind
        saved = Checkpoint(resume) if resume else None
        first = int(saved.trainer["step"]) if saved else 0
        engine.start(cuts[0].plan(captured.graph, kind), saved)
        collected = _Collected(engine)
        for step in range(first, steps):
            if step in cuts and step > first:
                plan = cuts[step].plan(captured.graph, kind)
                engine.execute(Repartition(plan=plan, reason="forced", before_step=step))
            engine.submit(step, batches[step], lambda _: 0.0)
            if step + 1 == checkpoint_at:
                engine.checkpoint(step + 1)
            collected.until(in_flight=1)
        collected.until(in_flight=0)
        return Trained(
            losses=[step.loss for step in collected.steps],
            steps=tuple(collected.steps),
            state=engine.gather(),
            repartitions=tuple(collected.repartitions),
            checkpoint=collected.checkpoint,
        )


class _Collected:
    """Takes an engine's events."""

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self.steps: list[StepFinished] = []
        self.repartitions: list[Repartitioned] = []
        self.checkpoint: Path | None = None

    def until(self, in_flight: int) -> None:
        while self._engine.in_flight > in_flight or (in_flight == 0 and self._engine.busy):
            match self._engine.next_event():
                case StepFinished() as event:
                    self.steps.append(event)
                case Repartitioned() as event:
                    self.repartitions.append(event)
                case CheckpointWritten(path=path):
                    self.checkpoint = Path(path)
                case _:
                    pass


def loss_difference(a: Trained, b: Trained) -> float:
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def state_difference(trained: Trained, reference: Trained, names: Sequence[str] | None = None) -> float:
    """Largest difference of any parameter or buffer that ``trained`` gathered."""
    assert trained.state
    return max(
        float((trained.state[n].double() - reference.state[n].double()).abs().max())
        for n in names or trained.state
    )
