from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from forescale.core.errors import InvalidInput
from forescale.forecast.bank import ForecasterBank
from forescale.forecast.ensemble import EnsembleForecaster
from forescale.forecast.snapshot import as_json, fork

LEVELS = (0.1, 0.5, 0.9, 0.95)


def small_bank(series: int = 2, **options: Any) -> ForecasterBank:
    return ForecasterBank(series, 60.0, (1, 4), LEVELS, **options)


def fed(bank: ForecasterBank, values_TN: np.ndarray) -> ForecasterBank:
    for values_N in values_TN:
        bank.update(values_N)
    return bank


@pytest.fixture
def noise_TN() -> np.ndarray:
    return np.random.default_rng(5).poisson((20.0, 300.0), (150, 2)).astype(float)


def test_nothing_seen_is_no_nan() -> None:
    assert np.array_equal(small_bank().predict(), np.zeros((2, 2, 4)))
    assert np.array_equal(small_bank(lower=3.0).predict(), np.full((2, 2, 4), 3.0))


def test_constant_series_is_forecast_exactly_once_errors_are_known() -> None:
    bank = fed(small_bank(1), np.full((200, 1), 7.0))
    assert bank.predict()[0] == pytest.approx(7.0, abs=0.02)
    assert bank.predict_peak(240.0)[0] == pytest.approx(7.0, abs=0.02)


def test_idle_series_stays_at_zero_and_a_burst_does_not_explode() -> None:
    bank = fed(small_bank(1), np.zeros((200, 1)))
    assert np.abs(bank.predict()).max() < 1e-6
    bank.update(np.array([5.0]))
    fed(bank, np.zeros((20, 1)))
    assert bank.predict().max() < 50.0


def test_series_of_a_bank_are_forecast_as_if_alone(noise_TN: np.ndarray) -> None:
    together = fed(small_bank(2), noise_TN)
    alone = fed(small_bank(1), noise_TN[:, 1:])
    assert together.predict()[1] == pytest.approx(alone.predict()[0], rel=1e-4)


def test_more_series_than_a_block_holds_keep_their_order() -> None:
    bank = ForecasterBank(300, 60.0, (1,), (0.5, 0.9))
    level_N = np.arange(300.0) + 100.0
    for _ in range(3):
        bank.update(level_N)
    assert bank.predict()[:, 0, 0] == pytest.approx(level_N, rel=0.05)


def test_daily_season_is_found_and_used() -> None:
    steps = np.arange(600)
    values_T = 50.0 + 40.0 * np.sin(2 * np.pi * steps / 48)
    bank = ForecasterBank(1, 1800.0, (1, 12), LEVELS)
    for value in values_T:
        bank.update(np.array([value]))
    ahead = 50.0 + 40.0 * np.sin(2 * np.pi * (599 + 12) / 48)
    assert bank.predict()[0, 1, 1] == pytest.approx(ahead, abs=4.0)


def test_cycle_of_unknown_length_is_found() -> None:
    pulses_T = np.where(np.arange(700) % 37 == 0, 100.0, 10.0)  # no season of the clock
    bank = ForecasterBank(1, 1.0, (1, 37), LEVELS)
    for value in pulses_T[:666]:  # the next one is a pulse: 666 = 18 x 37
        bank.update(np.array([value]))
    assert bank.predict()[0, 0, 1] > 60.0


def test_weights_sum_to_one_and_have_names(noise_TN: np.ndarray) -> None:
    bank = fed(small_bank(), noise_TN)
    weights_NMHL = bank.weights()
    assert weights_NMHL.shape == (2, len(bank.member_names), 2, 4)
    assert weights_NMHL.sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    assert len(set(bank.member_names)) == len(bank.member_names)


def test_a_poor_member_loses_weight(noise_TN: np.ndarray) -> None:
    bank = fed(small_bank(), noise_TN)
    weights_M = dict(zip(bank.member_names, bank.weights()[1, :, 0, 1], strict=True))
    # Of noise around a level, the last value is the worst forecast, a long mean the best.
    assert weights_M["ewma_0.02"] > 3 * weights_M["last"]


