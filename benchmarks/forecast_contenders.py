"""What anyone would pick instead: every baseline of the forecasting benchmark.

Axes: T = time, J = target, L = level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from forecast_series import Series
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from forescale.forecast.backtest import Contender
from forescale.forecast.baselines import MovingWindow, SeasonalNaive
from forescale.forecast.boosting import BoostingModel
from forescale.forecast.forecaster import Array
from forescale.forecast.lstm import LstmModel
from forescale.forecast.members.member import Targets
from forescale.forecast.prophet import ProphetModel
from forescale.forecast.refit import RefittedForecaster, SlowModel
from forescale.forecast.statistical import Method, StatisticalModel

HORIZON_STEPS = (1, 5, 15, 60)
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
LONGEST_MSTL_SEASON = 500  # one of 1,440 steps takes 4 s a fit
SHORTEST_WINDOW = 5  # values a window of an autoscaler holds at least


CHEAP = ("seasonal naive", "moving maximum (HPA)", "moving mean (Knative)")
LEARNED = ("LSTM, normalised", "LSTM as usual", "LightGBM, normalised")


def origins_of(name: str, refits: int) -> int | None:
    """Origins a contender is asked at: as many as it has time for. None for every one there is.

    A burst that one of sixty origins sees can be most of a loss, so those that are not fitted at each are
    asked at more.
    """
    return {**dict.fromkeys(CHEAP), **dict.fromkeys(LEARNED, 5 * refits)}.get(name, refits)


def contenders(quick: bool) -> dict[str, Callable[[Series], Contender | None]]:
    """By name; a maker answers None where the baseline is not to be had."""
    cheap: dict[str, Callable[[Series], Contender | None]] = {
        "seasonal naive": lambda s: SeasonalNaive(s.step_s, HORIZON_STEPS, LEVELS, s.season_steps),
        "moving maximum (HPA)": lambda s: MovingWindow(_window(s, 300.0), np.max, HORIZON_STEPS, LEVELS),
        "moving mean (Knative)": lambda s: MovingWindow(_window(s, 60.0), np.mean, HORIZON_STEPS, LEVELS),
    }
    if quick:
        return cheap
    return cheap | {
        "AutoETS": lambda s: _refitted(StatisticalModel(method=Method.ETS, season_steps=s.season_steps)),
        "AutoARIMA": lambda s: _refitted(StatisticalModel(method=Method.ARIMA, season_steps=s.season_steps)),
        "AutoTheta": lambda s: _refitted(StatisticalModel(method=Method.THETA, season_steps=s.season_steps)),
        "MSTL": _mstl,
        "Prophet": lambda s: _refitted(ProphetModel(step_s=s.step_s, season_steps=s.season_steps)),
        "LSTM, normalised": lambda s: _refitted(LstmModel(season_steps=s.season_steps), _quarter(s)),
        "LSTM as usual": lambda s: _refitted(UsualLstm(), len(s.values_T)),
        "LightGBM, normalised": lambda s: _refitted(BoostingModel(season_steps=s.season_steps), _quarter(s)),
    }


def _window(series: Series, window_s: float) -> int:
    return max(SHORTEST_WINDOW, round(window_s / series.step_s))


def _refitted(model: SlowModel, every_steps: int = 1) -> Contender:
    return RefittedForecaster(model, HORIZON_STEPS, LEVELS, every_steps)


def _quarter(series: Series) -> int:
    """Of the half that is forecast: learned models are trained anew four times."""
    return len(series.values_T) // 8


def _mstl(series: Series) -> Contender | None:
    if not series.season_steps or series.season_steps > LONGEST_MSTL_SEASON:
        return None
    return _refitted(StatisticalModel(method=Method.MSTL, season_steps=series.season_steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class UsualLstm:
    """As in most tutorials: scaled to the range of the first half, squared error, trained once.

    It says where the values will be; around that, quantiles of its errors on the last fifth of what it was
    given, which it was not trained on.
    """

    name: str = "LSTM as usual"
    history_steps: int = 6000

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> UsualLstmFit:
        torch.manual_seed(0)
        low, span = values_T.min(), max(float(np.ptp(values_T)), 1e-9)
        leads = targets.lead_steps_J
        windows = sliding_window_view((values_T - low) / span, 60)[: -int(leads.max())]
        ends = np.arange(len(windows)) + 60
        inputs = torch.tensor(np.ascontiguousarray(windows), dtype=torch.float32)[..., None]
        wanted = torch.tensor(((values_T - low) / span)[ends[:, None] + leads - 1], dtype=torch.float32)
        lstm, head = nn.LSTM(1, 50, batch_first=True), nn.Linear(50, len(leads))
        optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-3)
        trained = len(inputs) * 4 // 5
        for _ in range(10):
            for chosen in torch.randperm(trained).split(32):
                optimizer.zero_grad()
                loss = (head(lstm(inputs[chosen])[1][0][0]) - wanted[chosen]).square().mean()
                loss.backward()
                optimizer.step()
        with torch.inference_mode():
            errors = (wanted[trained:] - head(lstm(inputs[trained:])[1][0][0])).numpy()
        errors_JL = np.quantile(errors, levels, axis=0).T
        return UsualLstmFit(lstm=lstm, head=head, errors_JL=errors_JL, low=float(low), span=span)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsualLstmFit:
    lstm: nn.LSTM
    head: nn.Linear
    errors_JL: Array
    low: float
    span: float

    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:  # noqa: ARG002 - the protocol's
        window = torch.tensor((values_T[-60:] - self.low) / self.span, dtype=torch.float32)
        with torch.inference_mode():
            points_J = self.head(self.lstm(window[None, :, None])[1][0][0])[0].numpy()
        return self.low + self.span * (points_J[:, None] + self.errors_JL)
