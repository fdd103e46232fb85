"""Members that expect a series to repeat what it did a season ago.

Axes: N = series, M = forecasts of the family, J = target, P = past seasons, W = neighbouring steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets

_SEASONS = 4  # past ones that are averaged
_WIDTH = 12


class Seasons:
    """The values at the same place of past seasons: the last, their mean, and both moved to today's level.

    Until a season has passed, all of them are the present level.

    Args:
        series: N.
        targets: what is forecast.
        name: of the season.
        period_steps: its length.
    """

    learned: tuple[str, ...] = ()

    def __init__(self, series: int, targets: Targets, *, name: str, period_steps: int) -> None:
        self.names = tuple(f"{name}_{way}" for way in ("naive", "mean", "plus", "times"))
        self._leads_J = targets.lead_steps_J
        self._peak_J = targets.peak_J
        # Peaks are taken over all their steps (some, if they are many), values over two neighbours.
        first_J = np.where(targets.peak_J, 1 - targets.lead_steps_J, -1)
        last_J = np.where(targets.peak_J, 0, 1)
        self._around_JW = np.rint(np.linspace(first_J, last_J, _WIDTH, axis=1)).astype(np.int64)
        self._level_W = np.unique(np.linspace(0, max(period_steps // 8, 3), 8).astype(np.int64))
        self._period_N = np.full(series, period_steps)

    def update(self, now: Moment) -> None:
        pass

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        history, period_N = now.history, self._period_N
        known_N = (period_N > 0) & (history.steps > period_N + 2)
        points_NMJ = np.empty((len(period_N), len(self.names), len(self._leads_J)))
        points_NMJ[:] = now.level_N[:, None, None]
        if known_N.any():
            points_NMJ[known_N] = self._repeated_NMJ(now, np.where(known_N, period_N, 1))[known_N]
        return points_NMJ

    def _repeated_NMJ(self, now: Moment, period_N: npt.NDArray[np.int64]) -> Array:
        history = now.history
        period_NJ = period_N[:, None]
        ahead_NJ = period_NJ * -(-self._leads_J // period_NJ) - self._leads_J  # of the newest past season
        # Seasons that are not known yet repeat the oldest that is.
        most_N = ((history.steps - 1) // period_N - 1).clip(0, _SEASONS - 1)
        past_NP = np.minimum(np.arange(_SEASONS), most_N[:, None]) * period_N[:, None]
        ago_NPJW = ahead_NJ[:, None, :, None] + past_NP[:, :, None, None] - self._around_JW
        around_NPJW = history.at_each(np.maximum(ago_NPJW, 0))
        season_NPJ = np.where(self._peak_J, around_NPJW.max(axis=3), around_NPJW.mean(axis=3))
        mean_NJ = season_NPJ.mean(axis=1)
        naive_NJ = np.where(self._peak_J, season_NPJ[:, 0], history.at_each(ahead_NJ))
        here_N = history.at(self._level_W).mean(axis=1)
        there_N = history.at_each(self._level_W + (period_N[:, None] + past_NP)[:, :, None]).mean(axis=(1, 2))
        floor_N = now.scale_N
        ratio_N = ((np.abs(here_N) + floor_N) / (np.abs(there_N) + floor_N)).clip(0.2, 5.0)
        return np.stack(
            (naive_NJ, mean_NJ, mean_NJ + (here_N - there_N)[:, None], mean_NJ * ratio_N[:, None]), axis=1
        )


class Cycles(Seasons):
    """Seasons whose length is found: the lag of the strongest autocorrelation, looked for now and then."""

    learned = ("_period_N",)

    def __init__(self, series: int, targets: Targets) -> None:
        super().__init__(series, targets, name="cycle", period_steps=16)
        self._period_N = np.zeros(series, dtype=np.int64)

    def update(self, now: Moment) -> None:
        steps = min(now.history.steps, 2048)
        if now.step % 64 or steps < 64:
            return
        values_NT = now.history.last(steps)
        values_NT -= values_NT.mean(axis=1, keepdims=True)
        spectrum_NF = np.fft.rfft(values_NT, 2 * steps)
        products_NT = np.fft.irfft(np.abs(spectrum_NF) ** 2)[:, : steps // 3]
        products_NT /= 1.0 - np.arange(steps // 3) / steps  # fewer pairs at longer lags
        correlation_NT = products_NT / np.maximum(products_NT[:, :1], 1e-300)
        # Ahead of the first zero it is only that neighbours are alike.
        correlation_NT = np.where(np.minimum.accumulate(correlation_NT, axis=1) < 0.1, correlation_NT, -1.0)
        best_N = correlation_NT.max(axis=1)
        self._period_N = np.where(best_N > 0.2, correlation_NT.argmax(axis=1), 0)
