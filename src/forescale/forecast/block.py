"""Forecasts of a block of series: members, weighed online, calibrated. A bank is made of such blocks.

A step goes like this: what is due is compared with what was forecast (errors, weights, levels learn), the
members take the newest values, and once asked they forecast anew. Everything inside is relative to the
series' local level and scale when the forecast was made, see `LocalScale`.

Axes: N = series, L = level, J = target, M = forecast (P of them points), R = ring of recent steps,
K = covariate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.forecast.calibration import AdaptiveLevels
from forescale.forecast.changes import AnomalyFlags, Flags, ShiftDetector
from forescale.forecast.errors import ErrorWindows
from forescale.forecast.forecaster import Array
from forescale.forecast.history import RecentValues
from forescale.forecast.members.member import Moment, PointMember, QuantileMember, SmallArray, Targets
from forescale.forecast.peaks import raise_peaks
from forescale.forecast.spread import Anchor, LocalScale, root_spread
from forescale.forecast.waiting import Waiting
from forescale.forecast.weights import PinballWeights

_LARGEST = 1e15  # times the scale, of a difference: 32 bits hold its square
_FARTHEST = 1e6  # scales that a point may lie from the level
_FEW = 6  # values of which the scale is too small
_UNUSED = 16  # first values, of which nothing can be expected yet
_ROUNDING = 0.01  # of the width of a forecast; smaller errors are none
_FALSE_SHIFTS = 0.01  # fraction of steps that may be taken for shifts: a restart costs little
_AROUND = np.array([0.1, 0.5, 0.9])  # levels that say where the next value is expected, or those nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Who forecasts. Points come first, in the order of their names; then quantiles.

    Attributes:
        points, quantiles: the families.
        steady: names of points that are also taken with errors that do not grow with the value, as all do
            where values have no lower bound.
    """

    points: tuple[PointMember, ...]
    quantiles: tuple[QuantileMember, ...] = ()
    steady: tuple[str, ...] = ()

    @property
    def point_names(self) -> tuple[str, ...]:
        return tuple(name for member in self.points for name in member.names)

    @property
    def names(self) -> tuple[str, ...]:
        of_quantiles = tuple(name for member in self.quantiles for name in member.names)
        return (*self.point_names, *(f"{name}_steady" for name in self.steady), *of_quantiles)


