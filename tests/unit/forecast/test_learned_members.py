"""The pretrained network and its correction: what they make of series they have never seen."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest

from forescale.forecast.forecaster import Array
from forescale.forecast.history import RecentValues
from forescale.forecast.members.member import Moment, Targets
from forescale.forecast.members.network import LEVELS_G, between_levels
from forescale.forecast.members.tuning import TunedNetwork

LEVELS = (0.1, 0.5, 0.9)
TARGETS = Targets(
    lead_steps_J=np.array([1, 6, 20, 6], dtype=np.int64), peak_J=np.array([False, False, False, True])
)
NETWORK, SLOWLY, FAST = range(3)


class Told:
    """A member that is told values step by step."""

    def __init__(self, series: int, season_steps: int | None = None) -> None:
        self.member = TunedNetwork(series, TARGETS, levels=LEVELS, season_steps=season_steps)
        self.history = RecentValues(series, 1000)

    def tell(self, values_N: Array) -> Array:
        known_N = np.where(np.isnan(values_N), 0.0, values_N)
        self.history.append(known_N, np.full(len(values_N), self.history.steps == 0))
        now = Moment(
            step=self.history.steps,
            seen_N=np.ones(len(values_N)),
            observed_N=values_N,
            values_N=known_N,
            level_N=known_N,
            scale_N=np.ones(len(values_N)),
            due_NJ=np.zeros((len(values_N), 4)),
            history=self.history,
        )
        self.member.update(now)
        return self.member.quantiles_NMJL(now)


def forecasts(values_NT: Array, season_steps: int | None = None) -> Array:
    """quantiles_TNMJL made after each value."""
    told = Told(len(values_NT), season_steps)
    return np.array([told.tell(values_N) for values_N in values_NT.T])


def pinball(ahead_TN: Array, quantiles_TNML: Array) -> Array:
    """Mean loss of each of M forecasts."""
    over_TNML = ahead_TN[:, :, None, None] - quantiles_TNML
    levels_L = np.array(LEVELS)
    return np.maximum(levels_L * over_TNML, (levels_L - 1.0) * over_TNML).mean(axis=(0, 1, 3))


def demand(rng: np.random.Generator, series: int, steps: int) -> Array:
    """A day of 48 steps, and noise that lasts."""
    day_T = 50.0 + 30.0 * np.sin(2 * np.pi * np.arange(steps) / 48)
    noise_NT = rng.normal(size=(series, steps))
    for t in range(1, steps):
        noise_NT[:, t] += 0.6 * noise_NT[:, t - 1]
    return day_T + 3.0 * noise_NT


def test_series_do_not_disturb_each_other() -> None:
    values_NT = demand(np.random.default_rng(0), 3, 150)
    values_NT[1] *= 1e6
    together = forecasts(values_NT, 48)
    for n in range(3):
        np.testing.assert_allclose(together[:, n], forecasts(values_NT[n : n + 1], 48)[:, 0], rtol=1e-4)


def test_another_unit_gives_the_same_forecasts_in_that_unit() -> None:
    values_NT = demand(np.random.default_rng(1), 2, 150)
    np.testing.assert_allclose(forecasts(1e4 * values_NT, 48), 1e4 * forecasts(values_NT, 48), rtol=1e-3)


def test_what_is_to_come_changes_nothing() -> None:
    values_NT = demand(np.random.default_rng(2), 1, 160)
    other_NT = values_NT.copy()
    other_NT[:, 120:] += 1000.0
    before, after = forecasts(values_NT, 48), forecasts(other_NT, 48)
    np.testing.assert_array_equal(before[:120], after[:120])
    assert not np.allclose(before[120:], after[120:])


def test_the_network_sees_season_and_noise_without_having_been_trained_on_them() -> None:
    values_NT = demand(np.random.default_rng(3), 8, 480)
    quantiles = forecasts(values_NT, 48)[240:-20]
    for j, lead in enumerate(TARGETS.lead_steps_J[:3].tolist()):
        ahead_TN = values_NT.T[240 + lead : len(values_NT.T) - 20 + lead]
        last_TN11 = values_NT.T[240:-20, :, None, None]
        network, slowly, _ = pinball(ahead_TN, quantiles[:, :, :, j])
        naive = pinball(ahead_TN, np.broadcast_to(last_TN11, quantiles[:, :, :, j].shape))[0]
        assert network < (0.85, 0.4, 0.25)[j] * naive
        assert slowly < 1.02 * network
        below = (ahead_TN[:, :, None] <= quantiles[:, :, SLOWLY, j]).mean(axis=(0, 1))
        np.testing.assert_allclose(below, LEVELS, atol=0.13)


def test_peaks_are_forecast_as_peaks() -> None:
    values_NT = demand(np.random.default_rng(4), 8, 480)
    quantiles = forecasts(values_NT, 48)[240:-20, :, SLOWLY, 3]
    window_NT = np.lib.stride_tricks.sliding_window_view(values_NT, 6, axis=1).max(axis=2)
    peak_TN = window_NT.T[241 : 241 + len(quantiles)]
    below = (peak_TN[:, :, None] <= quantiles).mean(axis=(0, 1))
    np.testing.assert_allclose(below, LEVELS, atol=0.13)


def test_the_correction_learns_what_the_network_gets_wrong() -> None:
    rng = np.random.default_rng(5)
    steps = 1500
    values_NT = np.where(rng.random((4, steps)) < 0.5, -1.0, 1.0) + 0.01 * rng.normal(size=(4, steps))
    for t in range(1, steps):  # what goes up comes down: nothing in nature, and no anchor, does that
        values_NT[:, t] = -0.9 * values_NT[:, t - 1] + 0.3 * values_NT[:, t]
    quantiles = forecasts(values_NT)[1000:-1, :, :, 0]
    network, slowly, fast = pinball(values_NT.T[1001:], quantiles)
    assert fast < slowly < 0.9 * network


@pytest.mark.parametrize("kind", ["constant", "zero", "huge", "idle then busy", "tiny", "missing"])
def test_forecasts_are_finite_and_near_the_values_whatever_comes(kind: str) -> None:
    rng = np.random.default_rng(6)
    values_T = {
        "constant": np.full(120, 7.3),
        "zero": np.zeros(120),
        "huge": 1e12 * rng.random(120),
        "idle then busy": np.concatenate([np.zeros(100), rng.poisson(500, 20)]).astype(np.float64),
        "tiny": 1e-9 * rng.random(120),
        "missing": np.where(rng.random(120) < 0.3, np.nan, rng.random(120)),
    }[kind]
    quantiles = forecasts(values_T[None])
    assert np.isfinite(quantiles).all()
    low, high = np.nanmin(values_T), np.nanmax(values_T)
    reach = 4.0 * (high - low) + 1e-2 * abs(high) + 1e-9
    assert quantiles.min() >= low - reach
    assert quantiles.max() <= high + reach


def test_missing_values_are_not_learned_from() -> None:
    told = Told(1)
    rng = np.random.default_rng(7)
    for _ in range(100):
        told.tell(rng.normal(5.0, 1.0, 1))
    before = {name: np.copy(getattr(told.member, name)) for name in ("_error_JNK", "_correction_CJNLF")}
    told.tell(np.array([np.nan]))
    for name, array in before.items():
        np.testing.assert_array_equal(array, getattr(told.member, name))


def test_what_is_called_learned_is_all_there_is() -> None:
    values_NT = demand(np.random.default_rng(8), 2, 200)
    told, restored = Told(2, 48), Told(2, 48)
    for values_N in values_NT.T[:120]:
        told.tell(values_N)
    for name in told.member.learned:
        setattr(restored.member, name, deepcopy(getattr(told.member, name)))
    restored.history = deepcopy(told.history)
    for values_N in values_NT.T[120:]:
        np.testing.assert_array_equal(told.tell(values_N), restored.tell(values_N))


def test_quantiles_between_known_levels() -> None:
    known = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    at = known @ between_levels(LEVELS_G, (0.01, 0.5, 0.995, 0.97, 0.999))
    np.testing.assert_allclose(at[:3], [0.0, 4.0, 9.0])
    assert 7.0 < at[3] < 8.0
    assert at[4] > 9.0
