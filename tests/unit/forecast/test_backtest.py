from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from clocks import Ticks
from forescale.core.errors import InvalidInput
from forescale.forecast.backtest import run_backtest, run_backtest_with_peaks, spread_origins
from forescale.forecast.forecaster import Array, Covariates

STEPS, LEVELS = (1, 3), (0.5, 0.9)
NAN = float("nan")


class Recorder:
    """Forecasts the last value, ten more at the upper level, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[float] = []
        self.covariates: list[Covariates | None] = []
        self.asked_with: list[Covariates | None] = []
        self.seen_when_asked: list[int] = []

    def update(self, value: float, covariates: Covariates | None = None) -> None:
        self.given.append(value)
        self.covariates.append(covariates)

    def predict(self, covariates: Covariates | None = None) -> Array:
        self.seen_when_asked.append(len(self.given))
        self.asked_with.append(covariates)
        return np.tile([self.given[-1], self.given[-1] + 10.0], (len(STEPS), 1))

    def predict_peak(self, lead_s: float, levels: Sequence[float]) -> Array:
        return np.full(len(levels), self.given[-1] + lead_s)


def test_origins_are_spread_over_the_second_half() -> None:
    origins = spread_origins(100, STEPS, count=10)
    assert len(origins) == 10
    assert origins[0] == 49
    assert origins[-1] == 96  # its last target is the last value
    assert set(np.diff(origins)) <= {5, 6}


def test_no_more_origins_than_there_are() -> None:
    assert spread_origins(10, STEPS, count=50) == (4, 5, 6)
    assert spread_origins(10, STEPS, warm_up=2) == (1, 2, 3, 4, 5, 6)


def test_series_without_an_origin_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too short"):
        spread_origins(5, STEPS, warm_up=4)


def test_forecaster_has_seen_the_origin_and_nothing_after() -> None:
    recorder = Recorder()
    origins = (4, 6)
    run_backtest(
        recorder, np.arange(10.0), horizon_steps=STEPS, levels=LEVELS, origins=origins, clock=Ticks()
    )
    assert recorder.seen_when_asked == [5, 7]
    assert recorder.given == list(range(7))


def test_forecasts_are_scored_against_what_came() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 20.0, 7.0])
    result = run_backtest(
        Recorder(), values, horizon_steps=STEPS, levels=LEVELS, origins=(2, 3), clock=Ticks()
    )
    assert np.array_equal(result.targets_OH, [[4.0, 20.0], [5.0, 7.0]])
    # One step: short by 1 at the median, 9 over at the 90% level, both times.
    assert result.loss_H[0] == pytest.approx(2 * (0.5 * 1 + 0.1 * 9) / 2 * 2 / 9)
    # Three steps: short by 17 and by 7, then by 3 and 7 over.
    assert result.loss_H[1] == pytest.approx((0.5 * 17 + 0.9 * 7 + 0.5 * 3 + 0.1 * 7) / 27)
    assert np.array_equal(result.coverage_HL, [[0.0, 1.0], [0.0, 0.5]])


def test_missing_target_is_left_out() -> None:
    values = np.array([1.0, 2.0, 3.0, NAN, 5.0, 6.0, 7.0])
    result = run_backtest(Recorder(), values, horizon_steps=STEPS, levels=LEVELS, origins=(2,), clock=Ticks())
    assert np.isnan(result.loss_H[0])
    assert result.loss_H[1] > 0


def test_covariates_are_those_of_the_step() -> None:
    recorder = Recorder()
    covariates = [{"tokens": float(t)} for t in range(10)]
    run_backtest(
        recorder,
        np.arange(10.0),
        horizon_steps=STEPS,
        levels=LEVELS,
        origins=(5,),
        clock=Ticks(),
        covariates_T=covariates,
    )
    assert recorder.covariates == covariates[:6]
    assert recorder.asked_with == [{"tokens": 6.0}]


def test_time_of_updates_and_decisions_and_progress() -> None:
    seen: list[int] = []
    result = run_backtest(
        Recorder(),
        np.arange(10.0),
        horizon_steps=STEPS,
        levels=LEVELS,
        origins=(3, 5),
        clock=Ticks(),
        on_progress=seen.append,
    )
    assert result.update_s == 1.0
    assert result.decision_s == 2.0
    assert seen == [1, 2, 3, 4, 5, 6]


def test_peaks_are_the_maxima_up_to_each_horizon() -> None:
    values = np.array([9.0, 1.0, 5.0, 2.0, NAN, 4.0])
    points, peaks = run_backtest_with_peaks(
        Recorder(),
        values,
        step_s=10.0,
        horizon_steps=STEPS,
        levels=LEVELS,
        origins=(0, 1, 2),
        clock=Ticks(),
    )
    assert np.array_equal(peaks.targets_OH, [[1.0, 5.0], [5.0, 5.0], [2.0, 4.0]])
    assert np.array_equal(peaks.quantiles_OHL[0], [[19.0, 19.0], [39.0, 39.0]])
    assert np.array_equal(points.targets_OH, [[1.0, 2.0], [5.0, NAN], [2.0, 4.0]], equal_nan=True)
    assert np.array_equal(points.quantiles_OHL[0], [[9.0, 19.0], [9.0, 19.0]])


def test_fewer_origins_of_a_result() -> None:
    result = run_backtest(
        Recorder(), np.arange(10.0), horizon_steps=STEPS, levels=LEVELS, origins=(3, 4, 6), clock=Ticks()
    )
    fewer = result.at((3, 6))
    assert fewer.origins == (3, 6)
    assert np.array_equal(fewer.targets_OH, [[4.0, 6.0], [7.0, 9.0]])
    assert np.array_equal(fewer.quantiles_OHL[:, 0, 0], [3.0, 6.0])