class SeriesBlock:
    """Online forecasts of N series.

    Args:
        series: N.
        targets: what is forecast.
        levels_L: quantile levels, ascending.
        members: constructed for the same series and targets.
        capacity: values of each series that members may look back on.
        lower: what no value falls below; None without such a bound.
        false_alarm_rate: fraction of ordinary values that may be called anomalies; None to look neither for
            anomalies nor for levels that have moved for good.

    Attributes:
        anomalies_N: whether the newest values do not belong.
    """

    learned = (
        "_step",
        "_seen_N",
        "_settled_N",
        "_stale",
        "_history",
        "_local",
        "_observed_NR",
        "_points",
        "_quantiles",
        "_issued",
        "_errors",
        "_weights",
        "_levels",
        "_told_NRK",
        "_due_NJ",
        "_members",
        "_forecast_NJL",
        "_flags",
        "_shifts",
        "anomalies_N",
    )

    def __init__(
        self,
        series: int,
        targets: Targets,
        levels_L: Array,
        *,
        members: Members,
        capacity: int,
        covariates: int = 0,
        lower: float | None,
        false_alarm_rate: float | None,
    ) -> None:
        self._seeks_changes = false_alarm_rate is not None
        self._targets = targets
        self._lower = lower
        self._point_members = members.points
        self._quantile_members = members.quantiles
        self._members = (*members.points, *members.quantiles)
        names = members.point_names
        self._point_P = np.array([*range(len(names)), *(names.index(name) for name in members.steady)])
        self._steady = 0 if lower is None else len(names)  # points from here on
        points, columns = len(self._point_P), len(targets.lead_steps_J)
        asked = len(members.names) - points
        shape = (series, len(members.names), columns, len(levels_L))
        depth = int(targets.lead_steps_J.max()) + 1
        self._step = 0
        self._stale = False
        self._seen_N = np.zeros(series)
        self._settled_N = np.zeros(series)  # values since the level last moved
        self._history = RecentValues(series, capacity)
        self._local = LocalScale(series, depth)
        self._observed_NR = np.full((series, depth), np.nan)
        self._points = Waiting(series, targets, (len(names),))
        self._quantiles = Waiting(series, targets, (asked, len(levels_L)), coarse=True)
        self._issued = Waiting(series, targets, (len(levels_L),))
        self._errors = ErrorWindows(series, points, targets, levels_L)
        self._weights = PinballWeights(shape, levels_L)
        self._levels = AdaptiveLevels(series, targets, levels_L)
        self._told_NRK = np.full((series, depth, covariates), np.nan)
        self._due_NJ = np.full((series, columns), np.nan)
        self._forecast_NJL = np.zeros((series, columns, len(levels_L)))
        if lower is not None:
            np.maximum(self._forecast_NJL, lower, out=self._forecast_NJL)
        self._next = int(np.argmax(targets.lead_steps_J == 1))  # there is one: a peak over one step
        self._around = np.abs(np.subtract.outer(_AROUND, levels_L)).argmin(axis=1)
        self._flags = AnomalyFlags(series, false_alarm_rate=false_alarm_rate or _FALSE_SHIFTS)
        self._shifts = ShiftDetector(series, false_alarm_rate=_FALSE_SHIFTS)
        self.anomalies_N: Flags = np.zeros(series, dtype=np.bool_)

    @property
    def weights_NMJL(self) -> SmallArray:
        return self._weights.weights_NMJL

    def update(self, observed_N: Array, covariates_NK: Array) -> None:
        """Take the newest values, NaN where missing."""
        if self._stale:  # nobody asked: members are still to be judged by what they would have said
            self._forecast(None)
        shifted = self._judge(observed_N) if self._seeks_changes else np.zeros(0, dtype=np.int64)
        self._step += 1
        known_N = np.isfinite(observed_N)
        first_N = (self._seen_N == 0) & known_N
        self._seen_N = self._seen_N + known_N
        self._settled_N = self._settled_N + known_N
        self._history.append(np.where(known_N, observed_N, self._local.level_N), first_N)
        self._observed_NR[:, self._step % self._observed_NR.shape[1]] = observed_N
        self._told_NRK[:, self._step % self._told_NRK.shape[1]] = covariates_NK
        self._learn()
        if shifted.size:
            self._restart(shifted)
        counts = np.maximum(self._seen_N, 1.0), np.maximum(self._settled_N, 1.0)
        self._local.update(self._step, observed_N, *counts)
        now = self._now()
        for member in self._members:
            member.update(now)
        self._stale = True

    def skip(self, steps: int) -> None:
        """Let steps pass of which nothing is known; it takes no longer than the longest lead."""
        longest = self._observed_NR.shape[1]
        if steps > longest:
            self._step += steps - longest
            self._history.repeat(self._local.level_N, steps - longest)
            self._observed_NR[:] = np.nan
            self._told_NRK[:] = np.nan
        for _ in range(min(steps, longest)):  # then no forecast is awaited any more
            self.update(np.full(len(self._seen_N), np.nan), np.full_like(self._told_NRK[:, 0], np.nan))

    def _judge(self, observed_N: Array) -> npt.NDArray[np.int64]:
        """Flag anomalies; the series whose level has moved for good."""
        strayed_N = self._strayed_N(observed_N)
        self.anomalies_N = self._flags.update(strayed_N)
        return np.flatnonzero(self._shifts.update(strayed_N))

    def forecast(self, upcoming_NJK: Array | None) -> Array:
        """quantiles_NJL of all targets; a later call for the same step takes the place of an earlier one."""
        if self._step and (self._stale or upcoming_NJK is not None):
            self._forecast(upcoming_NJK)
        return self._forecast_NJL

    def members(self, upcoming_NJK: Array | None) -> Array:
        """quantiles_NMJL of every member, before they are weighed and calibrated."""
        now = self._now()
        said_NMJL = np.sort(self._said(now, upcoming_NJK), axis=-1).astype(np.float64)
        quantiles_NMJL = now.level_N[:, None, None, None] + said_NMJL * now.scale_N[:, None, None, None]
        return quantiles_NMJL if self._lower is None else np.maximum(quantiles_NMJL, self._lower)

    def _now(self) -> Moment:
        observed_N = self._observed_NR[:, self._step % self._observed_NR.shape[1]]
        return Moment(
            step=self._step,
            seen_N=np.maximum(self._settled_N, 1.0),
            observed_N=observed_N,
            values_N=self._history.last(1)[:, 0],
            level_N=self._local.level_N,
            scale_N=self._local.scale_N,
            due_NJ=self._due_NJ,
            history=self._history,
            **self._facts(),
        )

    def _facts(self) -> dict[str, Array]:
        """covariates_NK of the newest step, and came_NJK of the targets that are due with it."""
        if not self._told_NRK.shape[2]:
            return {}
        leads_J = self._targets.lead_steps_J
        recent_NRK = self._told_NRK[:, (self._step - np.arange(leads_J.max())) % self._told_NRK.shape[1]]
        largest_NJK = np.fmax.accumulate(recent_NRK, axis=1)[:, leads_J - 1]
        came_NJK = np.where(self._targets.peak_J[:, None], largest_NJK, recent_NRK[:, :1])
        return {"covariates_NK": recent_NRK[:, 0], "came_NJK": came_NJK}

    def _strayed_N(self, observed_N: Array) -> Array:
        """How far the newest values are from what was expected of them; NaN where nothing was."""
        low_N, middle_N, high_N = self._forecast_NJL[:, self._next, self._around].T
        # In units of what was thought possible: a day of many requests strays more than a night of few.
        usual_N = np.maximum(high_N - low_N, 1e-3 * np.abs(middle_N)) + 1e-9
        strayed_N = ((observed_N - middle_N) / usual_N).clip(-_FARTHEST, _FARTHEST)
        strayed_N[np.abs(strayed_N) < _ROUNDING] = 0.0
        return np.where(self._seen_N >= _UNUSED, strayed_N, np.nan)

    def _restart(self, shifted: npt.NDArray[np.int64]) -> None:
        """Levels have moved for good: averages begin again, at the newest value.

        Forecasts made before are judged by nobody, since no member could know. The issued ones still count
        for the levels that quantiles are read at: these promise to cover whatever the series does.
        """
        self._settled_N[shifted] = 1.0
        self._points.forget(shifted)
        self._quantiles.forget(shifted)

    def _learn(self) -> None:
        """Compare what is due with what was forecast."""
        leads_J = self._targets.lead_steps_J
        recent_NR = self._observed_NR[:, (self._step - np.arange(leads_J.max())) % self._observed_NR.shape[1]]
        peaks_NR = np.fmax.accumulate(recent_NR, axis=1)
        target_NJ = np.where(self._targets.peak_J, peaks_NR[:, leads_J - 1], recent_NR[:, :1])
        anchor = self._local.anchor(self._step - leads_J)
        self._due_NJ = ((target_NJ - anchor.level) / anchor.scale).clip(-_LARGEST, _LARGEST)
        due_NJ: SmallArray = self._due_NJ.astype(np.float32)
        points_NPJ = self._points.due(self._step).swapaxes(1, 2)[:, self._point_P]
        spread_NPJ = self._spread(points_NPJ, anchor)
        error_NPJ = due_NJ[:, None] - points_NPJ
        over_NPJL = error_NPJ[..., None] - spread_NPJ[..., None] * self._errors.issued_NMJL(self._step)
        asked_NMJL = self._quantiles.due(self._step).swapaxes(1, 2)
        over_NMJL = np.concatenate((over_NPJL, due_NJ[:, None, :, None] - asked_NMJL), axis=1)
        self._weights.learn(over_NMJL, anchor.scale)
        self._levels.learn(due_NJ, self._issued.due(self._step))
        # After idleness the scale of then says nothing about errors of now.
        floor_NJ = (0.1 * self._local.scale_N[:, None] / anchor.scale).clip(1.0 / _LARGEST, _LARGEST)
        error_NPJ /= np.maximum(spread_NPJ, floor_NJ[:, None].astype(np.float32))
        # Nor does the scale of the first few values.
        first_NJ = self._seen_N[:, None] < leads_J + _FEW
        error_NPJ = np.where(first_NJ[:, None], np.float32(np.nan), error_NPJ)
        self._errors.append(error_NPJ, self._step)

    def _forecast(self, upcoming_NJK: Array | None) -> None:
        now = self._now()
        said_NMJL = self._said(now, upcoming_NJK)
        mixed_NJL = np.einsum("nmjl,nmjl->njl", self._weights.weights_NMJL, said_NMJL)
        mixed_NJL = self._levels.read(np.sort(mixed_NJL, axis=-1).astype(np.float64))
        forecast_NJL = now.level_N[:, None, None] + mixed_NJL * now.scale_N[:, None, None]
        if self._lower is not None:
            forecast_NJL = np.maximum(forecast_NJL, self._lower)
        raise_peaks(forecast_NJL, self._targets)
        self._issued.put(
            self._step, self._relative(forecast_NJL, now.level_N[:, None, None], now.scale_N[:, None, None])
        )
        self._forecast_NJL = forecast_NJL
        self._stale = False

    def _said(self, now: Moment, upcoming_NJK: Array | None) -> SmallArray:
        """What each member forecasts, relative to the level; noted until it is due."""
        level_N111, scale_N111 = now.level_N[:, None, None, None], now.scale_N[:, None, None, None]
        anchor = self._local.anchor(np.full(len(self._targets.lead_steps_J), self._step))
        points_NMJ = np.concatenate(
            [member.points_NMJ(now, upcoming_NJK) for member in self._point_members], axis=1
        )
        points_NMJ = self._relative(points_NMJ, level_N111[..., 0], scale_N111[..., 0])
        self._points.put(self._step, points_NMJ.swapaxes(1, 2))
        points_NPJ = points_NMJ[:, self._point_P]
        spread_NPJ = self._spread(points_NPJ, anchor)
        said_NMJL = points_NPJ[..., None] + spread_NPJ[..., None] * self._errors.quantiles_NMJL
        if self._quantile_members:
            asked_NMJL = np.concatenate(
                [member.quantiles_NMJL(now, upcoming_NJK) for member in self._quantile_members], axis=1
            )
            asked_NMJL = np.sort(self._relative(asked_NMJL, level_N111, scale_N111), axis=-1)
            self._quantiles.put(self._step, asked_NMJL.swapaxes(1, 2))
            said_NMJL = np.concatenate((said_NMJL, asked_NMJL), axis=1)
        return said_NMJL.astype(np.float32, copy=False)

    def _spread(self, points_NPJ: SmallArray, anchor: Anchor) -> SmallArray:
        spread_NPJ = np.ones(points_NPJ.shape, dtype=np.float32)
        spread_NPJ[:, : self._steady] = root_spread(points_NPJ[:, : self._steady], anchor)
        return spread_NPJ

    @staticmethod
    def _relative(values: Array, level: Array, scale: Array) -> SmallArray:
        return ((values - level) / scale).clip(-_FARTHEST, _FARTHEST).astype(np.float32)
