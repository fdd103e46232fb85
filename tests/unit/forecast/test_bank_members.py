"""Members and facts of a bank's caller: slow models, events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from forescale.core.errors import InvalidInput
from forescale.forecast.bank import ForecasterBank
from forescale.forecast.ensemble import EnsembleForecaster
from forescale.forecast.members.member import Targets
from forescale.forecast.members.refitted import SlowMembers

LEVELS = (0.1, 0.5, 0.9, 0.95)


@dataclass(frozen=True)
class Oracle:
    """Fitted in no time; knows that a season of three steps goes on."""

    name: str = "oracle"
    history_steps: int = 30

    def fit(self, values_T: np.ndarray, targets: Targets, levels: Sequence[float]) -> OracleFit:
        return OracleFit(targets, len(levels))


@dataclass(frozen=True)
class OracleFit:
    targets: Targets
    levels: int

    def quantiles_JL(self, values_T: np.ndarray, elapsed: int) -> np.ndarray:
        at_J = np.where(
            self.targets.peak_J, values_T[-3:].max(), values_T[-4 + (self.targets.lead_steps_J) % 3]
        )
        return np.repeat(at_J[:, None], self.levels, axis=1)


def test_slow_models_are_members_that_are_weighed_and_fitted_anew_after_a_restore() -> None:
    with ThreadPoolExecutor(1) as executor:
        slow = SlowMembers(models=(Oracle(),), executor=executor, every_steps=10, waits=True)
        ensemble = EnsembleForecaster(60.0, (1, 4), LEVELS, slow=[slow])
        noise = np.random.default_rng(0)
        season = noise.integers(0, 100, 3).astype(float)
        for t in range(90):
            ensemble.update(season[t % 3])
        m = ensemble.member_names.index("oracle")
        assert ensemble.weights()[m].mean(axis=-1).min() > 3.0 / len(ensemble.member_names)
        assert ensemble.member_quantiles()[m, :, 1] == pytest.approx(season[[0, 0]])
        state = json.loads(json.dumps(ensemble.state()))
        for again in (ensemble, EnsembleForecaster(60.0, (1, 4), LEVELS, slow=[slow])):
            again.restore(state)
            assert again.member_quantiles()[m, 0, 1] != pytest.approx(season[0])
            for t in range(90, 92):
                again.update(season[t % 3])
            assert again.member_quantiles()[m, :, 1] == pytest.approx(season[[2, 2]])


def test_two_members_of_one_name_are_refused() -> None:
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(InvalidInput, match="two members are called oracle"),
    ):
        ForecasterBank(1, 60.0, slow=[SlowMembers(models=(Oracle(),), executor=executor)] * 2)


def test_an_event_ahead_shows_from_its_step_on_and_in_maxima_that_reach_it() -> None:
    rng = np.random.default_rng(4)
    event_T = np.repeat(rng.random(100) < 0.2, 5).astype(float)
    ensemble = EnsembleForecaster(60.0, (1, 2, 3, 4), LEVELS, covariates=("event", "never told"))
    for t in range(490):
        ensemble.update(50.0 + 100.0 * event_T[t] + rng.normal(), {"event": event_T[t]})
        ensemble.predict([{"event": event} for event in event_T[t + 1 : t + 5]])
    for _ in range(5):
        ensemble.update(50.0 + rng.normal(), {"event": 0.0})
    upcoming = [{"event": 0.0}] * 2 + [{"event": 1.0}] * 2
    medians = ensemble.predict(upcoming)[:, 1]
    assert medians[:2].max() < 80.0
    assert medians[2:].min() > 110.0
    peaks = [ensemble.predict_peak(lead_s, (0.5,), upcoming)[0] for lead_s in (120.0, 240.0)]
    assert peaks[0] < 80.0
    assert peaks[1] > 110.0
    # An event that is over before a lead ends counts in its maximum, and not at its end.
    passing = [{"event": 0.0}, {"event": 1.0}, {"event": 0.0}, {"event": 0.0}]
    assert ensemble.predict(passing)[3, 1] < 80.0
    assert ensemble.predict_peak(240.0, (0.5,), passing)[0] > 110.0


def test_facts_beyond_those_told_are_unknown_not_wrong() -> None:
    bank = ForecasterBank(1, 60.0, (1, 4), LEVELS, covariates=("event",))
    for t in range(40):
        bank.update(np.array([float(t % 5)]), np.zeros((1, 1)))
    near = bank.predict(np.zeros((1, 2, 1)))
    assert np.array_equal(near, bank.predict(np.array([[[0.0], [0.0], [np.nan], [np.nan]]])))
    with pytest.raises(InvalidInput, match="covariates"):
        bank.predict(np.zeros((1, 4, 2)))
