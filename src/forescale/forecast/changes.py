"""Values that do not belong (anomalies) and levels that have moved for good (shifts), over many series.

Both work on one-step forecast errors, in whatever unit a series has, and both are told how often they may
raise a false alarm. That rate is kept in two ways. A tail fitted to the largest of the last errors says how
unlikely the newest is (peaks over threshold; Siffer et al., "Anomaly detection in streams with extreme value
theory", KDD 2017; the generalised Pareto fit by probability-weighted moments of Hosking and Wallis,
Technometrics 1987). And since no fit is right for every noise, the limit on it is moved after each alarm and
relaxed between alarms, so that in the long run no more than the set fraction of steps exceeds it, whatever
the noise (quantile tracking; Angelopoulos, Candès and Tibshirani, "Conformal PID control for time series
prediction", NeurIPS 2023).

Axes: N = series, W = window of past errors, K = the largest of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array

Flags = npt.NDArray[np.bool_]

_WINDOW = 512  # errors a tail is fitted to
_TAIL = 0.1  # of them that are its tail
_FEW = 64  # errors below which nothing is called unusual
_REFIT_STEPS = 16  # steps between fits of one series; each step fits every 16th
_HEAVIEST = 0.9  # shape of a tail that has a mean at all
_ANOMALY_STEP = 1.0  # by how much an alarm raises the log of the odds that the next one needs

_SCALE_WEIGHT = 0.02  # of the newest error in the scale
_SCALE_CLIP = 5.0  # scales that an error counts for in it
_CLIP = 3.0  # scales that an error counts for as evidence
_ALLOWANCE = 1.0  # scales an error may have before it is evidence of a shift
_EVIDENCE = 5.0  # sum of evidence that is a shift: three clipped errors, 3 x (3 - 1) > 5
_EVIDENCE_STEP = 8.0  # by how much an alarm raises it


class AnomalyFlags:
    """Flags errors that are unlikely after those before them.

    Args:
        series: N.
        false_alarm_rate: fraction of the steps of ordinary noise that may be flagged, in (0, 1).
    """

    learned = ("_errors_NW", "_count_N", "_steps", "_start_N", "_scale_N", "_shape_N", "_limit_N")

    def __init__(self, series: int, *, false_alarm_rate: float = 0.001) -> None:
        self._rate = false_alarm_rate
        self._errors_NW = np.full((series, _WINDOW), -np.inf, dtype=np.float32)  # absolute
        self._count_N = np.zeros(series, dtype=np.int64)  # errors ever taken
        self._steps = 0
        self._start_N = np.zeros(series)  # where the tail begins
        self._scale_N = np.zeros(series)
        self._shape_N = np.zeros(series)
        # Limits are on -log(p), natural units for any noise.
        self._lowest = -np.log(false_alarm_rate) - 2.0
        self._highest = -np.log(false_alarm_rate) + 12.0
        self._limit_N = np.full(series, 1.0 - np.log(false_alarm_rate))  # 1: little is known at first

    def update(self, errors_N: Array) -> Flags:
        """Whether each newest error is an anomaly; NaN is none, and is not remembered."""
        known_N = np.isfinite(errors_N)
        size_N = np.where(known_N, np.abs(errors_N), 0.0)
        judged_N = known_N & (self._count_N >= _FEW)
        flagged_N = judged_N & (self._surprise(size_N) > self._limit_N)
        for n in np.flatnonzero(flagged_N):  # rare
            # Errors of which there are already some of that size are judged by their number, not by the fit.
            alike = int((self._errors_NW[n] >= np.float32(size_N[n])).sum())
            share = (alike + 1) / (min(self._count_N[n], _WINDOW) + 1)
            flagged_N[n] = alike < 3 or -np.log(share) > self._limit_N[n]
        self._limit_N += np.where(judged_N, _ANOMALY_STEP * (flagged_N - self._rate), 0.0)
        np.clip(self._limit_N, self._lowest, self._highest, out=self._limit_N)
        rows = np.flatnonzero(known_N)
        self._errors_NW[rows, self._count_N[rows] % _WINDOW] = size_N[rows]
        self._count_N[rows] += 1
        self._fit()
        return flagged_N

    def _surprise(self, size_N: Array) -> Array:
        """-log of the chance of an error as large; least where it is not in the tail."""
        excess_N = np.maximum(size_N - self._start_N, 0.0) / np.maximum(self._scale_N, 1e-300)
        shape_N = np.maximum(self._shape_N, 1e-6)
        return -np.log(_TAIL) + np.log1p(shape_N * excess_N) / shape_N

    def _fit(self) -> None:
        """Fit the tails of every 16th series, and of those of which just enough is known."""
        turn = self._steps % _REFIT_STEPS
        self._steps += 1
        due_N = self._count_N == _FEW
        due_N[turn::_REFIT_STEPS] |= self._count_N[turn::_REFIT_STEPS] > _FEW
        rows = np.flatnonzero(due_N)
        if not rows.size:
            return
        sorted_NW = np.sort(self._errors_NW[rows], axis=1).astype(np.float64)
        tail_N = np.rint(_TAIL * np.minimum(self._count_N[rows], _WINDOW)).astype(np.int64)
        start_N = np.take_along_axis(sorted_NW, _WINDOW - 1 - tail_N[:, None], axis=1)[:, 0]
        longest = int(tail_N.max())
        rank_K = np.arange(longest, 0, -1)  # 1 = the largest
        in_tail_NK = rank_K <= tail_N[:, None]
        excess_NK = np.where(in_tail_NK, sorted_NW[:, -longest:] - start_N[:, None], 0.0)
        mean_N = excess_NK.sum(axis=1) / tail_N
        weighted_N = (excess_NK * (rank_K - 0.65)).sum(axis=1) / tail_N**2
        spread_N = np.maximum(mean_N - 2.0 * weighted_N, 1e-12 * mean_N + 1e-300)
        # Tails that end are taken for exponential ones: that errs towards silence, and the limit adapts.
        self._shape_N[rows] = np.clip(2.0 - mean_N / spread_N, 0.0, _HEAVIEST)
        self._scale_N[rows] = mean_N * (1.0 - self._shape_N[rows])
        self._start_N[rows] = start_N


class ShiftDetector:
    """Finds series whose errors have lain on one side for several steps: their level has moved.

    A two-sided CUSUM of clipped errors (Page, "Continuous inspection schemes", Biometrika, 1954).

    Args:
        series: N.
        false_alarm_rate: fraction of the steps of noise that may be taken for a shift, at most.
    """

    learned = ("_count_N", "_scale_N", "_above_N", "_below_N", "_limit_N")

    def __init__(self, series: int, *, false_alarm_rate: float = 0.001) -> None:
        self._rate = false_alarm_rate
        self._count_N = np.zeros(series, dtype=np.int64)
        self._scale_N = np.zeros(series)
        self._above_N = np.zeros(series)
        self._below_N = np.zeros(series)
        self._limit_N = np.full(series, _EVIDENCE)

    def update(self, errors_N: Array) -> Flags:
        """Whether a shift has just been found; NaN changes nothing."""
        known_N = np.isfinite(errors_N)
        error_N = np.where(known_N, errors_N, 0.0)
        scaled_N = np.clip(error_N / np.maximum(self._scale_N, 1e-300), -_CLIP, _CLIP)
        scaled_N = np.where(self._count_N >= _FEW // 4, scaled_N, 0.0)
        self._gather(known_N, scaled_N)
        found_N = np.maximum(self._above_N, self._below_N) > self._limit_N
        self._limit_N += np.where(known_N, _EVIDENCE_STEP * (found_N - self._rate), 0.0)
        np.maximum(self._limit_N, _EVIDENCE, out=self._limit_N)
        self._above_N[found_N] = 0.0
        self._below_N[found_N] = 0.0
        self._measure(known_N, np.abs(error_N))
        return found_N

    def _gather(self, known_N: Flags, scaled_N: Array) -> None:
        """Add up evidence on both sides."""
        self._above_N += np.where(known_N, scaled_N - _ALLOWANCE, 0.0)
        self._below_N += np.where(known_N, -scaled_N - _ALLOWANCE, 0.0)
        np.maximum(self._above_N, 0.0, out=self._above_N)
        np.maximum(self._below_N, 0.0, out=self._below_N)

    def _measure(self, known_N: Flags, size_N: Array) -> None:
        """Take the errors into the scales: means, in which an outlier counts for little."""
        self._count_N += known_N
        first_N = self._scale_N == 0.0
        clipped_N = np.where(first_N, size_N, np.minimum(size_N, _SCALE_CLIP * self._scale_N))
        # The mean of the first errors, until the average's own memory is full.
        weight_N = np.maximum(_SCALE_WEIGHT, 1.0 / np.maximum(self._count_N, 1))
        self._scale_N += np.where(known_N, weight_N * (clipped_N - self._scale_N), 0.0)
