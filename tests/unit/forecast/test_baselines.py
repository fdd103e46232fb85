from __future__ import annotations

import numpy as np
import pytest

from forescale.forecast.baselines import MovingWindow, SeasonalNaive

NAN = float("nan")


def fed(forecaster: SeasonalNaive | MovingWindow, values: list[float]) -> np.ndarray:
    for value in values:
        forecaster.update(value)
    return forecaster.predict()


def test_season_is_repeated_exactly() -> None:
    naive = SeasonalNaive(1.0, (1, 2, 3, 4, 7), (0.5, 0.9), season_steps=3)
    assert np.array_equal(fed(naive, [1.0, 2.0, 3.0] * 10)[:, 0], [1.0, 2.0, 3.0, 1.0, 1.0])


def test_without_a_season_it_is_the_last_value_with_its_errors() -> None:
    rng = np.random.default_rng(0)
    walk = list(np.cumsum(rng.normal(0.0, 1.0, 600)))
    quantiles = fed(SeasonalNaive(1.0, (1, 16), (0.1, 0.5, 0.9)), walk)
    spread = quantiles[:, 2] - quantiles[:, 0]
    assert quantiles[0, 1] == pytest.approx(walk[-1], abs=0.2)
    assert spread[0] == pytest.approx(2 * 1.28, rel=0.2)
    assert spread[1] > 2 * spread[0]  # four times the standard deviation, as of a random walk


def test_errors_are_those_a_season_apart() -> None:
    values = [0.0, 100.0] * 50 + [5.0, 105.0] * 50  # once in a hundred steps, a shift by 5
    quantiles = fed(SeasonalNaive(1.0, (1,), (0.5, 0.999), season_steps=2), values)
    assert np.array_equal(quantiles, [[5.0, 10.0]])


def test_before_a_season_is_known_the_last_value() -> None:
    assert np.array_equal(fed(SeasonalNaive(1.0, (1,), (0.5,), season_steps=9), [3.0, 4.0]), [[4.0]])


def test_missing_values_are_those_of_the_season_before() -> None:
    naive = SeasonalNaive(1.0, (1,), (0.5,), season_steps=2)
    assert np.array_equal(fed(naive, [NAN, 1.0, 2.0, NAN, 2.0, NAN, 2.0]), [[1.0]])


def test_nothing_seen_is_no_nan() -> None:
    assert np.array_equal(SeasonalNaive(1.0, (1, 5), (0.5,)).predict(), np.zeros((2, 1)))
    assert np.array_equal(MovingWindow(3, np.max, (1, 5), (0.5,)).predict(), np.zeros((2, 1)))


def test_window_forgets_and_skips_missing_values() -> None:
    values = [9.0, 1.0, 3.0, NAN, 2.0]
    assert np.array_equal(fed(MovingWindow(3, np.max, (1, 5), (0.5, 0.9)), values), np.full((2, 2), 3.0))
    assert np.array_equal(fed(MovingWindow(3, np.mean, (1,), (0.5,)), values), [[2.0]])
