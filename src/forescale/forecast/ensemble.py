"""The default forecaster of one series: a bank of one.

Axes: H = horizon, L = level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from forescale.forecast.bank import ForecasterBank
from forescale.forecast.forecaster import Array, Covariates, ForecasterState, Upcoming
from forescale.forecast.members.refitted import SlowMembers
from forescale.forecast.snapshot import as_json, from_json


class EnsembleForecaster:
    """Cheap members, weighed online for every horizon and level, with calibrated upper quantiles.

    Args:
        step_s: seconds between values.
        horizon_steps: how many steps ahead.
        levels: quantile levels in (0, 1), ascending.
        season_steps: length of a season; None for a day.
        lower: what no value falls below; None where there is no such bound.
        covariates: names of those that count; others that are told are not used.
        slow: models that take too long to fit within a decision, as further members; in groups, each fitted
            as often as suits.
        false_alarm_rate: fraction of ordinary values that `anomaly` may flag, in (0, 1).

    Raises:
        InvalidInput: of an argument out of range.
    """

    def __init__(
        self,
        step_s: float,
        horizon_steps: Sequence[int] = (1, 5, 15, 60),
        levels: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99),
        season_steps: int | None = None,
        *,
        lower: float | None = 0.0,
        covariates: Sequence[str] = (),
        slow: Sequence[SlowMembers] = (),
        false_alarm_rate: float = 0.001,
    ) -> None:
        self._covariates = tuple(covariates)
        self._bank = ForecasterBank(
            1,
            step_s,
            horizon_steps,
            levels,
            season_steps,
            lower,
            covariates=self._covariates,
            slow=slow,
            false_alarm_rate=false_alarm_rate,
        )

    @property
    def member_names(self) -> tuple[str, ...]:
        return self._bank.member_names

    def update(self, value: float, covariates: Covariates | None = None) -> None:
        """Take the next value; NaN or infinite when it is missing."""
        self._bank.update(np.array([value]), self._told(covariates))

    def predict(self, covariates: Upcoming | None = None) -> Array:
        """quantiles_HL; ``covariates`` are those of the steps to come, see `Upcoming`."""
        return self._bank.predict(self._told(covariates))[0]

    def predict_peak(
        self, lead_s: float, levels: Sequence[float], covariates: Upcoming | None = None
    ) -> Array:
        """quantiles_L of the largest value within the next ``lead_s``, up to the longest horizon."""
        return self._bank.predict_peak(lead_s, levels, self._told(covariates))[0]

    def anomaly(self) -> bool:
        """Whether the newest value does not belong, see `ForecasterBank.anomalies`."""
        return bool(self._bank.anomalies()[0])

    def member_quantiles(self, covariates: Upcoming | None = None) -> Array:
        """quantiles_MHL of every member, before they are weighed and calibrated."""
        return self._bank.member_quantiles(self._told(covariates))[0]

    def weights(self) -> Array:
        """weights_MHL of the members."""
        return self._bank.weights()[0]

    def state(self) -> ForecasterState:
        """A snapshot, as JSON values."""
        return as_json(self._bank.state())

    def restore(self, state: ForecasterState) -> None:
        """Go on from a snapshot of a forecaster constructed with the same arguments."""
        self._bank.restore(from_json(state))

    def _told(self, covariates: Upcoming | None) -> Array | None:
        """covariates_NK of a mapping, covariates_NSK of one for each step."""
        if covariates is None or not self._covariates:
            return None
        if isinstance(covariates, Mapping):
            return np.array([[covariates.get(name, math.nan) for name in self._covariates]])
        told_SK = [[step.get(name, math.nan) for name in self._covariates] for step in covariates]
        return np.reshape(told_SK, (1, len(told_SK), len(self._covariates)))
