from __future__ import annotations

import re
from dataclasses import replace
from statistics import median

import pytest

from chain_model import GB, ChainCosts
from forescale.control.planner import Planner
from forescale.control.replay import replay
from forescale.control.training import step as control_step
from forescale.control.utilisation import expected_use, with_expected_use
from forescale.core.cluster import Cluster
from forescale.engine.messages import Repartitioned, StepFinished
from simulated_training import Noise, SimulatedRun, train


@pytest.fixture(scope="module")
def run() -> SimulatedRun:
    return train(60, noise=Noise(sigma=0.03), seed=3)


@pytest.fixture
def planner() -> Planner:
    return Planner(ChainCosts(), max_chunks=1)


def observed_busy(run: SimulatedRun, device: str) -> list[float]:
    return [
        (report.forward_s + report.backward_s + report.optimizer_s) / event.step_s
        for event in run.records
        if isinstance(event, StepFinished)
        for report in event.stages
        if report.device == device
    ]


@pytest.mark.parametrize("device", ["cpu0", "cpu1"])
def test_forecast_is_the_median_and_an_upper_bound_of_what_was_seen(run, device) -> None:
    middle, high = expected_use(run.state)[device].busy_L
    seen = observed_busy(run, device)
    assert middle == pytest.approx(median(seen), abs=0.02)
    assert middle < high < max(seen) + 0.05
    assert sum(value <= high for value in seen) >= 0.9 * len(seen)


def test_memory_is_a_fraction_of_the_capacity_where_it_was_measured(run) -> None:
    used_bytes = run.state.plan.prediction.stages[0].memory_bytes
    use = expected_use(run.state)
    assert use["cpu0"].memory_L == pytest.approx((used_bytes / GB,) * 2)
    event = next(r for r in reversed(run.records) if isinstance(r, StepFinished))
    unmeasured = tuple(replace(report, memory_bytes=0) for report in event.stages)
    fresh = replace(run.state, use={})
    state, _ = control_step(fresh, replace(event, step=event.step + 1, stages=unmeasured), run.config)
    assert expected_use(state)["cpu0"].memory_L is None


def test_a_new_plan_is_watched_afresh(run) -> None:
    plan = run.state.plan
    event = Repartitioned(step=60, reason="", pause_s=0.0, moved_bytes=0, before=plan, after=plan)
    state, _ = control_step(run.state, event, run.config)
    assert expected_use(state) == {}
    assert with_expected_use("why", state) == "why"


def test_decisions_say_how_busy_the_devices_would_stay() -> None:
    run = train(120, speeds=lambda step: {"cpu1": 0.4} if step >= 60 else {}, noise=Noise(sigma=0.03))
    assert re.search(r"Expected busy .*cpu1 \d+% \(up to \d+%\)", run.commands[0].reason)
    assert run.commands[0].reason == next(d for d in run.decisions if d.acted).reason


def test_idle_device_is_expected_to_stay_idle() -> None:
    run = train(120, speeds=lambda step: {"cpu1": 0.05} if step >= 20 else {})
    assert run.state.plan is not None
    assert [stage.device for stage in run.state.plan.stages] == ["cpu0"]
    assert expected_use(run.state)["cpu1"].busy_L == (0.0, 0.0)


def test_replay_comes_to_the_same_forecast(run, planner) -> None:
    assert replay(run.records, planner).expected_use == expected_use(run.state)


def test_cluster_order(run, planner) -> None:
    cluster: Cluster = planner.cluster({"rows": 8, "length": 128})
    assert list(expected_use(run.state)) == [device.name for device in cluster.devices]
