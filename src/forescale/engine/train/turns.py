"""Runs all stages of one device, in the order of the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from forescale.engine.train.assignment import Assignment
from forescale.engine.train.peers import Peers
from forescale.engine.train.post import Letter, Post
from forescale.engine.train.reached import Reached
from forescale.engine.train.stage import CompiledStage, Microbatch, StageExecutor
from forescale.engine.train.stopwatch import Activity, Stopwatch
from forescale.engine.train.wiring import Wiring, wire
from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan
from forescale.plan.schedule import Layout, Phase, StageTask


class DeviceExecutor:
    """Runs a device's compiled stages with the tensors its worker holds.

    Attributes:
        untouched: parameters that the last step's loss does not depend on. Their gradient must be None,
            as it is in a plain loop, where an optimizer skips them; zeros would let weights decay.
    """

    def __init__(
        self,
        assignment: Assignment,
        compiled: Sequence[CompiledStage],
        *,
        peers: Peers,
        held: dict[str, torch.Tensor],
        stopwatch: Stopwatch,
    ) -> None:
        graph, plan = assignment.captured.graph, compiled[0].plan
        self._plan, self._peers, self._stopwatch = plan, peers, stopwatch
        ranks = [assignment.ranks[stage.device] for stage in plan.stages]
        layout = Layout.of(plan.stages, plan.microbatches)
        self._reached = Reached(
            graph,
            tuple(dict.fromkeys(ranks)),
            [rank for stage, rank in enumerate(ranks) if layout.is_last(stage)],
            peers,
        )
        self._device = compiled[0].index % layout.devices
        self._incoming = lru_cache(maxsize=8)(
            lambda microbatches: incoming(graph, plan, ranks, peers.rank, microbatches)
        )
        self._takes_turns = layout.chunks > 1
        self._post = Post(
            peers,
            names=graph.tensors,
            shapes={name: shape for stage in compiled for name, shape in stage.shapes.items()},
            dtypes={name: getattr(torch, tensor.dtype) for name, tensor in graph.tensors.items()},
            stages=len(plan.stages),
            take_turns=self._takes_turns,
        )
        self._stages = {
            stage.index: StageExecutor(
                assignment,
                stage,
                ranks=ranks,
                post=self._post,
                reached=self._reached,
                device=peers.device,
                held=held,
                stopwatch=stopwatch,
            )
            for stage in compiled
        }
        self.untouched: frozenset[str] = frozenset()

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> torch.Tensor:
        """Accumulates the gradients of one step.

        Returns:
            The loss of this device's microbatches if it runs the last stage (detached), zero otherwise.
        """
        plan, count = self._plan, len(microbatches)
        layout = Layout.of(plan.stages, count)
        agenda = layout.agenda(plan.schedule, self._device)
        self._reached.start()
        self._post.begin(
            [m.binding for m in microbatches], self._incoming(count) if self._takes_turns else {}
        )
        for executor in self._stages.values():
            executor.begin(step, layout, microbatches)
        for position, (stage, phase, index) in enumerate(agenda):
            for ahead, ahead_phase, ahead_index in agenda[position : position + 2]:
                self._stages[ahead].expect(ahead_phase, ahead_index)
            self._stages[stage].run(phase, index)
        with self._stopwatch.time(Activity.TRANSFER):
            losses = [executor.finish() for executor in self._stages.values()]
            self.untouched = self._reached.untouched()
        return torch.stack(losses).sum()


def incoming(
    graph: ModelGraph, plan: PartitionPlan, ranks: Sequence[int], rank: int, microbatches: int
) -> Mapping[int, tuple[Letter, ...]]:
    """What every other worker sends to this one in a step, in that order.

    Args:
        ranks: of the stages' workers; ``rank``: this one.
    """
    layout = Layout.of(plan.stages, microbatches)
    wirings = [wire(graph, plan, stage) for stage in range(len(plan.stages))]
    found: dict[int, tuple[Letter, ...]] = {}
    for device in range(layout.devices):
        letters = [
            letter
            for task in layout.agenda(plan.schedule, device)
            for letter, target in sent(graph, wirings[task[0]], task)
            if ranks[target] == rank
        ]
        if ranks[device] != rank:
            found[ranks[device]] = tuple(letters)
    return found


def sent(graph: ModelGraph, wiring: Wiring, task: StageTask) -> list[tuple[Letter, int]]:
    """What a task sends, in that order, and to the stages at which positions."""
    stage, phase, microbatch = task
    match phase:
        case Phase.FORWARD:
            return [
                (Letter(name=name, reader=reader, microbatch=microbatch, back=False), reader)
                for name, readers in wiring.sent.items()
                for reader in readers
            ]
        case Phase.BACKWARD:
            return [
                (Letter(name=name, reader=stage, microbatch=microbatch, back=True), maker)
                for name, maker in wiring.received.items()
                if graph.tensors[name].requires_grad
            ]
        case Phase.WEIGHT:
            return []
