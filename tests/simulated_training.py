"""Training on a cluster made of predicted times, true speeds and noise, driven by the real controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from chain_model import ChainCosts, batch
from forescale.control.log import Header, Record
from forescale.control.planner import Planner
from forescale.control.policy import Policy
from forescale.control.state import ControlConfig, ControlState, Decision
from forescale.control.training import step as control_step
from forescale.engine.messages import (
    BatchesAhead,
    Binding,
    Event,
    Repartition,
    Repartitioned,
    RunStarted,
    StageReport,
    StepFinished,
    Stop,
)
from forescale.plan.moves import move_bytes
from forescale.plan.partition_plan import PartitionPlan


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Of a step's compute seconds, per device: lognormal, with slow outliers."""

    sigma: float = 0.0
    outliers: float = 0.0  # fraction of steps
    outlier_factor: float = 3.0

    def draw(self, rng: np.random.Generator) -> float:
        factor = float(np.exp(self.sigma * rng.standard_t(4) / 2**0.5)) if self.sigma else 1.0
        return factor * (rng.uniform(1.2, self.outlier_factor) if rng.random() < self.outliers else 1.0)


@dataclass(kw_only=True)
class SimulatedRun:
    """What happened: the record, and what the tests ask about it."""

    config: ControlConfig
    records: list[Record]
    decisions: list[Decision] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    stopped: Stop | None = None
    state: ControlState = field(default_factory=ControlState)

    @property
    def repartitions(self) -> list[Repartitioned]:
        return [record for record in self.records if isinstance(record, Repartitioned)]

    @property
    def commands(self) -> list[Repartition | Stop]:
        return [record for record in self.records if isinstance(record, (Repartition, Stop))]


def train(
    steps: int,
    *,
    costs: ChainCosts | None = None,
    speeds: Callable[[int], Mapping[str, float]] = lambda step: {},
    lengths: Callable[[int], int] = lambda step: 128,
    noise: Noise | None = None,
    seed: int = 0,
    depth: int = 8,
    policy: Policy | None = None,
    first_plan: PartitionPlan | None = None,
    max_chunks: int | None = 1,
) -> SimulatedRun:
    """Train for some steps.

    Args:
        speeds: step -> true speeds of the devices (1 where left out).
        lengths: step -> length of its batch.
        depth: how many batches are looked at ahead.
        max_chunks: most stages of one device.
        first_plan: instead of the best one for the first batch.
    """
    policy, noise, rng = policy or Policy(), noise or Noise(), np.random.default_rng(seed)
    planner = Planner(costs or ChainCosts(), max_chunks=max_chunks)
    config = ControlConfig(policy=policy, planner=planner)
    plan = first_plan or planner.best(batch(lengths(0)), {})
    run = SimulatedRun(config=config, records=[Header(policy=policy, run={})])
    pending: Repartition | None = None

    def tell(event: Event) -> None:
        nonlocal pending
        decision = run.state.decision
        run.state, commands = control_step(run.state, event, config)
        run.records += [event, *commands]
        if run.state.decision is not None and run.state.decision is not decision:
            run.decisions.append(run.state.decision)
        for command in commands:
            if isinstance(command, Stop):
                run.stopped = command
            else:
                pending = command

    tell(RunStarted(plan=plan, next_step=0))
    tell(BatchesAhead(first_step=0, bindings=tuple(batch(lengths(i)) for i in range(min(depth, steps)))))
    for step in range(steps):
        if run.stopped:
            break
        if pending is not None and (pending.before_step is None or pending.before_step <= step):
            command, pending, before = pending, None, plan
            plan = command.plan
            tell(_repartitioned(step, command, before, planner, batch(lengths(step))))
        event = _step(step, plan, batch(lengths(step)), speeds(step), planner, lambda: noise.draw(rng))
        run.step_s.append(event.step_s)
        tell(event)
        if step + depth < steps:
            tell(BatchesAhead(first_step=step + depth, bindings=(batch(lengths(step + depth)),)))
    return run


def _repartitioned(
    step: int, command: Repartition, before: PartitionPlan, planner: Planner, binding: Binding
) -> Repartitioned:
    return Repartitioned(
        step=step,
        reason=command.reason,
        pause_s=0.01 + planner.move_s(binding, before, command.plan),
        moved_bytes=move_bytes(planner.problem(binding, {}).graph, before, command.plan, 2.0),
        before=before,
        after=command.plan,
    )


def _step(
    step: int,
    plan: PartitionPlan,
    binding: Binding,
    speeds: Mapping[str, float],
    planner: Planner,
    noise: Callable[[], float],
) -> StepFinished:
    true = planner.prediction(plan, binding, speeds)
    used = dict.fromkeys(stage.device for stage in plan.stages)
    factors = {device: noise() for device in used}
    compute_s, memory_bytes = dict.fromkeys(used, 0.0), dict.fromkeys(used, 0)
    for stage, time_s, predicted in zip(
        plan.stages, planner.compute_s(plan, binding, speeds), true.stages, strict=True
    ):
        compute_s[stage.device] += time_s * factors[stage.device]
        memory_bytes[stage.device] += predicted.memory_bytes
    reports = {device: _report(device, compute_s[device], memory_bytes[device]) for device in used}
    return StepFinished(
        step=step,
        step_s=true.step_s * max(factors.values()),
        loss=1.0 / (step + 1),
        binding=binding,
        rows=binding["rows"],
        tokens=binding["rows"] * binding["length"],
        stages=tuple(
            reports.get(device.name) or _report(device.name, 0.0, 0)  # idle workers report, too
            for device in planner.cluster(binding).devices
        ),
        predicted_s=true.step_s,
    )


def _report(device: str, compute_s: float, memory_bytes: int) -> StageReport:
    return StageReport(
        device=device,
        forward_s=compute_s / 3,
        backward_s=compute_s * 2 / 3,
        optimizer_s=0.0,
        transfer_s=0.0,
        wait_s=0.0,
        cpu_s=compute_s,
        memory_bytes=memory_bytes,
    )