def test_peaks_are_higher_over_longer_leads_and_cover(noise_TN: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    bank = ForecasterBank(20, 1.0, (1, 8), (0.5, 0.9))
    values_TN = rng.poisson(50.0, (700, 20)).astype(float)
    missed = []
    for t in range(690):
        bank.update(values_TN[t])
        if t > 200:
            missed.append(values_TN[t + 1 : t + 9].max(axis=0) > bank.predict_peak(8.0)[:, 1])
    assert (bank.predict_peak(8.0)[:, 0] > bank.predict_peak(1.0)[:, 0]).mean() > 0.9
    assert np.mean(missed) == pytest.approx(0.1, abs=0.03)


def test_upper_quantiles_cover_after_a_lasting_change_of_noise() -> None:
    rng = np.random.default_rng(2)
    bank = ForecasterBank(10, 1.0, (1, 5), (0.5, 0.95))
    width_T = np.where(np.arange(900) < 450, 1.0, 6.0)
    values_TN = 100.0 + width_T[:, None] * rng.standard_normal((900, 10))
    missed = []
    for t in range(895):
        bank.update(values_TN[t])
        if t >= 500:
            missed.append(bank.predict()[:, :, 1] < values_TN[[t + 1, t + 5]].T)
    assert np.mean(missed, axis=(0, 1)) == pytest.approx(0.05, abs=0.025)


def test_missing_values_do_not_move_the_forecast_far(noise_TN: np.ndarray) -> None:
    bank = fed(small_bank(), noise_TN)
    before = bank.predict()
    fed(bank, np.full((30, 2), np.nan))
    assert bank.predict() == pytest.approx(before, rel=0.3)


def test_covariates_of_the_steps_to_come_are_used() -> None:
    rng = np.random.default_rng(3)
    work_T = rng.choice([1.0, 5.0], 500)
    bank = ForecasterBank(1, 1.0, (1,), LEVELS, covariates=("work",))
    for t in range(499):
        bank.update(np.array([10.0 * work_T[t] + rng.normal(0.0, 0.3)]), np.array([[work_T[t]]]))
        bank.predict(np.array([[work_T[t + 1]]]))
    low, high = (bank.predict(np.array([[work]]))[0, 0, 1] for work in (1.0, 5.0))
    assert low == pytest.approx(10.0, abs=3.0)
    assert high == pytest.approx(50.0, abs=3.0)


def test_state_is_lossless_and_not_moved_by_later_values(noise_TN: np.ndarray) -> None:
    bank = fed(small_bank(), noise_TN[:100])
    state = bank.state()
    expected = [fed(bank, values_N[None]).predict() for values_N in noise_TN[100:]]
    again = small_bank()
    again.restore(state)
    for values_N, quantiles_NHL in zip(noise_TN[100:], expected, strict=True):
        again.update(values_N)
        assert np.array_equal(again.predict(), quantiles_NHL)


def test_state_of_an_ensemble_is_json(noise_TN: np.ndarray) -> None:
    ensemble = EnsembleForecaster(60.0, (1, 4), LEVELS)
    for value in noise_TN[:50, 0]:
        ensemble.update(float(value))
    again = EnsembleForecaster(60.0, (1, 4), LEVELS)
    again.restore(json.loads(json.dumps(ensemble.state())))
    for value in noise_TN[50:60, 0]:
        ensemble.update(float(value))
        again.update(float(value))
    assert np.array_equal(again.predict(), ensemble.predict())
    assert np.array_equal(again.predict_peak(120.0, (0.9,)), ensemble.predict_peak(120.0, (0.9,)))


def test_state_of_another_bank_is_refused() -> None:
    with pytest.raises(InvalidInput, match="same arguments"):
        small_bank(2).restore(small_bank(3).state())


@pytest.mark.parametrize(
    "options",
    [
        {"horizon_steps": ()},
        {"horizon_steps": (0,)},
        {"levels": (0.5, 0.2)},
        {"levels": (0.5, 1.0)},
        {"step_s": 0.0},
        {"series": 0},
        {"season_steps": 0},
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"series": 1, "step_s": 1.0, **options}
    with pytest.raises(InvalidInput):
        ForecasterBank(**arguments)


def test_values_of_another_number_of_series_are_refused() -> None:
    with pytest.raises(InvalidInput, match="shape"):
        small_bank(2).update(np.zeros(3))
    with pytest.raises(InvalidInput, match="covariates"):
        small_bank(2).update(np.zeros(2), np.zeros((2, 1)))


def test_a_lead_beyond_the_longest_horizon_is_refused() -> None:
    with pytest.raises(InvalidInput, match="longer horizon"):
        small_bank().predict_peak(300.0)


@pytest.mark.parametrize("light", [False, True])
def test_what_a_fork_learns_is_its_own(noise_TN: np.ndarray, light: bool) -> None:
    bank = fed(small_bank(light=light, covariates=("known",)), noise_TN[:80])
    before = as_json(bank.state())
    twin = fed(fork(bank), noise_TN[80:])
    assert as_json(bank.state()) == before
    assert np.array_equal(twin.predict(), fed(bank, noise_TN[80:]).predict())


def test_light_bank_knows_levels_and_covariates() -> None:
    rng = np.random.default_rng(8)
    bank = ForecasterBank(1, 1.0, (1,), LEVELS, lower=None, covariates=("size", "other"), light=True)
    told_TK = rng.normal(size=(200, 2))
    for told_K in told_TK:
        bank.predict(told_K[None])
        bank.update(np.array([3.0 * told_K[0]]), told_K[None])
    assert bank.predict(np.array([[1.5, 0.0]]))[0, 0, 1] == pytest.approx(4.5, abs=0.5)
    with pytest.raises(InvalidInput, match="light"):
        bank.predict_peak(1.0)


def test_errors_of_the_first_values_do_not_widen_forecasts_for_long() -> None:
    rng = np.random.default_rng(9)
    bank = ForecasterBank(20, 1.0, (1,), (0.05, 0.5, 0.95), lower=None, light=True)
    fed(bank, 0.03 * rng.standard_normal((15, 20)))
    low_N, _, high_N = bank.predict()[:, 0].T
    assert (high_N - low_N).max() < 0.3  # of a Gaussian: 0.1
