"""Gets a worker ready for its next plan while it still runs under the last."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from forescale.engine.train.assignment import Assignment
from forescale.engine.train.collectives import Shards
from forescale.engine.train.migration import Change, Landing
from forescale.engine.train.peers import Peers
from forescale.engine.train.stage import CompiledStage, compile_stage
from forescale.engine.train.stopwatch import Stopwatch
from forescale.plan.partition_plan import PartitionPlan, shards_with


def compile_for(
    assignment: Assignment, plan: PartitionPlan, device: str, peers: Peers, stopwatch: Stopwatch
) -> tuple[CompiledStage, ...]:
    """The stages of ``plan`` that run on ``device``; none if it is idle."""
    captured = assignment.captured

    def compiled(index: int) -> CompiledStage:
        ranks = [assignment.ranks[shard.device] for shard in shards_with(plan.stages, index)]
        modules = {**captured.modules, **Shards(ranks, peers, stopwatch).operators()}
        return compile_stage(captured.graph, plan, index, peers.device, modules)

    return tuple(compiled(index) for index, stage in enumerate(plan.stages) if stage.device == device)


class Preparation:
    """A plan that another thread compiles, which also makes room for what will arrive."""

    def __init__(self, plan: PartitionPlan) -> None:
        self.plan = plan
        self.landing = Landing()
        self.change: Change
        self._compiled: tuple[CompiledStage, ...] = ()
        self._error: Exception | None = None
        self._thread: threading.Thread

    def begin(
        self,
        assignment: Assignment,
        current: PartitionPlan,
        device: str,
        compiled_for: Callable[[PartitionPlan], tuple[CompiledStage, ...]],
        place: torch.device,
    ) -> None:
        graph, copies = assignment.captured.graph, 1 + round(assignment.optimizer.state_ratio)

        def compile_it() -> None:
            try:
                self._compiled = compiled_for(self.plan)
                self.change = Change.between(graph, device, current, self.plan)
                self.change.make_room(graph, copies, self.landing, place)
            except Exception as error:  # noqa: BLE001 - raised again where the plan is switched to
                self._error = error

        self._thread = threading.Thread(target=compile_it)
        self._thread.start()

    def result(self) -> tuple[CompiledStage, ...]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._compiled
