from __future__ import annotations

import re
from dataclasses import replace
from statistics import median

import pytest

from chain_model import GB, ChainCosts
from forescale.control.planner import Planner
from forescale.control.policy import Policy
from forescale.control.replay import replay
from forescale.control.state import ControlState
from forescale.control.training import step as control_step
from forescale.control.utilisation import with_expected_use
from forescale.core.cluster import Cluster
from forescale.engine.messages import BatchesAhead, Repartitioned, RunStarted, StepFinished
from forescale.forecast.snapshot import as_json
from simulated_training import Noise, SimulatedRun, train


@pytest.fixture(scope="module")
def run() -> SimulatedRun:
    return train(60, noise=Noise(sigma=0.03), seed=3)


@pytest.fixture
def planner() -> Planner:
    return Planner(ChainCosts(), max_chunks=1)


def observed_s(event: StepFinished, device: str) -> float:
    return sum(r.forward_s + r.backward_s + r.optimizer_s for r in event.stages if r.device == device)


def observed_busy(run: SimulatedRun, device: str) -> list[float]:
    finished = [record for record in run.records if isinstance(record, StepFinished)]
    return [observed_s(event, device) / event.step_s for event in finished]


@pytest.mark.parametrize("device", ["cpu0", "cpu1"])
def test_forecast_is_the_median_and_an_upper_bound_of_what_was_seen(run, device) -> None:
    middle, high = run.state.use[device].busy_L
    seen = observed_busy(run, device)
    assert middle == pytest.approx(median(seen), abs=0.02)
    assert middle < high < max(seen) + 0.05
    assert sum(value <= high for value in seen) >= 0.9 * len(seen)


def test_memory_is_a_fraction_of_the_capacity_where_it_was_measured(run) -> None:
    used_bytes = run.state.plan.prediction.stages[0].memory_bytes
    use = run.state.use
    assert use["cpu0"].memory_L == pytest.approx((used_bytes / GB,) * 2)
    event = next(r for r in reversed(run.records) if isinstance(r, StepFinished))
    unmeasured = tuple(replace(report, memory_bytes=0) for report in event.stages)
    fresh = replace(run.state, use={})
    state, _ = control_step(fresh, replace(event, step=event.step + 1, stages=unmeasured), run.config)
    assert state.use["cpu0"].memory_L is None


def test_a_new_plan_is_watched_afresh(run) -> None:
    plan = run.state.plan
    event = Repartitioned(step=60, reason="", pause_s=0.0, moved_bytes=0, before=plan, after=plan)
    state, _ = control_step(run.state, event, run.config)
    assert state.use == {}
    assert with_expected_use("why", state) == "why"


def test_decisions_say_how_busy_the_devices_would_stay() -> None:
    run = train(120, speeds=lambda step: {"cpu1": 0.4} if step >= 60 else {}, noise=Noise(sigma=0.03))
    assert re.search(r"Expected busy .*cpu1 \d+% \(up to \d+%\)", run.commands[0].reason)
    assert run.commands[0].reason == next(d for d in run.decisions if d.acted).reason


def test_idle_device_is_expected_to_stay_idle() -> None:
    run = train(120, speeds=lambda step: {"cpu1": 0.05} if step >= 20 else {})
    assert run.state.plan is not None
    assert [stage.device for stage in run.state.plan.stages] == ["cpu0"]
    assert run.state.use["cpu1"].busy_L == (0.0, 0.0)


def test_replay_comes_to_the_same_forecast(run, planner) -> None:
    assert replay(run.records, planner).expected_use == run.state.use


def test_a_longer_batch_in_view_is_expected_to_take_longer() -> None:
    still = Policy(adapt=False)
    run = train(
        41, lengths=lambda step: 512 if step == 40 else 128, policy=still, noise=Noise(sigma=0.03), depth=41
    )
    finished = [r for r in run.records if isinstance(r, StepFinished)]
    known, told = run.records.index(finished[-2]), list[float]()
    for ahead in (True, False):
        state = ControlState()
        for record in run.records[: known + 1]:
            if isinstance(record, RunStarted | StepFinished) or (ahead and isinstance(record, BatchesAhead)):
                state, _ = control_step(state, record, run.config)
        told.append(state.use["cpu0"].busy_s_L[0])
    came_s = observed_s(finished[-1], "cpu0")
    assert told[0] == pytest.approx(came_s, rel=0.1)
    assert told[1] < 0.5 * came_s


def test_forecasts_of_a_state_are_not_changed_by_what_comes_after_it(run) -> None:
    event = next(r for r in reversed(run.records) if isinstance(r, StepFinished))
    learned = as_json(run.state.forecaster.state())
    slow = tuple(replace(report, forward_s=9.0) for report in event.stages)
    control_step(run.state, replace(event, step=event.step + 1, stages=slow), run.config)
    assert as_json(run.state.forecaster.state()) == learned


def test_an_outlier_does_not_widen_the_band(run) -> None:
    event = next(r for r in reversed(run.records) if isinstance(r, StepFinished))
    before = run.state.watches["cpu0"]
    slow = tuple(replace(report, forward_s=9.0) for report in event.stages)
    state, _ = control_step(run.state, replace(event, step=event.step + 1, stages=slow), run.config)
    state, _ = control_step(state, replace(event, step=event.step + 2), run.config)
    after = state.watches["cpu0"]
    assert after.observations == before.observations + 2
    assert after.band_above == pytest.approx(before.band_above, rel=0.2)


def test_cluster_order(run, planner) -> None:
    cluster: Cluster = planner.cluster({"rows": 8, "length": 128})
    assert list(run.state.use) == [device.name for device in cluster.devices]
