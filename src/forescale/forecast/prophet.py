"""Prophet: a piecewise linear trend plus a season of Fourier terms.

Taylor and Letham, "Forecasting at scale" (The American Statistician, 2018).

Axes: T = time, S = step ahead, L = level, P = sampled path.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Targets
from forescale.forecast.refit import PathFit, path_fit, path_steps, require

_HISTORY = 2000
_SEASONS = 3
_PATHS = 500  # sampled to take quantiles of
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProphetModel:
    """Prophet with its defaults; a fit takes about half a second.

    Attributes:
        step_s: seconds between values.
        season_steps: length of the season; None for a trend only.
    """

    step_s: float
    season_steps: int | None = None

    @property
    def name(self) -> str:
        return "Prophet"

    @property
    def history_steps(self) -> int:
        return max(_HISTORY, _SEASONS * (self.season_steps or 1))

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> PathFit:
        require("prophet")
        logging.getLogger("prophet.plot").setLevel(logging.CRITICAL)  # that plotly is not there
        import pandas as pd  # noqa: PLC0415 - an extra
        from cmdstanpy.utils import get_logger  # noqa: PLC0415 - comes with it
        from prophet import Prophet  # noqa: PLC0415 - an extra, and 3 s of import

        get_logger().setLevel(logging.WARNING)  # two lines for each fit

        def moments(first: int, count: int) -> pd.DataFrame:
            seconds = (first + np.arange(count)) * self.step_s
            return pd.DataFrame({"ds": pd.to_datetime(np.round(seconds * 1e9), unit="ns")})

        model = Prophet(
            daily_seasonality=False,  # the one season there is is named below
            weekly_seasonality=False,
            yearly_seasonality=False,
            uncertainty_samples=_PATHS,
        )
        if self.season_steps and len(values_T) >= 2 * self.season_steps:
            model.add_seasonality("season", period=self.season_steps * self.step_s / _DAY_S, fourier_order=10)
        model.fit(moments(0, len(values_T)).assign(y=values_T))
        paths_SP = model.predictive_samples(moments(len(values_T), path_steps(targets)))["yhat"]
        return path_fit(np.quantile(paths_SP, levels, axis=1).T, values_T, targets)
