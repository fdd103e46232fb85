from __future__ import annotations

from dataclasses import replace

import pytest

from chain_model import ChainCosts, batch
from forescale.control.planner import Planner
from forescale.control.policy import Policy
from forescale.control.state import ControlConfig, ControlState, Trigger
from forescale.control.training import predicted_step_s, step
from forescale.engine.messages import (
    BatchesAhead,
    CheckpointWritten,
    Repartition,
    Repartitioned,
    RunStarted,
    StageReport,
    StepFinished,
    Stop,
    WorkerExited,
)
from forescale.plan.partition_plan import PartitionPlan, Stage
from simulated_training import train

COSTS = ChainCosts()


@pytest.fixture
def config() -> ControlConfig:
    return ControlConfig(policy=Policy(), planner=Planner(COSTS))


@pytest.fixture
def plan(config: ControlConfig) -> PartitionPlan:
    return config.planner.best(batch(128), {})


def finished(
    number: int, plan: PartitionPlan, config: ControlConfig, slowness: dict[str, float]
) -> StepFinished:
    compute_s = config.planner.compute_s(plan, batch(128), {})
    reports = tuple(
        StageReport(
            device=stage.device,
            forward_s=time_s * slowness.get(stage.device, 1.0),
            backward_s=0.0,
            optimizer_s=0.0,
            transfer_s=0.0,
            wait_s=0.0,
            cpu_s=0.0,
            memory_bytes=0,
        )
        for stage, time_s in zip(plan.stages, compute_s, strict=True)
    )
    return StepFinished(
        step=number,
        step_s=1.0,
        loss=1.0,
        binding=batch(128),
        rows=8,
        tokens=8,
        stages=reports,
        predicted_s=1.0,
    )


def after_steps(
    count: int, plan: PartitionPlan, config: ControlConfig, slowness: dict[str, float]
) -> tuple[ControlState, list]:
    state, commands = step(ControlState(), RunStarted(plan=plan, next_step=0), config)
    given = list(commands)
    for number in range(count):
        state, commands = step(state, finished(number, plan, config, slowness), config)
        given += commands
    return state, given


def test_step_changes_neither_state_nor_event(config, plan) -> None:
    state, _ = after_steps(10, plan, config, {"cpu1": 1.1})
    before = repr(state)
    event = finished(10, plan, config, {"cpu1": 3.0})
    first = step(state, event, config)
    assert repr(state) == before
    assert step(state, event, config) == first


def test_one_command_answers_one_change(config, plan) -> None:
    state, commands = after_steps(40, plan, config, {"cpu1": 2.5})
    (command,) = commands  # it is never carried out here, and not asked for twice
    assert isinstance(command, Repartition)
    assert state.pending == command
    assert state.speeds["cpu1"] == pytest.approx(0.4, rel=0.01)
    assert state.speeds["cpu0"] == pytest.approx(1.0, rel=0.01)


def test_single_outlier_is_no_evidence(config, plan) -> None:
    state, _ = after_steps(30, plan, config, {})
    state, commands = step(state, finished(30, plan, config, {"cpu1": 10.0}), config)
    assert commands == ()
    for number in range(31, 40):
        state, commands = step(state, finished(number, plan, config, {}), config)
        assert commands == ()
    assert state.decision is None


def test_device_that_was_judged_while_it_still_grew_slower_is_judged_again(config, plan) -> None:
    """As recorded: for some steps the other device was slow as well, so the plan stayed at first."""
    recorded = [(1.0, 1.04), (1.26, 1.0), (1.04, 1.06), (1.06, 1.05), (1.03, 1.03)]
    slowed = [(1.77, 1.05), (1.27, 1.78), (1.32, 2.2), (1.98, 2.14), (1.63, 3.01), (2.72, 3.26), (2.92, 3.19)]
    steps = [*(2 * recorded), *slowed, (2.2, 3.08), *(40 * [(1.6, 3.2)])]
    state, commands = after_steps(2, plan, config, {})
    decisions = []
    for number, (cpu0, cpu1) in enumerate(steps, start=2):
        state, commands = step(state, finished(number, plan, config, {"cpu0": cpu0, "cpu1": cpu1}), config)
        if state.decision not in decisions:
            decisions.append(state.decision)
        if commands:
            break
    assert commands, decisions
    assert len(decisions) >= 3
    assert state.speeds["cpu1"] == pytest.approx(1 / 3.2, rel=0.05)


