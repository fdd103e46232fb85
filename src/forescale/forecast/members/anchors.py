"""Simple forecasts of many series, with how well each has done lately: what learned members start from.

Averages over several spans, a damped slope, the season, the season moved to today's level, the period that
the values themselves show: each is where a target may come to lie (an anchor). Everything a learned member
is told is relative to the typical error of one of them, the reference, at the same target, so that it holds
for any unit, level and noise, and what was learned from some series can be used for others.

Axes: J = target, N = series, K = anchor, R = place in the ring of anchors that await their targets,
F = input, S = span, P = period, T = time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import History, Targets

_SPANS_S = np.array([8.0, 1.0, 3.0, 24.0, 80.0, 300.0])  # of averages; the first is the reference
_SLOPE = len(_SPANS_S)  # then the slope, or the recent maximum
_PERIOD = _SLOPE + 1  # the period that the values themselves show
_SEASON = _SLOPE + 2  # mean of seasons, the last one, that + level, the mean + level, the mean x level
_LONGEST_PERIOD = 300
_PERIOD_WEIGHT = 0.01  # of the newest difference from a period before
_LEVEL_STEPS = 8  # that today's level, and that of a season ago, are taken over
_SEASONS = 3  # that are averaged, where known
_DAMPING = 0.9  # of the slope, per step
_ERROR_SPANS_S = np.array([15.0, 150.0, 1000.0])  # over which errors are averaged
_UNIT = 1  # which of them the unit is
_FLOOR_OF_SLOW = 0.2  # unit over the slowest average, at least: after long silence, noise may come back
_FLOOR_OF_LEVEL = 1e-4  # unit over the level, at least
_LEAK = 0.005  # by which the extremes approach the level, per step

ANCHORS = _SEASON + 5
"""K: how many anchors there are."""

INPUTS = 2 * ANCHORS + 12
"""F: how many inputs there are."""


class Anchors:
    """Keeps the anchors of all targets, and their errors.

    Args:
        series: N.
        targets: what is forecast.
        season_steps: length of a season; None where there is none.

    Attributes:
        anchors_JNK: the forecasts, in the unit of the series, the reference first.
        unit_JN: typical error of the reference: always positive.
        inputs_JNF: about -5 to 5 each.
    """

    learned = (
        "_steps", "_mean_NS", "_low_N", "_high_N", "_waiting_RNK", "_waited_J",
        "_difference_NP", "_error_JNK", "_spread_JNS", "_over_JN", "_square_JN", "_seasonal",
        "anchors_JNK", "unit_JN", "inputs_JNF",
    )  # fmt: skip

    def __init__(self, series: int, targets: Targets, season_steps: int | None = None) -> None:
        self._targets = targets
        self._season_steps = season_steps
        lead_J = targets.lead_steps_J
        self._steps = 0
        self._mean_NS = np.zeros((series, len(_SPANS_S)))
        self._difference_NP = np.full((series, _LONGEST_PERIOD - 1), np.inf, dtype=np.float32)
        self._low_N = np.full(series, np.inf)
        self._high_N = np.full(series, -np.inf)
        self._first_row_J = np.concatenate([[0], np.cumsum(lead_J)[:-1]])
        self._waiting_RNK = np.zeros((int(lead_J.sum()), series, ANCHORS), dtype=np.float32)
        self._waited_J = np.zeros(len(lead_J))  # errors seen
        self._error_JNK = np.zeros((len(lead_J), series, ANCHORS))
        self._spread_JNS = np.zeros((len(lead_J), series, len(_ERROR_SPANS_S)))
        self._over_JN = np.zeros((len(lead_J), series))
        self._square_JN = np.zeros((len(lead_J), series))
        self._seasonal = False
        self._slope_weight_J = _DAMPING * (1.0 - _DAMPING**lead_J) / (1.0 - _DAMPING) / 10.5
        self.anchors_JNK = np.zeros_like(self._error_JNK)
        self.unit_JN = np.ones_like(self._over_JN)
        self.inputs_JNF = np.zeros((len(lead_J), series, INPUTS))

    def take(self, observed_N: Array, values_N: Array, history: History) -> None:
        """Take the newest values, which the history holds already."""
        self._judge(observed_N, history)
        self._smooth(values_N)
        self._forecast(history)
        self._waiting_RNK[self._rows_J()] = self.anchors_JNK
        self._steps += 1
        self._describe()

    def _rows_J(self) -> npt.NDArray[np.int64]:
        """Where the forecasts that are due now stand, and those made now will."""
        return self._first_row_J + self._steps % self._targets.lead_steps_J

    def due_JN(self, history: History) -> Array:
        """The targets that have just become known: the newest value, or the largest of the last."""
        newest_N = history.last(1)[:, 0]
        due_JN = np.broadcast_to(newest_N, self.unit_JN.shape).copy()
        for j in np.flatnonzero(self._targets.peak_J):
            due_JN[j] = history.last(int(self._targets.lead_steps_J[j])).max(axis=1)
        return due_JN

    def _judge(self, observed_N: Array, history: History) -> None:
        """Measure the errors of the anchors that awaited the newest values."""
        ready_J = self._steps >= self._targets.lead_steps_J
        if not ready_J.any():
            return
        ready = np.flatnonzero(ready_J)
        waiting_JNK = self._waiting_RNK[self._rows_J()[ready]]
        due_JN = self.due_JN(history)[ready]
        error_JNK = due_JN[..., None] - waiting_JNK
        self._waited_J[ready] += 1
        # Means of all errors, until an average's own memory is full; missing values are no evidence.
        first_J = 1.0 / self._waited_J[ready]
        weight_JNS = np.maximum(2.0 / (_ERROR_SPANS_S + 1.0), first_J[:, None, None])
        weight_JNS = np.where(np.isfinite(observed_N)[:, None], weight_JNS, 0.0)
        unit_JN = weight_JNS[..., _UNIT]
        reference_JN = error_JNK[..., 0]
        size_JN = np.abs(reference_JN)
        self._error_JNK[ready] += unit_JN[..., None] * (np.abs(error_JNK) - self._error_JNK[ready])
        self._spread_JNS[ready] += weight_JNS * (size_JN[..., None] - self._spread_JNS[ready])
        self._over_JN[ready] += unit_JN * (np.maximum(reference_JN, 0.0) - self._over_JN[ready])
        self._square_JN[ready] += unit_JN * (reference_JN**2 - self._square_JN[ready])

    def _smooth(self, values_N: Array) -> None:
        weight_S = np.maximum(2.0 / (_SPANS_S + 1.0), 1.0 / (self._steps + 1))
        self._mean_NS += weight_S * (values_N[:, None] - self._mean_NS)
        if self._steps == 0:
            self._low_N, self._high_N = values_N.copy(), values_N.copy()
        level_N = self._mean_NS[:, 0]
        self._low_N = np.minimum(values_N, self._low_N + _LEAK * (level_N - self._low_N))
        self._high_N = np.maximum(values_N, self._high_N + _LEAK * (level_N - self._high_N))

    def _forecast(self, history: History) -> None:
        anchors_JNK = self.anchors_JNK
        anchors_JNK[..., :_SLOPE] = self._mean_NS
        slope_N = self._mean_NS[:, 2] - self._mean_NS[:, 3]
        anchors_JNK[..., _SLOPE] = self._mean_NS[:, 2] + self._slope_weight_J[:, None] * slope_N
        for j in np.flatnonzero(self._targets.peak_J):
            anchors_JNK[j, :, _SLOPE] = history.last(int(self._targets.lead_steps_J[j])).max(axis=1)
        self._follow_period(history)
        anchors_JNK[..., _SEASON:] = self._mean_NS[:, -1:]
        season = self._season_steps
        self._seasonal = season is not None and history.steps >= season + max(_LEVEL_STEPS, season // 24)
        if season is not None and self._seasonal:
            self._follow_season(history, season)

    def _follow_period(self, history: History) -> None:
        """Find the period after which values are most alike, and repeat its last two courses."""
        past_NT = history.last(2 * _LONGEST_PERIOD)
        known = past_NT.shape[1]
        periods = min(_LONGEST_PERIOD, known - 1) - 1  # that can be compared, from 2 on
        if periods < 1:
            self.anchors_JNK[..., _PERIOD] = self._mean_NS[:, 0]
            return
        differ_NP = np.abs(past_NT[:, -1:] - past_NT[:, -3 : -3 - periods : -1]).astype(np.float32)
        known_NP = self._difference_NP[:, :periods]
        fresh_NP = np.isinf(known_NP)
        known_NP += np.where(fresh_NP, 0.0, _PERIOD_WEIGHT * (differ_NP - known_NP))
        known_NP[fresh_NP] = differ_NP[fresh_NP]
        period_N1 = np.argmin(known_NP, axis=1)[:, None] + 2
        for j, (lead, peak) in enumerate(zip(self._targets.lead_steps_J, self._targets.peak_J, strict=True)):
            ahead_T = np.arange(1, lead + 1) if peak else np.array([lead])
            # So many steps before now, all was known at a time one or more periods before.
            back_NT = (-ahead_T) % period_N1
            course_NT = np.take_along_axis(past_NT, np.maximum(known - 1 - back_NT, 0), axis=1)
            before_NT = np.take_along_axis(past_NT, np.maximum(known - 1 - back_NT - period_N1, 0), axis=1)
            self.anchors_JNK[j, :, _PERIOD] = (0.5 * (course_NT + before_NT)).max(axis=1)

    def _follow_season(self, history: History, season: int) -> None:
        """What was a season before, and the same moved by what the level has moved since."""
        recent_T, longer_T = np.arange(_LEVEL_STEPS), np.arange(max(_LEVEL_STEPS, season // 24))
        risen_N = (history.last(_LEVEL_STEPS) - history.at(season + recent_T)).mean(axis=1)
        known = range(1, min(_SEASONS, (history.steps - len(longer_T)) // season) + 1)
        now_N = history.at(longer_T).mean(axis=1)
        then_N = np.mean([history.at(longer_T + back * season).mean(axis=1) for back in known], axis=0)
        both_N = (then_N > 0.0) & (now_N > 0.0)
        ratio_N = np.clip(np.where(both_N, now_N, 1.0) / np.where(both_N, then_N, 1.0), 0.2, 5.0)
        for j in range(len(self.anchors_JNK)):
            mean_N, exact_N, last_N = self._courses_N(history, j, season)
            self.anchors_JNK[j, :, _SEASON] = mean_N
            self.anchors_JNK[j, :, _SEASON + 1] = exact_N
            self.anchors_JNK[j, :, _SEASON + 2] = last_N + risen_N
            self.anchors_JNK[j, :, _SEASON + 3] = mean_N + now_N - then_N
            self.anchors_JNK[j, :, _SEASON + 4] = mean_N * ratio_N

    def _courses_N(self, history: History, j: int, season: int) -> tuple[Array, Array, Array]:
        """What a target was in seasons before: mean of some, exactly in the last, smoothed in the last."""
        lead, peak = int(self._targets.lead_steps_J[j]), bool(self._targets.peak_J[j])
        back = season * -(-lead // season)  # so many steps before the target, all is known
        width = 0 if peak else min(season // 288, back - lead)
        found: list[Array] = []
        exact_N: Array = self._mean_NS[:, -1]
        while len(found) < _SEASONS:
            oldest, count = (back - 1, lead) if peak else (back - lead + width, 2 * width + 1)
            if oldest >= history.steps:
                break
            window_NT = history.at(oldest - np.arange(count))
            if not found:
                exact_N = window_NT.max(axis=1) if peak else window_NT[:, width]
            found.append(window_NT.max(axis=1) if peak else window_NT.mean(axis=1))
            back += season
        if not found:
            return exact_N, exact_N, exact_N
        return np.asarray(np.mean(found, axis=0)), exact_N, found[0]

    def _describe(self) -> None:
        """Bring everything into the unit of the reference's errors."""
        waited_J1 = self._waited_J[:, None] > 0
        nearest = int(np.argmin(self._targets.lead_steps_J))
        # A target that nothing is known of yet borrows what is known of the nearest.
        spread_JNS = np.where(waited_J1[..., None], self._spread_JNS, 1.5 * self._spread_JNS[nearest])
        slow_JN = spread_JNS[..., -1]
        level_N = self._mean_NS[:, 0]
        floor_JN = np.maximum(_FLOOR_OF_SLOW * slow_JN, _FLOOR_OF_LEVEL * np.abs(level_N))
        self.unit_JN = unit_JN = np.maximum(spread_JNS[..., _UNIT], floor_JN) + 1e-12
        inputs_JNF = self.inputs_JNF
        away_JNK = self.anchors_JNK - self.anchors_JNK[..., :1]
        inputs_JNF[..., :ANCHORS] = np.arcsinh(away_JNK / unit_JN[..., None])
        error_JNK = np.where(waited_J1[..., None], self._error_JNK, unit_JN[..., None])
        inputs_JNF[..., ANCHORS : 2 * ANCHORS] = np.log(error_JNK / unit_JN[..., None] + 0.02)
        others = (
            self._over_JN / unit_JN,
            np.log(np.sqrt(self._square_JN) / unit_JN + 0.02),
            np.log(spread_JNS[..., 0] / unit_JN + 0.02),
            np.log(slow_JN / unit_JN + 0.02),
            np.arcsinh(level_N / unit_JN),
            np.arcsinh((level_N - self._low_N) / unit_JN),
            np.arcsinh((self._high_N - level_N) / unit_JN),
            *self._facts(),
        )
        for f, input_JN in enumerate(others, start=2 * ANCHORS):
            inputs_JNF[..., f] = input_JN
        np.clip(inputs_JNF, -8.0, 8.0, out=inputs_JNF)

    def _facts(self) -> Sequence[Array | float]:
        """Inputs that are the same for all series."""
        lead_J1 = self._targets.lead_steps_J[:, None]
        season = float(self._season_steps or 1)
        return (
            np.log(lead_J1),
            self._targets.peak_J[:, None].astype(np.float64),
            float(self._seasonal),
            np.log(season / lead_J1) if self._seasonal else np.zeros_like(lead_J1, dtype=np.float64),
            np.log1p(self._waited_J[:, None] / 10.0),
        )
