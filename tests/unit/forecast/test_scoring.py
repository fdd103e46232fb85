from __future__ import annotations

import numpy as np
import pytest

from forescale.forecast.scoring import coverage, pinball_losses, weighted_quantile_loss

NAN = float("nan")


def test_shortfall_costs_the_level_and_excess_the_rest() -> None:
    losses = pinball_losses(np.array([10.0, 10.0]), np.array([[8.0, 8.0], [14.0, 14.0]]), (0.9, 0.25))
    assert losses == pytest.approx(np.array([[2 * 0.9, 2 * 0.25], [4 * 0.1, 4 * 0.75]]))


def test_loss_at_the_median_is_the_absolute_error_over_the_magnitude() -> None:
    values = np.array([10.0, -30.0])
    assert weighted_quantile_loss(values, np.array([[7.0], [-25.0]]), (0.5,)) == pytest.approx(8 / 40)


def test_loss_is_averaged_over_levels() -> None:
    values, quantiles = np.array([10.0]), np.array([[9.0, 12.0]])
    alone = [
        weighted_quantile_loss(values, quantiles[:, [i]], (level,)) for i, level in enumerate((0.5, 0.9))
    ]
    assert weighted_quantile_loss(values, quantiles, (0.5, 0.9)) == pytest.approx(sum(alone) / 2)


def test_true_quantiles_are_the_best_forecast() -> None:
    values = np.random.default_rng(0).normal(50.0, 5.0, 4000)
    levels = (0.1, 0.5, 0.95)
    true = np.quantile(values, levels)

    def loss(off: float) -> float:
        return weighted_quantile_loss(values, np.tile(true + off, (4000, 1)), levels)

    assert loss(0.0) < min(loss(-1.0), loss(1.0))


def test_missing_targets_count_for_nothing() -> None:
    values, quantiles = np.array([10.0, NAN, 20.0]), np.array([[9.0], [1e9], [25.0]])
    kept = [0, 2]
    assert weighted_quantile_loss(values, quantiles, (0.5,)) == weighted_quantile_loss(
        values[kept], quantiles[kept], (0.5,)
    )
    assert coverage(values, quantiles) == pytest.approx([0.5])


def test_nothing_known_gives_no_score() -> None:
    values, quantiles = np.array([NAN]), np.array([[1.0]])
    assert np.isnan(weighted_quantile_loss(values, quantiles, (0.5,)))
    assert np.isnan(coverage(values, quantiles)).all()


def test_series_of_zeros() -> None:
    assert weighted_quantile_loss(np.zeros(3), np.zeros((3, 1)), (0.5,)) == 0.0
    assert weighted_quantile_loss(np.zeros(3), np.ones((3, 1)), (0.5,)) == float("inf")


def test_a_value_at_its_quantile_is_covered() -> None:
    assert coverage(np.array([1.0, 2.0, 3.0, 4.0]), np.tile([2.0, 4.0], (4, 1))) == pytest.approx([0.5, 1.0])
