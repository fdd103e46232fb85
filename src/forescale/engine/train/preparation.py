"""Gets a worker ready for its next plan while it still runs under the last."""

from __future__ import annotations

import threading

import torch

from forescale.engine.train.assignment import Assignment
from forescale.engine.train.migration import Landing
from forescale.engine.train.stage import CompiledStage, compile_stage
from forescale.plan.moves import moves
from forescale.plan.partition_plan import PartitionPlan


def compile_for(
    assignment: Assignment, plan: PartitionPlan, device: str, place: torch.device
) -> tuple[CompiledStage, ...]:
    """The stages of ``plan`` that run on ``device``; none if it is idle."""
    captured = assignment.captured
    return tuple(
        compile_stage(captured.graph, plan, index, place, captured.modules)
        for index, stage in enumerate(plan.stages)
        if stage.device == device
    )


class Preparation:
    """A plan that another thread compiles, which also makes room for what will arrive."""

    def __init__(self, plan: PartitionPlan) -> None:
        self.plan = plan
        self.landing = Landing()
        self._compiled: tuple[CompiledStage, ...] = ()
        self._error: Exception | None = None
        self._thread: threading.Thread

    def begin(self, assignment: Assignment, current: PartitionPlan, device: str, place: torch.device) -> None:
        graph, copies = assignment.captured.graph, 1 + round(assignment.optimizer.state_ratio)

        def compile_it() -> None:
            try:
                self._compiled = compile_for(assignment, self.plan, device, place)
                self.landing.prepare(
                    [
                        graph.parameters[m.name]
                        for m in moves(graph, current, self.plan)
                        if m.target == device and m.name in graph.parameters
                    ],
                    copies,
                    place,
                )
            except Exception as error:  # noqa: BLE001 - raised again where the plan is switched to
                self._error = error

        self._thread = threading.Thread(target=compile_it)
        self._thread.start()

    def result(self) -> tuple[CompiledStage, ...]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._compiled
