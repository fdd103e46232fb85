"""Runs one stage of a plan: its operators, forward and backward, one microbatch after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import Work

from forescale.core.errors import TaskFailed
from forescale.engine.train.assignment import Assignment
from forescale.engine.train.post import Binding, Letter, Post
from forescale.engine.train.randomness import operator_seed
from forescale.engine.train.reached import Reached
from forescale.engine.train.stopwatch import Activity, Stopwatch
from forescale.engine.train.wiring import Wiring, wire
from forescale.graph.deferral import Deferral, WeightGradient
from forescale.graph.model import ModelGraph
from forescale.graph.program import Program, compile_program
from forescale.graph.size import compile_sizes
from forescale.plan.partition_plan import PartitionPlan, Schedule, pipeline_positions
from forescale.plan.schedule import Layout, Phase
from forescale.plan.sharded import sharded

# Microbatches whose gradients are on their way: enough to keep the link busy, few enough to bound the memory.
_SENDING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One microbatch as a stage sees it.

    Attributes:
        fed: the batch inputs this stage reads.
        batch: the whole microbatch, on the last stage, for the loss.
        weight: share of this microbatch in the step's loss.
    """

    binding: Binding
    fed: Mapping[str, torch.Tensor]
    batch: Any
    weight: float


@dataclass(slots=True)
class _Running:
    """A microbatch between its forward and its backward.

    ``state`` is what the forward read: a recomputation must not see buffers that changed since.
    """

    inputs: list[torch.Tensor]
    state: list[torch.Tensor]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    loss: torch.Tensor | None = None
    sends: list[Work] = field(default_factory=list[Work])


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledStage:
    """What can be prepared for a stage before it takes over.

    Attributes:
        origin_O: operator of the program -> of the whole graph; it seeds what is random.
        deferral: collects the gradients of parameters that the schedule computes apart.
    """

    index: int
    plan: PartitionPlan
    wiring: Wiring
    program: Program
    origin_O: Sequence[int]
    deferral: Deferral
    shapes: Mapping[str, Callable[[Binding], list[int]]]


def compile_stage(
    graph: ModelGraph,
    plan: PartitionPlan,
    index: int,
    device: torch.device,
    modules: Mapping[str, Callable[..., Any]],
) -> CompiledStage:
    """Compiles a stage, or the part of it that one of its shards runs.

    Args:
        modules: callables by target, of whole modules and of collectives.
    """
    wiring, stage = wire(graph, plan, index), plan.stages[index]
    positions = pipeline_positions(plan.stages)
    results = graph.outputs if positions[index] == positions[-1] else tuple(wiring.sent)
    outputs = tuple(dict.fromkeys((*results, *wiring.updates.values())))
    origin_O: Sequence[int] = range(len(graph.operators))
    run, operators, deferral = graph, stage.operators, Deferral()
    if (part := sharded(graph, stage)) is not None:
        run, operators, origin_O = part.graph, tuple(range(len(part.graph.operators))), part.origin_O
    wraps = deferral.wraps(run, operators) if plan.schedule is Schedule.ZERO_BUBBLE else None
    return CompiledStage(
        index=index,
        plan=plan,
        wiring=wiring,
        program=compile_program(run, operators, outputs, device, modules, wraps),
        origin_O=origin_O,
        deferral=deferral,
        shapes={
            name: compile_sizes(graph.tensors[name].shape, tuple(graph.symbols))
            for name in (*wiring.received, *wiring.sent)
        },
    )


