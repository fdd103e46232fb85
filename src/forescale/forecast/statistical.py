"""ETS, ARIMA, Theta and MSTL, chosen and fitted automatically by statsforecast.

Hyndman and Khandakar, "Automatic time series forecasting" (J. Statistical Software, 2008) for ETS and
ARIMA; Fiorucci et al., "Models for optimising the theta method" (Int. J. Forecasting, 2016); Bandara,
Hyndman and Bergmeir, "MSTL" (2021).

Axes: T = time, S = step ahead, L = level.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Targets
from forescale.forecast.refit import PathFit, path_fit, path_steps, require

_HISTORY = 1000  # more values cost time and hardly change these models
_SEASONS = 3  # or so many seasons, if that is more, where the model takes long ones
_LONG_SEASON = 24  # longer ones are beyond the state of ETS and ARIMA


class Method(StrEnum):
    ETS = "AutoETS"
    ARIMA = "AutoARIMA"
    THETA = "AutoTheta"
    MSTL = "MSTL"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticalModel:
    """One of statsforecast's models of a single series.

    On one core a fit takes about 0.05 s (ETS), 0.2 s (Theta), 0.5 s (ARIMA), 0.2 s (MSTL; 4 s with a
    season of 1,440 steps).

    Attributes:
        season_steps: length of a season. ETS and ARIMA leave one longer than 24 steps out of account;
            MSTL without one is ETS.
    """

    method: Method
    season_steps: int | None = None

    @property
    def name(self) -> str:
        return str(self.method)

    @property
    def history_steps(self) -> int:
        return max(_HISTORY, _SEASONS * self._season)

    @property
    def _season(self) -> int:
        season = self.season_steps or 1
        return season if self.method in (Method.THETA, Method.MSTL) or season <= _LONG_SEASON else 1

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> PathFit:
        require("statsforecast")
        steps = path_steps(targets)
        if np.ptp(values_T) == 0.0:
            return path_fit(np.full((steps, len(levels)), values_T[0]), values_T, targets)
        widths = {level: round(100.0 * abs(1.0 - 2.0 * level), 6) for level in levels}
        # One filter for good: taking it back would not be safe while another thread fits.
        warnings.filterwarnings("ignore", module="statsforecast")
        with np.errstate(all="ignore"):  # what overflows is clipped
            found = self._model(values_T).forecast(
                y=values_T, h=steps, level=sorted({width for width in widths.values() if width})
            )
        quantiles_SL = np.column_stack([_quantile(found, level, width) for level, width in widths.items()])
        return path_fit(quantiles_SL, values_T, targets)

    def _model(self, values_T: Array) -> Any:
        from statsforecast import models  # noqa: PLC0415 - an extra, and 5 s of import

        season = self._season if len(values_T) >= 2 * self._season else 1
        match self.method:
            case Method.ETS:
                return models.AutoETS(season_length=season)
            case Method.ARIMA:
                return models.AutoARIMA(season_length=season)
            case Method.THETA:
                kind = "multiplicative" if values_T.min() > 0.0 else "additive"
                return models.AutoTheta(season_length=season, decomposition_type=kind)
            case Method.MSTL:
                return models.MSTL(season_length=season) if season > 1 else models.AutoETS(model="ZZN")


def _quantile(found: Any, level: float, width: float) -> Array:
    """Intervals are central there: the 95% quantile is the upper end of the one of 90%."""
    if not width:
        return np.asarray(found["mean"], dtype=np.float64)
    return np.asarray(found[f"{'hi' if level > 0.5 else 'lo'}-{width}"], dtype=np.float64)
