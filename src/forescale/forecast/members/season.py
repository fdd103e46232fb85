"""Members that expect a series to repeat what it did a season ago.

Axes: N = series, M = forecasts of the family, J = target, P = past seasons, W = steps near a place, T = time,
F = frequency.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets

_SEASONS = 4  # past ones that are averaged
_WIDTH = 12  # steps looked at of a longer stretch
_WAYS = ("naive", "mean", "plus", "times")
_RATIO = 5.0  # by which levels of two seasons may differ

_SEARCH_STEPS = 2048  # values in which a cycle is looked for
_SEARCH_EVERY = 64
_ALIKE = 0.1  # autocorrelation below which values are no mere neighbours any more
_CYCLIC = 0.2  # above which a lag is a cycle


class Seasons:
    """The values at the same place of past seasons: the last, their mean, and that moved to today's level.

    Moved by the difference of the levels ("plus") and by their ratio ("times"). Of a peak, the largest value
    of those steps is taken. Until a season has passed, all of them are the present level.

    Args:
        series: N.
        targets: what is forecast.
        name: of the season.
        period_steps: its length.

    Attributes:
        here_N: mean of the past seasons at the present step.
    """

    learned: tuple[str, ...] = ("_points_NMJ", "here_N")

    def __init__(self, series: int, targets: Targets, *, name: str, period_steps: int) -> None:
        self.names = tuple(f"{name}_{way}" for way in _WAYS)
        self._leads_J = targets.lead_steps_J
        self._peak_J = targets.peak_J
        first_J = np.where(targets.peak_J, 1 - targets.lead_steps_J, -1)
        last_J = np.where(targets.peak_J, 0, 1)
        self._near_JW = np.rint(np.linspace(first_J, last_J, _WIDTH, axis=1)).astype(np.int64)
        self._level_W = np.unique(np.linspace(0, max(period_steps // 8, 3), 8).astype(np.int64))
        self._period_N = np.full(series, period_steps)
        self._points_NMJ = np.zeros((series, len(_WAYS), len(self._leads_J)))
        self.here_N = np.zeros(series)

    @property
    def mean_NJ(self) -> Array:
        """Mean of the past seasons at the targets."""
        return self._points_NMJ[:, 1]

    def update(self, now: Moment) -> None:
        known_N = (self._period_N > 0) & (now.history.steps > self._period_N + 2)
        self._points_NMJ[:] = now.level_N[:, None, None]
        self.here_N = now.level_N.copy()
        if known_N.any():
            points_NMJ, here_N = self._repeated(now, np.where(known_N, self._period_N, 1))
            self._points_NMJ[known_N] = points_NMJ[known_N]
            self.here_N[known_N] = here_N[known_N]

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        return self._points_NMJ

    def _repeated(self, now: Moment, period_N: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """points_NMJ at the targets, and the mean of past seasons at the present step."""
        history = now.history
        # Seasons that are not known yet repeat the oldest that is.
        most_N = ((history.steps - 1) // period_N - 1).clip(0, _SEASONS - 1)
        past_NP = np.minimum(np.arange(_SEASONS), most_N[:, None]) * period_N[:, None]
        last_NJ = period_N[:, None] * -(-self._leads_J // period_N[:, None]) - self._leads_J
        ago_NPJW = last_NJ[:, None, :, None] + past_NP[:, :, None, None] - self._near_JW
        near_NPJW = history.at_each(np.maximum(ago_NPJW, 0))
        season_NPJ = np.where(self._peak_J, near_NPJW.max(axis=3), near_NPJW.mean(axis=3))
        mean_NJ = season_NPJ.mean(axis=1)
        naive_NJ = np.where(self._peak_J, season_NPJ[:, 0], history.at_each(last_NJ))
        now_NP = period_N[:, None] + past_NP
        today_N = history.at(self._level_W).mean(axis=1)
        then_N = history.at_each(now_NP[:, :, None] + self._level_W).mean(axis=(1, 2))
        ratio_N = (np.abs(today_N) + now.scale_N) / (np.abs(then_N) + now.scale_N)
        moved_NJ = mean_NJ + (today_N - then_N)[:, None]
        scaled_NJ = mean_NJ * ratio_N.clip(1.0 / _RATIO, _RATIO)[:, None]
        here_N = history.at_each(now_NP[:, :, None] + np.arange(3)).mean(axis=(1, 2))
        return np.stack((naive_NJ, mean_NJ, moved_NJ, scaled_NJ), axis=1), here_N


class Cycles(Seasons):
    """Seasons whose length is found: the lag of the strongest autocorrelation, looked for now and then."""

    learned = (*Seasons.learned, "_period_N")

    def __init__(self, series: int, targets: Targets) -> None:
        super().__init__(series, targets, name="cycle", period_steps=2 * _WIDTH)
        self._period_N = np.zeros(series, dtype=np.int64)

    def update(self, now: Moment) -> None:
        if now.step % _SEARCH_EVERY == 0:
            self._find(now)
        super().update(now)

    def _find(self, now: Moment) -> None:
        values_NT = now.history.last(_SEARCH_STEPS) / now.scale_N[:, None]
        steps = values_NT.shape[1]
        values_NT -= values_NT.mean(axis=1, keepdims=True)
        spectrum_NF = np.fft.rfft(values_NT, 2 * steps)
        product_NT = np.fft.irfft(np.abs(spectrum_NF) ** 2)[:, : steps // 3]
        product_NT /= 1.0 - np.arange(steps // 3) / steps  # fewer pairs at longer lags
        alike_NT = product_NT / np.maximum(product_NT[:, :1], 1e-30)
        cycle_NT = np.where(np.minimum.accumulate(alike_NT, axis=1) < _ALIKE, alike_NT, -1.0)
        self._period_N = np.where(cycle_NT.max(axis=1) > _CYCLIC, cycle_NT.argmax(axis=1), 0)
