from __future__ import annotations

import numpy as np
import pytest

from forescale.forecast.bank import ForecasterBank
from forescale.forecast.forecaster import Array
from forescale.forecast.scoring import weighted_quantile_loss

LEVELS = (0.1, 0.5, 0.9)


def forecasts(values_T: Array, told_T: Array, *, told: bool) -> tuple[ForecasterBank, Array]:
    """quantiles_TL of each value, one step ahead, with or without its covariate."""
    bank = ForecasterBank(1, 1.0, (1,), LEVELS, covariates=("size",) if told else ())
    said = []
    for value, size in zip(values_T, told_T, strict=True):
        said.append(bank.predict(np.array([[size]]) if told else None)[0, 0])
        bank.update(np.array([value]), np.array([[size]]) if told else None)
    return bank, np.array(said)


@pytest.fixture
def sizes_T() -> Array:
    return np.random.default_rng(3).choice([32.0, 64.0, 128.0, 256.0], 60)


def test_what_is_proportional_to_a_covariate_is_forecast_from_it_soon(sizes_T: Array) -> None:
    values_T = 0.02 * sizes_T * np.random.default_rng(4).lognormal(sigma=0.05, size=60)
    loss = {}
    for told in (False, True):
        _, said_TL = forecasts(values_T, sizes_T, told=told)
        loss[told] = weighted_quantile_loss(values_T[15:], said_TL[15:], LEVELS)
    assert loss[True] < 0.3 * loss[False]


def test_unknown_and_missing_covariates_leave_the_level(sizes_T: Array) -> None:
    bank, _ = forecasts(np.full(60, 5.0), np.where(np.arange(60) % 3 == 0, np.nan, sizes_T), told=True)
    assert bank.predict(np.array([[np.nan]]))[0, 0] == pytest.approx(5.0, abs=0.2)
    assert np.isfinite(bank.member_quantiles()).all()


def test_flags_are_no_proportions() -> None:
    flags_T = (np.arange(60) % 20 == 19).astype(float)
    bank, _ = forecasts(10.0 + 5.0 * flags_T, flags_T, told=True)
    of_member = dict(zip(bank.member_names, bank.member_quantiles()[0, :, 0, 1], strict=True))
    assert of_member["proportional_to_size"] == pytest.approx(10.0, abs=5.0)


def test_state_holds_the_proportions(sizes_T: Array) -> None:
    bank, _ = forecasts(0.02 * sizes_T, sizes_T, told=True)
    twin = ForecasterBank(1, 1.0, (1,), LEVELS, covariates=("size",))
    twin.restore(bank.state())
    told = np.array([[512.0]])
    assert np.array_equal(bank.predict(told), twin.predict(told))
