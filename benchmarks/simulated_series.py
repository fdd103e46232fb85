"""Simulated demand and utilisation, with seasons, noise and breaks as real series have them.

Axes: N = series, T = time, P = time of a season.
"""

from __future__ import annotations

import numpy as np

from forescale.forecast.forecaster import Array


def simulate(rng: np.random.Generator, series: int, steps: int, season: int) -> Array:
    """values_NT, all with the same length of a season (not all have one): each series its own mixture."""
    kinds_N = rng.integers(0, 4, series)
    level_NT = np.exp(_season(rng, series, steps, season) + _wandering(rng, series, steps))
    level_NT *= np.exp(_shifts(rng, series, steps))
    level_NT *= 10.0 ** rng.uniform(-1.5, 3.5, (series, 1))
    values_NT = np.empty_like(level_NT)
    for kind, observe in enumerate((_counts, _utilisation, _saws, _measurements)):
        rows = np.flatnonzero(kinds_N == kind)
        values_NT[rows] = observe(rng, level_NT[rows])
    return values_NT


def _some(rng: np.random.Generator, series: int, share: float) -> Array:
    """1 for a share of the series, 0 for the others; as a column."""
    return (rng.random((series, 1)) < share).astype(np.float64)


def _season(rng: np.random.Generator, series: int, steps: int, season: int) -> Array:
    """A day's shape, smooth or of jobs, each day a little different, and quiet weekends."""
    phase_P = np.arange(season) / season
    shape_NP = np.zeros((series, season))
    for harmonic in range(1, 7):
        size_N = rng.normal(size=series) / harmonic ** rng.uniform(0.5, 2.0, series)
        shift_N = rng.random(series)
        shape_NP += size_N[:, None] * np.sin(2 * np.pi * harmonic * (phase_P + shift_N[:, None]))
    for _ in range(3):  # jobs at fixed times
        begin_N, length_N = rng.random((series, 1)), 10.0 ** rng.uniform(-2.5, -0.5, (series, 1))
        shape_NP += (
            _some(rng, series, 0.2) * rng.normal(0, 2, (series, 1)) * ((phase_P - begin_N) % 1.0 < length_N)
        )
    every_N = season // rng.choice([4, 6, 12, 24, 48], (series, 1))  # jobs many times a day
    in_job_NP = (np.arange(season) + rng.integers(0, 99, (series, 1))) % np.maximum(
        every_N, 2
    ) < rng.integers(1, 4, (series, 1))
    shape_NP += _some(rng, series, 0.15) * rng.normal(0.5, 2, (series, 1)) * in_job_NP
    days = -(-steps // season)
    strength_ND = np.exp(rng.normal(0, 1, (series, days)) * rng.choice([0.0, 0.1, 0.4], (series, 1)))
    weekend_D = (np.arange(days) + rng.integers(7)) % 7 >= 5
    offset_ND = -1.0 * weekend_D * rng.uniform(0, 1.5, (series, 1)) * _some(rng, series, 0.4)
    amplitude_N = rng.uniform(0, 1.0, (series, 1)) * _some(rng, series, 0.65)
    whole_NT = (strength_ND[:, :, None] * shape_NP[:, None, :]).reshape(series, -1)[:, :steps]
    return amplitude_N * (whole_NT + np.repeat(offset_ND, season, axis=1)[:, :steps])


def _wandering(rng: np.random.Generator, series: int, steps: int) -> Array:
    """Sums of mean-reverting walks with memories from some steps to thousands, in waves of volatility."""
    total_NT = np.zeros((series, steps))
    for slowest in (1.0, 2.0, 3.5):
        decay_N = 1.0 - 10.0 ** -rng.uniform(slowest - 1.0, slowest, series)
        size_N = rng.choice([0.0, 0.03, 0.1, 0.3, 0.6], series) * np.sqrt(1.0 - decay_N**2)
        shocks_NT = rng.normal(size=(series, steps)) * size_N[:, None]
        heavy = np.flatnonzero(rng.random(series) < 0.3)
        shocks_NT[heavy] = size_N[heavy, None] * rng.standard_t(3, (len(heavy), steps))
        total_NT += _filtered(shocks_NT, decay_N)
    return np.clip(total_NT, -4.0, 4.0)


def _filtered(shocks_NT: Array, decay_N: Array) -> Array:
    """x_t = decay * x_(t-1) + shock_t."""
    out_TN = np.ascontiguousarray(shocks_NT.T)
    for t in range(1, len(out_TN)):
        out_TN[t] += decay_N * out_TN[t - 1]
    return out_TN.T


def _shifts(rng: np.random.Generator, series: int, steps: int) -> Array:
    """Levels that move for good, states that alternate, and bursts that fade."""
    jumps_NT = rng.random((series, steps)) < 10.0 ** rng.uniform(-4.5, -2.3, (series, 1))
    moved_NT = np.cumsum(jumps_NT * rng.normal(0, 0.6, (series, steps)), axis=1) * _some(rng, series, 0.4)
    moved_NT = 2.0 * np.tanh(moved_NT / 2.0)
    switch_NT = rng.random((series, steps)) < 10.0 ** rng.uniform(-2.5, -0.8, (series, 1))
    state_NT = np.cumsum(switch_NT, axis=1) % 2
    moved_NT += state_NT * rng.normal(0, 1.0, (series, 1)) * _some(rng, series, 0.2)
    starts_NT = rng.random((series, steps)) < 10.0 ** rng.uniform(-3.5, -1.5, (series, 1))
    bursts_NT = starts_NT * rng.exponential(1.0, (series, steps)) * _some(rng, series, 0.4)
    fading_N = 1.0 - 10.0 ** -rng.uniform(0.0, 2.2, series)
    return moved_NT + np.minimum(_filtered(bursts_NT, fading_N), 3.0)


def _counts(rng: np.random.Generator, level_NT: Array) -> Array:
    """Independent arrivals, or arrivals in batches, of what may weigh more than one."""
    series = len(level_NT)
    spread_N = rng.choice([0.0, 0.0, 0.05, 0.3, 1.0], (series, 1))
    shape_N = 1.0 / np.maximum(spread_N, 1e-6)
    rate_NT = np.where(spread_N > 0, level_NT * rng.gamma(shape_N, 1.0 / shape_N, level_NT.shape), level_NT)
    batch_N = rng.choice([1.0, 1.0, 1.0, 10.0], (series, 1))
    counts_NT = rng.poisson(np.minimum(rate_NT / batch_N, 1e8)).astype(np.float64)
    weighed_NT = rng.gamma(np.maximum(counts_NT, 1e-9) * 0.8, 1.0 / 0.8) * batch_N
    return np.where(rng.random((series, 1)) < 0.3, weighed_NT, counts_NT * batch_N)


def _noise(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    heavy_NT = rng.standard_t(2.5, shape)
    return np.where(rng.random((shape[0], 1)) < 0.4, heavy_NT, rng.normal(size=shape))


def _utilisation(rng: np.random.Generator, level_NT: Array) -> Array:
    """Shares of a capacity in per cent: saturated, rounded, with spikes of periodic jobs."""
    series, steps = level_NT.shape
    usual_N = np.median(level_NT, axis=1, keepdims=True)
    busy_NT = level_NT / usual_N * 10.0 ** rng.uniform(0.0, 1.9, (series, 1))
    noise_N = rng.choice([0.01, 0.03, 0.1, 0.3], (series, 1)) * np.median(busy_NT, axis=1, keepdims=True)
    busy_NT = busy_NT + noise_N * _noise(rng, (series, steps))
    period_N = rng.integers(4, 200, (series, 1))
    spikes_NT = (np.arange(steps) + rng.integers(0, 200, (series, 1))) % period_N < rng.integers(
        1, 4, (series, 1)
    )
    busy_NT = busy_NT + spikes_NT * rng.exponential(20.0, (series, 1)) * _some(rng, series, 0.25)
    grain_N = rng.choice([1e-6, 0.1, 0.5, 1.0], (series, 1))
    return np.round(np.clip(busy_NT, 0.0, 100.0) / grain_N) * grain_N


def _saws(rng: np.random.Generator, level_NT: Array) -> Array:
    """Memory: climbs until it is set free, by the clock, at a limit, or by chance."""
    series, steps = level_NT.shape
    period_N = 10.0 ** rng.uniform(0.8, 2.8, (series, 1))
    clock_NT = np.floor(np.arange(steps) / period_N)
    chance_NT = np.cumsum(rng.random((series, steps)) < 1.0 / period_N, axis=1)
    cycle_NT = np.where(rng.random((series, 1)) < 0.5, clock_NT, chance_NT)
    fresh_NT = np.diff(cycle_NT, axis=1, prepend=-1.0) > 0
    begin_NT = np.maximum.accumulate(np.where(fresh_NT, np.arange(steps), 0), axis=1)
    climbed_NT = (np.arange(steps) - begin_NT) / period_N
    usual_NT = level_NT / np.median(level_NT, axis=1, keepdims=True)
    saw_NT = rng.uniform(10, 60, (series, 1)) + rng.uniform(2, 40, (series, 1)) * climbed_NT * np.sqrt(
        usual_NT
    )
    saw_NT = saw_NT + rng.choice([0.02, 0.3, 2.0], (series, 1)) * _noise(rng, (series, steps))
    return np.clip(saw_NT, 0.0, 1e3)


def _measurements(rng: np.random.Generator, level_NT: Array) -> Array:
    """Rates with noise that grows with them, sometimes with outliers, sometimes below zero."""
    series, steps = level_NT.shape
    values_NT = level_NT * (
        1.0 + rng.choice([0.01, 0.05, 0.2, 0.5], (series, 1)) * _noise(rng, (series, steps))
    )
    outliers_NT = rng.random((series, steps)) < 10.0 ** rng.uniform(-4.0, -1.7, (series, 1))
    size_NT = rng.exponential(3.0, (series, steps)) * np.median(level_NT, axis=1, keepdims=True)
    values_NT = values_NT + outliers_NT * size_NT * _some(rng, series, 0.4)
    return np.where(rng.random((series, 1)) < 0.8, np.maximum(values_NT, 0.0), values_NT)