def test_no_outlier_makes_twice_the_time_ordinary(config, plan) -> None:
    # As recorded: it grew slower while it was judged, and came back.
    slowness = [*(10 * [1.04]), 1.78, 2.2, 2.14, 3.01, 3.26, 3.19, 3.08, 2.98, 3.38, 2.94, 2.99, 3.31, 3.47]
    slowness += [3.74, 3.31, 3.44, 4.11, 3.59, 4.41, 4.25, 3.2, 3.66, 3.86, 3.67, 3.92, 4.56, 3.72, 3.66]
    state, _ = after_steps(2, plan, config, {})
    bands = []
    for number, times in enumerate(slowness, start=2):
        state, _ = step(state, finished(number, plan, config, {"cpu0": times, "cpu1": times}), config)
        bands += [watch.band_above for watch in state.watches.values()]
    assert max(bands) <= 0.7


def test_reports_of_another_plan_are_not_judged(config, plan) -> None:
    alone = replace(plan, stages=(Stage(device="cpu0", operators=tuple(range(24))),))
    state, _ = after_steps(20, plan, config, {})
    for number in range(20, 40):
        state, commands = step(state, finished(number, alone, config, {"cpu0": 5.0}), config)
        assert commands == ()
    assert state.watches["cpu0"].observations == 18


def test_first_steps_are_not_judged(config, plan) -> None:
    state, commands = after_steps(Policy().settle_steps, plan, config, {"cpu1": 9.0})
    assert commands == []
    assert state.watches == {}


def test_batches_may_be_announced_before_the_plan(config, plan) -> None:
    long = tuple(batch(128) if i < 3 else batch(512) for i in range(8))
    state, commands = step(ControlState(), BatchesAhead(first_step=0, bindings=long), config)
    assert commands == ()
    state, commands = step(state, RunStarted(plan=plan, next_step=0), config)
    (command,) = commands
    assert isinstance(command, Repartition)
    assert command.before_step == 3
    assert state.decision is not None
    assert state.decision.trigger is Trigger.LOAD


def test_deviation_replaces_a_change_that_is_further_ahead_and_it_is_asked_for_again(config, plan) -> None:
    state, _ = after_steps(20, plan, config, {})
    ahead = tuple(batch(128) if i < 12 else batch(512) for i in range(16))
    state, (load,) = step(state, BatchesAhead(first_step=20, bindings=ahead), config)
    assert isinstance(load, Repartition)
    assert load.before_step == 32
    number, commands = 20, ()
    while not commands:
        state, commands = step(state, finished(number, plan, config, {"cpu1": 2.5}), config)
        number += 1
    assert number <= 26
    (urgent,) = commands
    assert isinstance(urgent, Repartition)
    assert urgent.before_step is None
    done = Repartitioned(
        step=number, reason=urgent.reason, pause_s=0.02, moved_bytes=1, before=plan, after=urgent.plan
    )
    state, commands = step(state, done, config)
    assert state.plan == urgent.plan
    assert [command.before_step for command in commands if isinstance(command, Repartition)] in ([], [32])


def test_slow_moves_make_later_ones_dearer(config, plan) -> None:
    state, (command,) = after_steps(20, plan, config, {"cpu1": 2.5})
    done = Repartitioned(step=20, reason="", pause_s=9.0, moved_bytes=1, before=plan, after=command.plan)
    state, _ = step(state, done, config)
    assert state.move_overhead_s == pytest.approx(9.0, abs=0.1)


def test_lost_worker_ends_the_run(config, plan) -> None:
    state, _ = after_steps(3, plan, config, {})
    _, commands = step(state, WorkerExited(device="cpu1", cause="signal 9"), config)
    assert commands == (Stop(reason="the worker on cpu1 exited: signal 9"),)


def test_checkpoint_changes_nothing(config, plan) -> None:
    state, _ = after_steps(3, plan, config, {})
    assert step(state, CheckpointWritten(step=3, path="x"), config) == (state, ())


def test_prediction_follows_the_estimated_speeds(config, plan) -> None:
    assert predicted_step_s(ControlState(), batch(128), config) is None
    state, _ = after_steps(40, plan, config, {"cpu0": 1.25, "cpu1": 1.25})
    assert predicted_step_s(state, batch(128), config) == pytest.approx(
        config.planner.prediction(plan, batch(128), {"cpu0": 0.8, "cpu1": 0.8}).step_s, rel=0.01
    )


def test_every_decision_says_how_much_and_why() -> None:
    run = train(100, speeds=lambda number: {"cpu1": 0.4} if number >= 40 else {})
    (decision, *_) = run.decisions
    for part in ("cpu1 computes 2.5", "times as long", "operators", "ms", "saves", "MB and costs"):
        assert part in decision.reason
