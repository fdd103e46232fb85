from __future__ import annotations

import json

import numpy as np
import pytest

from forescale.forecast.forecaster import Forecaster
from forescale.forecast.level import LevelForecaster

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def forecaster(horizon_steps: tuple[int, ...] = (1, 5)) -> Forecaster:
    return LevelForecaster(step_s=1.0, horizon_steps=horizon_steps, levels=LEVELS)


def median_after(values: list[float], *, begin: Forecaster | None = None) -> float:
    member = begin or forecaster()
    for value in values:
        member.update(value)
    return float(member.predict()[0, 2])


@pytest.fixture
def noise() -> list[float]:
    return list(np.random.default_rng(3).normal(10.0, 0.2, 200))


def test_nothing_seen_is_no_nan() -> None:
    assert np.array_equal(forecaster().predict(), np.zeros((2, 5)))


def test_constant_series_is_forecast_exactly() -> None:
    member = forecaster()
    for _ in range(50):
        member.update(3.0)
    assert np.array_equal(member.predict(), np.full((2, 5), 3.0))


def test_single_outlier_is_not_taken(noise: list[float]) -> None:
    assert median_after([*noise, 30.0]) == pytest.approx(median_after(noise), abs=0.1)


def test_lasting_shift_is_taken_within_four_steps(noise: list[float]) -> None:
    assert median_after([*noise, 15.0, 15.1, 14.9, 15.0]) == pytest.approx(15.0, abs=0.3)
    assert median_after([*noise, 5.0, 5.1, 4.9, 5.0]) == pytest.approx(5.0, abs=0.3)


def test_shift_after_a_constant_series_is_taken() -> None:
    assert median_after([1.0] * 50 + [2.0]) == pytest.approx(1.0, abs=1e-3)
    assert median_after([1.0] * 50 + [2.0] * 4) == 2.0


def test_slow_drift_is_followed() -> None:
    drift = np.linspace(10.0, 12.0, 400) + np.random.default_rng(1).normal(0, 0.2, 400)
    assert median_after(list(drift)) == pytest.approx(12.0, abs=0.25)


def test_band_stays_calibrated_after_a_shift(noise: list[float]) -> None:
    member = forecaster()
    median_after([*noise, *(value + 8.0 for value in noise[:20])], begin=member)
    low, *_, high = member.predict()[0]
    assert 0.4 < high - low < 1.2


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_cover_what_they_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = 5.0 + 0.3 * rng.standard_t(3, 3000)
    member = forecaster((1, 4))
    below = np.zeros((2, len(LEVELS)))
    origins = range(200, len(values) - 4)
    for i, value in enumerate(values):
        if i in origins:
            quantiles_HL = member.predict()
            assert (np.diff(quantiles_HL, axis=1) >= 0).all()
            below += np.array([[value], [values[i + 3]]]) <= quantiles_HL
        member.update(float(value))
    assert np.abs(below / len(origins) - LEVELS).max() < 0.03


def test_missing_values_change_nothing(noise: list[float]) -> None:
    with_gaps = [x for value in noise for x in (value, float("nan"))]
    assert median_after(with_gaps) == median_after(noise)


def test_restored_goes_on_as_if_never_stopped(noise: list[float]) -> None:
    whole, first = forecaster(), forecaster()
    median_after(noise[:77], begin=whole)
    median_after(noise[:77], begin=first)
    snapshot = json.loads(json.dumps(first.state()))
    median_after(noise[:5], begin=first)  # must not change the snapshot
    second = forecaster()
    second.restore(snapshot)
    rest = [*noise[77:], 20.0, 20.0, 20.0, 20.0]
    median_after(rest, begin=whole)
    median_after(rest, begin=second)
    assert np.array_equal(whole.predict(), second.predict())
    assert json.dumps(whole.state()) == json.dumps(second.state())
