"""Whatever a series does, forecasts are finite, ascending, not below their bound, and survive a restart."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.forecast.bank import ForecasterBank
from forescale.forecast.ensemble import EnsembleForecaster

LEVELS = (0.1, 0.5, 0.9, 0.99)

numbers = st.one_of(
    st.just(0.0),
    st.just(float("nan")),
    st.just(1e12),
    st.floats(-1e12, 1e12),
    st.floats(0.0, 10.0),
    st.floats(allow_nan=True, allow_infinity=True),
)
stretches = st.tuples(numbers, st.integers(1, 12))


@st.composite
def series(draw: st.DrawFn) -> np.ndarray:
    """Stretches of equal values, with noise or without: idle, constant, jumping, missing."""
    parts = draw(st.lists(stretches, max_size=6))
    values_T = np.array([value for value, steps in parts for _ in range(steps)])
    if draw(st.booleans()):
        values_T = values_T + np.random.default_rng(draw(st.integers(0, 9))).standard_normal(len(values_T))
    return values_T


@settings(deadline=None, max_examples=40)
@given(series(), series(), st.sampled_from([0.0, None, -5.0]))
def test_forecasts_are_finite_ascending_and_bounded(
    one_T: np.ndarray, two_T: np.ndarray, lower: float | None
) -> None:
    bank = ForecasterBank(2, 600.0, (1, 7), LEVELS, lower=lower)
    for t in range(max(len(one_T), len(two_T))):
        bank.update(np.array([values_T[t] if t < len(values_T) else np.nan for values_T in (one_T, two_T)]))
        for quantiles in (bank.predict(), bank.predict_peak(1800.0), bank.predict_peak(60.0, (0.5, 0.999))):
            assert np.isfinite(quantiles).all()
            assert (np.diff(quantiles, axis=-1) >= 0.0).all()
            assert lower is None or (quantiles >= lower).all()
        values_NHL = bank.predict()
        highest_NHL = np.stack([bank.predict_peak(steps * 600.0) for steps in (1, 7)], axis=1)
        assert (highest_NHL[:, 0] == values_NHL[:, 0]).all()  # the highest of one value
        assert (highest_NHL[:, 1] >= values_NHL.max(axis=1)).all()


@settings(deadline=None, max_examples=15)
@given(series(), series())
def test_a_restart_changes_no_later_forecast(before_T: np.ndarray, after_T: np.ndarray) -> None:
    ensemble = EnsembleForecaster(600.0, (1, 7), LEVELS)
    for value in before_T:
        ensemble.update(float(value))
    again = EnsembleForecaster(600.0, (1, 7), LEVELS)
    again.restore(json.loads(json.dumps(ensemble.state())))
    for value in after_T:
        ensemble.update(float(value))
        again.update(float(value))
        assert np.array_equal(again.predict(), ensemble.predict())
        assert np.array_equal(again.predict_peak(1800.0, LEVELS), ensemble.predict_peak(1800.0, LEVELS))


@settings(deadline=None, max_examples=15)
@given(st.integers(-3, 12), st.integers(0, 9))
def test_the_unit_does_not_matter(power: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values_T = rng.gamma(2.0, 10.0, 60)
    one, other = (ForecasterBank(1, 600.0, (1, 7), LEVELS) for _ in range(2))
    for value in values_T:
        one.update(np.array([value]))
        other.update(np.array([value * 10.0**power]))
    assert np.allclose(other.predict(), one.predict() * 10.0**power, rtol=1e-3)
