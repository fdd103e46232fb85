"""Anomalies and shifts: what is found in a signal, and how often nothing is taken for something."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from forescale.forecast.changes import AnomalyFlags, ShiftDetector
from forescale.forecast.forecaster import Array
from forescale.forecast.snapshot import restore, snapshot

SERIES, STEPS, WARM_UP = 32, 5000, 64


def gaussian(rng: np.random.Generator) -> Array:
    return rng.standard_normal((STEPS, SERIES))


def heavy(rng: np.random.Generator) -> Array:
    return rng.standard_normal((STEPS, SERIES)) / rng.random((STEPS, SERIES)) ** 0.5  # tail index 2


def rare_counts(rng: np.random.Generator) -> Array:
    return rng.poisson(0.05, size=(STEPS, SERIES)).astype(np.float64) - 0.05


def counts(rng: np.random.Generator) -> Array:
    return 1e-3 * (rng.poisson(2.0, size=(STEPS, SERIES)).astype(np.float64) - 2.0)


def autocorrelated(rng: np.random.Generator) -> Array:
    noise = rng.normal(size=(STEPS, SERIES))
    for t in range(1, STEPS):
        noise[t] += 0.8 * noise[t - 1]
    return noise


def clustered(rng: np.random.Generator) -> Array:
    """Calm and wild times take turns (GARCH)."""
    noise, variance = np.zeros((STEPS, SERIES)), np.ones(SERIES)
    for t in range(STEPS):
        noise[t] = np.sqrt(variance) * rng.normal(size=SERIES)
        variance = 0.05 + 0.25 * noise[t] ** 2 + 0.7 * variance
    return noise


Noise = Callable[[np.random.Generator], Array]
every_noise = pytest.mark.parametrize(
    "noise", [gaussian, heavy, rare_counts, counts, autocorrelated, clustered]
)


@every_noise
@pytest.mark.parametrize("rate", [0.001, 0.01])
def test_anomalies_in_noise_are_as_rare_as_set(noise: Noise, rate: float) -> None:
    flags = AnomalyFlags(SERIES, false_alarm_rate=rate)
    errors = noise(np.random.default_rng(1))
    flagged = np.array([flags.update(errors_N) for errors_N in errors])
    assert not flagged[:WARM_UP].any()
    assert 0.4 * rate < flagged[WARM_UP:].mean() < 1.4 * rate
    assert flagged[WARM_UP:].mean(axis=0).max() < 2.5 * rate  # in each series, not only on average


@every_noise
def test_shifts_in_noise_are_as_rare_as_set(noise: Noise) -> None:
    detector = ShiftDetector(SERIES, false_alarm_rate=0.001)
    errors = noise(np.random.default_rng(2))
    found = np.array([detector.update(errors_N) for errors_N in errors])
    assert found.mean() < 0.0015


@pytest.mark.parametrize("noise", [gaussian, counts, autocorrelated])
def test_outliers_are_flagged_and_what_follows_is_not(noise: Noise) -> None:
    flags = AnomalyFlags(SERIES)
    errors = noise(np.random.default_rng(3))
    strange = np.arange(600, STEPS, 900)
    errors[strange] += 12.0 * errors.std()
    flagged = np.array([flags.update(errors_N) for errors_N in errors])
    assert flagged[strange].mean() > 0.95
    assert flagged[strange + 1].mean() < 0.02


def test_any_change_of_a_constant_series_is_an_anomaly() -> None:
    flags = AnomalyFlags(1)
    for _ in range(200):
        assert not flags.update(np.zeros(1))
    assert flags.update(np.full(1, 1e-9))


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_a_shift_is_found_within_some_steps(direction: float) -> None:
    detector = ShiftDetector(SERIES)
    errors = np.random.default_rng(4).normal(size=(530, SERIES))
    errors[500:] += 4.0 * direction
    found = np.array([detector.update(errors_N) for errors_N in errors])[500:]
    assert found.any(axis=0).all()
    assert np.argmax(found, axis=0).max() <= 8


def test_an_outlier_alone_is_no_shift() -> None:
    detector = ShiftDetector(1)
    errors = np.random.default_rng(5).normal(size=300)
    errors[200] = 1e6
    assert not any(detector.update(np.array([error])) for error in errors)


def test_missing_errors_change_nothing() -> None:
    errors = np.random.default_rng(6).normal(size=400)
    errors[300:] += 5.0
    plain_flags, holey_flags = AnomalyFlags(1), AnomalyFlags(1)
    plain_shifts, holey_shifts = ShiftDetector(1), ShiftDetector(1)
    found = []
    for error in errors:
        newest, missing = np.array([error]), np.array([np.nan])
        plain, holey = plain_shifts.update(newest), holey_shifts.update(newest)
        assert plain == holey
        plain_flags.update(newest)
        holey_flags.update(newest)
        found.append(holey[0])
        assert not holey_flags.update(missing)[0]
        assert not holey_shifts.update(missing)[0]
    np.testing.assert_array_equal(snapshot(plain_flags)["_errors_NW"], snapshot(holey_flags)["_errors_NW"])
    np.testing.assert_array_equal(snapshot(plain_flags)["_limit_N"], snapshot(holey_flags)["_limit_N"])
    assert any(found)


@pytest.mark.parametrize("kind", [AnomalyFlags, ShiftDetector])
def test_a_restored_one_goes_on_exactly(kind: type[AnomalyFlags] | type[ShiftDetector]) -> None:
    rng = np.random.default_rng(7)
    known, restored = kind(4), kind(4)
    for _ in range(300):
        known.update(rng.normal(size=4))
    state = snapshot(known)
    restore(restored, state)
    kept = {name: np.copy(array) for name, array in state.items()}
    for _ in range(300):
        errors_N = rng.normal(loc=1.0, size=4) ** 3
        np.testing.assert_array_equal(known.update(errors_N), restored.update(errors_N))
    for name, array in state.items():  # later updates do not reach into it
        np.testing.assert_array_equal(array, kept[name])
