"""Scaling ahead of demand against scaling after it, on the same demand."""

from __future__ import annotations

import numpy as np
import pytest

from forescale.control.scale import ScalingRules
from simulated_serving import CAPACITY_PER_S, TICK_S, Outcome, serve

AHEAD = ScalingRules()


def season(seasons: int = 4, season_s: float = 60.0) -> list[float]:
    """A day in a minute, from 100 to 900 rows/s."""
    times_s = np.arange(0.0, seasons * season_s, TICK_S)
    return (500.0 - 400.0 * np.cos(2.0 * np.pi * times_s / season_s)).tolist()


def ramp() -> list[float]:
    return np.interp(np.arange(0.0, 80.0, TICK_S), [30.0, 50.0], [80.0, 1000.0]).tolist()


def burst() -> list[float]:
    return [700.0 if 40.0 <= tick * TICK_S < 60.0 else 60.0 for tick in range(round(100.0 / TICK_S))]


def bursts() -> list[float]:
    """Of three seconds, every fifteen, for four minutes; then nothing but a trickle."""
    busy = [600.0 if tick * TICK_S % 15.0 < 3.0 else 20.0 for tick in range(960)]
    return [*busy, *[20.0] * 900]


def after(demand_per_s: list[float], settle_s: float) -> Outcome:
    """Only what is seen counts."""
    return serve(demand_per_s, ScalingRules(level=None, settle_s=settle_s), seed=1)


def test_forecasts_make_fewer_rows_late_with_no_more_replicas_over_a_season() -> None:
    ahead = serve(season(), AHEAD, seed=1)
    for settle_s in (5.0, 10.0, 15.0, 20.0, 30.0):
        seen = after(season(), settle_s)
        assert ahead.late <= seen.late / 2 or ahead.replica_s <= seen.replica_s * 0.9, settle_s
    assert ahead.late < 0.005


def test_cautious_forecasts_see_a_ramp_that_never_was_a_little_earlier() -> None:
    assert serve(ramp(), ScalingRules(level=0.95), seed=1).late < after(ramp(), AHEAD.settle_s).late


def test_replicas_are_kept_for_bursts_that_come_again_and_no_longer_than_it_pays() -> None:
    ahead, seen = serve(bursts(), AHEAD, seed=1), after(bursts(), AHEAD.settle_s)
    assert ahead.late <= seen.late / 2
    assert ahead.replica_s < seen.replica_s
    assert any("kept for bursts" in reason for reason in ahead.reasons)
    assert ahead.wanted[-1] == 1


def test_a_burst_that_nobody_saw_coming_is_met_by_the_queue_and_forgotten() -> None:
    outcome = serve(burst(), AHEAD, seed=1)
    came = round(40.0 / TICK_S)
    assert max(outcome.wanted[came : came + 8]) * CAPACITY_PER_S >= 700.0
    assert any("rows wait" in reason for reason in outcome.reasons)
    assert outcome.wanted[-1] < max(outcome.wanted)


def test_the_same_seed_decides_the_same() -> None:
    assert serve(burst()[:120], AHEAD, seed=3) == serve(burst()[:120], AHEAD, seed=3)


@pytest.mark.parametrize("level", [0.95, None])
def test_steady_demand_gets_steady_replicas(level: float | None) -> None:
    outcome = serve([240.0] * 240, ScalingRules(level=level), seed=2)
    settled = outcome.wanted[120:]
    assert 2 <= min(settled) <= max(settled) <= 4


def test_where_starts_are_quick_waiting_rows_get_replicas_before_they_are_late() -> None:
    rng = np.random.default_rng(4)
    gusts = np.repeat(rng.pareto(1.5, 60).clip(max=6.0) * 150.0, 6).tolist()  # 1.5 s each, of any strength
    soon = serve(gusts, AHEAD, seed=1, start_s=0.25)
    for other in (ScalingRules(level=None), ScalingRules(soon_share=100.0)):
        late = serve(gusts, other, seed=1, start_s=0.25)
        assert soon.late < 0.6 * late.late
        assert soon.replica_s < late.replica_s
