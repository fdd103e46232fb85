from __future__ import annotations

import json
from collections.abc import Callable
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


def test_a_level_that_moves_for_good_is_forecast_from_then_on() -> None:
    rng = np.random.default_rng(9)
    moved_N = np.where(np.arange(12) % 2, 10.0, -10.0)
    values_TN = 100.0 + rng.standard_normal((305, 12))
    values_TN[300:] += moved_N
    bank = fed(ForecasterBank(12, 1.0, (1, 8), (0.1, 0.5, 0.9)), values_TN)
    off_NH = np.abs(bank.predict()[:, :, 1] - (100.0 + moved_N)[:, None])
    assert off_NH.mean(axis=0).max() < 2.0  # members that remember longer would be 6 off


NOISES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "gaussian": lambda rng, shape: 100.0 + rng.standard_normal(shape),
    "heavy": lambda rng, shape: 100.0 + rng.standard_t(2.5, shape),
    "poisson": lambda rng, shape: rng.poisson(3.0, shape).astype(float),
    "autocorrelated": lambda rng, shape: 100.0 + autocorrelated(rng.standard_normal(shape)),
}
ALARM_STEPS, ALARM_SERIES, ALARM_RATE = 600, 12, 0.01
OUTLIERS = slice(200, None, 130)  # fewer than the rate
IN_GAP_T = np.arange(ALARM_STEPS) % 7 > 4


def autocorrelated(noise_TN: np.ndarray) -> np.ndarray:
    for t in range(1, len(noise_TN)):
        noise_TN[t] += 0.8 * noise_TN[t - 1]
    return noise_TN


@pytest.fixture(scope="module")
def flagged() -> dict[str, np.ndarray]:
    """flags_TN of noise of every kind, of series without any, and of noise with outliers."""
    rng = np.random.default_rng(8)
    kinds = {name: noise(rng, (ALARM_STEPS, ALARM_SERIES)) for name, noise in NOISES.items()}
    kinds["idle"] = np.zeros((ALARM_STEPS, 1))
    kinds["constant"] = np.full((ALARM_STEPS, 1), 7.3)
    kinds["missing"] = np.full((ALARM_STEPS, 1), np.nan)
    kinds["outliers"] = 100.0 + rng.standard_normal((ALARM_STEPS, 4))
    kinds["outliers"][OUTLIERS] += 15.0
    kinds["gaps"] = 100.0 + rng.standard_normal((ALARM_STEPS, 1))
    kinds["gaps"][IN_GAP_T] = np.nan
    bank = ForecasterBank(
        sum(values_TN.shape[1] for values_TN in kinds.values()),
        1.0,
        (1,),
        (0.1, 0.5, 0.9),
        false_alarm_rate=ALARM_RATE,
    )
    flags: list[np.ndarray] = []
    for values_N in np.concatenate(list(kinds.values()), axis=1):
        bank.update(values_N)
        flags.append(bank.anomalies())
    ends = np.cumsum([values_TN.shape[1] for values_TN in kinds.values()])
    parts = np.split(np.array(flags), ends[:-1], axis=1)
    return dict(zip(kinds, parts, strict=True))


@pytest.mark.parametrize("noise", NOISES)
def test_of_ordinary_values_as_many_are_flagged_as_was_set(
    flagged: dict[str, np.ndarray], noise: str
) -> None:
    assert not flagged[noise][:64].any()  # nothing is known yet
    assert 0.4 * ALARM_RATE < flagged[noise][100:].mean() < 1.6 * ALARM_RATE


def test_outliers_are_flagged_and_little_else(flagged: dict[str, np.ndarray]) -> None:
    odd_T = np.zeros(ALARM_STEPS, dtype=bool)
    odd_T[OUTLIERS] = True
    assert flagged["outliers"][odd_T].mean() > 0.9
    assert flagged["outliers"][~odd_T].mean() < 1.6 * ALARM_RATE


@pytest.mark.parametrize("quiet", ["idle", "constant", "missing"])
def test_a_series_in_which_nothing_happens_raises_no_alarm(
    flagged: dict[str, np.ndarray], quiet: str
) -> None:
    assert not flagged[quiet].any()


def test_a_missing_value_is_no_anomaly(flagged: dict[str, np.ndarray]) -> None:
    assert not flagged["gaps"][IN_GAP_T].any()
    assert flagged["gaps"].any()


def test_state_is_lossless_and_not_moved_by_later_values(noise_TN: np.ndarray) -> None:
    bank = fed(small_bank(), noise_TN[:100])
    state = bank.state()
    noise_TN[103:] *= 3.0  # an anomaly, and then a shift
    expected = [(fed(bank, values_N[None]).predict(), bank.anomalies()) for values_N in noise_TN[100:]]
    again = small_bank()
    again.restore(state)
    for values_N, (quantiles_NHL, flags_N) in zip(noise_TN[100:], expected, strict=True):
        again.update(values_N)
        assert np.array_equal(again.predict(), quantiles_NHL)
        assert np.array_equal(again.anomalies(), flags_N)
    assert expected[3][1].all()


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
        {"false_alarm_rate": 0.0},
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
    for ask in (lambda: bank.predict_peak(1.0), bank.anomalies):
        with pytest.raises(InvalidInput, match="light"):
            ask()


def test_errors_of_the_first_values_do_not_widen_forecasts_for_long() -> None:
    rng = np.random.default_rng(9)
    bank = ForecasterBank(20, 1.0, (1,), (0.05, 0.5, 0.95), lower=None, light=True)
    fed(bank, 0.03 * rng.standard_normal((15, 20)))
    low_N, _, high_N = bank.predict()[:, 0].T
    assert (high_N - low_N).max() < 0.3  # of a Gaussian: 0.1


def test_a_few_steps_that_are_skipped_are_steps_with_missing_values(noise_TN: np.ndarray) -> None:
    told, skipping = (fed(small_bank(), noise_TN) for _ in range(2))
    fed(told, np.full((3, 2), np.nan))
    skipping.skip(3)
    assert np.array_equal(skipping.predict(), told.predict())
    assert np.array_equal(skipping.predict_peak(240.0), told.predict_peak(240.0))


def test_however_many_are_skipped_the_season_goes_on(noise_TN: np.ndarray) -> None:
    noise_TN[:, 1] += 200.0 * (np.arange(len(noise_TN)) % 40 < 20)
    for steps, is_high in ((215, True), (235, False)):  # 365 is 5 and 385 is 25 within a season
        bank = fed(small_bank(season_steps=40), noise_TN)
        bank.skip(steps)
        fed(bank, noise_TN[(150 + steps) % 40 :][:3])
        assert bool(bank.predict()[1, 0, 1] > 400.0) is is_high