class StageExecutor:
    """Runs a compiled stage with the tensors its worker holds, task by task.

    Args:
        ranks: the workers of all stages of the plan.
        held: parameters and buffers by name; buffers' new values are put there.
    """

    def __init__(
        self,
        assignment: Assignment,
        compiled: CompiledStage,
        *,
        ranks: Sequence[int],
        post: Post,
        reached: Reached,
        device: torch.device,
        held: dict[str, torch.Tensor],
        stopwatch: Stopwatch,
    ) -> None:
        graph, plan = assignment.captured.graph, compiled.plan
        self._graph = graph
        self._assignment = assignment
        self._stage = compiled
        self._ranks = ranks
        self._post = post
        self._reached = reached
        self._device = device
        self._held = held
        self._stopwatch = stopwatch
        self._layout = Layout.of(plan.stages, plan.microbatches)
        self._place = self._layout.positions_S[compiled.index]
        self._is_last = self._layout.is_last(compiled.index)
        stage = plan.stages[compiled.index]
        self._recompute = stage.recompute
        self._speaks = stage.shard is None or stage.shard.index == 0  # for all shards of its replica
        self._step = 0
        self._microbatches: Sequence[Microbatch] = ()
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._expecting: dict[tuple[Phase, int], list[Letter]] = {}
        self._running: dict[int, _Running] = {}
        self._waiting: dict[int, list[WeightGradient]] = {}
        self._gradient_sends: list[Work] = []

    def begin(self, step: int, layout: Layout, microbatches: Sequence[Microbatch]) -> None:
        """Begins a step."""
        self._step, self._layout, self._microbatches = step, layout, microbatches
        self._total = torch.zeros((), dtype=torch.float64, device=self._device)

    def run(self, phase: Phase, index: int) -> None:
        """Does one task, for which :meth:`expect` was called before."""
        match phase:
            case Phase.FORWARD:
                self._forward(index)
            case Phase.BACKWARD:
                self._backward(index)
            case Phase.WEIGHT:
                self._accumulate(index)

    def finish(self) -> torch.Tensor:
        """Ends a step, whose gradients are then accumulated.

        Returns:
            The loss of this stage's microbatches on the last stage (detached), zero elsewhere. Of shards,
            the first one returns it.
        """
        self._finish_sends(self._gradient_sends)
        return self._total

    def _ranks_at(self, position: int, microbatch: int) -> list[int]:
        """The workers that run a microbatch of the stage at a position.

        If they are several, each receives what is sent there; the first sends what all have.
        """
        return [self._ranks[stage] for stage in self._layout.runners(position, microbatch)]

    def expect(self, phase: Phase, index: int) -> None:
        """Posts the receives of one forward or backward, so that they overlap with what runs before it."""
        if phase is Phase.WEIGHT or (phase, index) in self._expecting:
            return
        with self._stopwatch.time(Activity.TRANSFER):
            letters: list[Letter] = []
            for name, position in self._expected(phase):
                back = phase is Phase.BACKWARD
                reader = position if back else self._place
                letters.append(Letter(name=name, reader=reader, microbatch=index, back=back))
                self._post.expect(letters[-1], self._ranks_at(position, index)[0])
            self._expecting[phase, index] = letters

    def _expected(self, phase: Phase) -> list[tuple[str, int]]:
        if phase is Phase.FORWARD:
            return list(self._stage.wiring.received.items())
        return [
            (name, position)
            for name, positions in self._stage.wiring.sent.items()
            if self._carries(name)
            for position in positions
        ]

    def _carries(self, name: str) -> bool:
        return self._graph.tensors[name].requires_grad

    def _take(self, phase: Phase, index: int) -> list[torch.Tensor]:
        with self._stopwatch.time(Activity.WAIT):
            return [self._post.take(letter) for letter in self._expecting.pop((phase, index))]

    def _forward(self, index: int) -> None:
        microbatch = self._microbatches[index]
        arrived = dict(zip(self._stage.wiring.received, self._take(Phase.FORWARD, index), strict=True))
        for name, tensor in arrived.items():
            if self._carries(name):
                tensor.requires_grad_()
        inputs = [arrived[n] if n in arrived else microbatch.fed[n] for n in self._stage.program.inputs]
        state = [self._held[n] for n in self._stage.program.state]
        running = self._running[index] = _Running(inputs=inputs, state=state)
        with self._stopwatch.time(Activity.FORWARD), torch.set_grad_enabled(not self._recompute):
            results = self._call(index, running, track=True)
        if self._speaks and running.loss is not None:
            self._total += running.loss.detach()
        for buffer, tensor in self._stage.wiring.updates.items():
            self._held[buffer] = results[tensor].detach()
        with self._stopwatch.time(Activity.TRANSFER):
            for name, positions in self._stage.wiring.sent.items() if self._speaks else ():
                for position in positions:
                    letter = Letter(name=name, reader=position, microbatch=index, back=False)
                    for rank in self._ranks_at(position, index):
                        running.sends += self._post.send(letter, results[name].detach(), rank)

    def _call(self, index: int, running: _Running, *, track: bool) -> dict[str, torch.Tensor]:
        """Runs the operators (and the loss); notes in ``running`` what a backward starts from."""
        program, microbatch = self._stage.program, self._microbatches[index]

        def reseed(operator: int) -> None:
            self._seed(index, self._stage.origin_O[operator])

        results = dict(
            zip(
                program.outputs,
                program.function(
                    running.state,
                    running.inputs,
                    program.sizes(microbatch.binding),
                    reseed,
                    track,
                ),
                strict=True,
            )
        )
        if self._is_last:
            self._reached.watch(results)
            self._seed(index, len(self._graph.operators))
            output = self._assignment.captured.output.rebuild(results)
            loss = self._assignment.loss_of(output, microbatch.batch, self._device)
            running.loss = loss * microbatch.weight
        running.outputs = {n: results[n] for n in self._stage.wiring.sent if self._carries(n)}
        return results

    def _seed(self, index: int, operator: int) -> None:
        operator_seed(self._device, self._assignment.seed, self._step, index, operator)

    def _backward(self, index: int) -> None:
        gradients = self._take(Phase.BACKWARD, index)
        running = self._running.pop(index)
        self._finish_sends(running.sends)
        with self._stopwatch.time(Activity.BACKWARD):
            if self._recompute:
                self._call(index, running, track=False)
            if running.loss is not None:
                self._backward_from_loss(running.loss)
            elif running.outputs:
                torch.autograd.backward(list(running.outputs.values()), self._summed(gradients))
        self._waiting[index] = self._stage.deferral.take()
        self._send_gradients(index, running)

    def _accumulate(self, index: int) -> None:
        """The rest of a backward: gradients of parameters."""
        waiting = self._waiting.pop(index)
        with self._stopwatch.time(Activity.BACKWARD):
            while waiting:  # what one of them kept is free before the next
                waiting.pop().accumulate()

    @staticmethod
    def _backward_from_loss(loss: torch.Tensor) -> None:
        if not loss.requires_grad:
            raise TaskFailed("the loss does not depend on any trainable parameter")
        loss.backward()

    def _summed(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Adds up, per sent tensor, the gradients from all stages that read it."""
        arrived = iter(gradients)
        return [
            torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
            for name, positions in self._stage.wiring.sent.items()
            if self._carries(name)
            for parts in [[next(arrived) for _ in positions]]
        ]

    def _send_gradients(self, index: int, running: _Running) -> None:
        if not self._speaks:
            return
        inputs = dict(zip(self._stage.program.inputs, running.inputs, strict=True))
        carrying = {n: place for n, place in self._stage.wiring.received.items() if self._carries(n)}
        sent = 0
        with self._stopwatch.time(Activity.TRANSFER):
            for name, position in carrying.items():
                tensor = inputs[name]
                gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
                letter = Letter(name=name, reader=self._place, microbatch=index, back=True)
                for rank in self._ranks_at(position, index):
                    self._gradient_sends += self._post.send(letter, gradient, rank)
                    sent += 1
            # Where devices take turns, a reader may be waiting for what this one does next.
            if self._layout.chunks == 1:
                self._finish_sends(self._gradient_sends, leave=_SENDING * sent)

    @staticmethod
    def _finish_sends(sends: list[Work], *, leave: int = 0) -> None:
        while len(sends) > leave:
            sends.pop(0).wait()
