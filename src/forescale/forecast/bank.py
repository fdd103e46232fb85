"""Forecasts of many series at once, all with the same step.

Axes: N = series, H = horizon, L = level, K = covariate, J = target (horizons, then peaks), M = member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.block import Members, SeriesBlock
from forescale.forecast.changes import Flags
from forescale.forecast.forecaster import Array
from forescale.forecast.members.covariates import Proportions
from forescale.forecast.members.levels import DampedTrend, SmoothedLevels
from forescale.forecast.members.member import PointMember, Targets
from forescale.forecast.members.refitted import RefittedMembers, SlowMembers
from forescale.forecast.members.regression import RidgeRegression
from forescale.forecast.members.season import Cycles, Seasons
from forescale.forecast.members.tuning import TunedNetwork
from forescale.forecast.peaks import peak_leads, read_peaks
from forescale.forecast.snapshot import Snapshot, restore, snapshot

_BLOCK = 256  # series whose arrays are worked on together: they stay in the processor's caches
_HISTORY = 8192  # values kept of each series, unless its season is longer
_SEASONS_S = {"hour": 3600.0, "day": 86400.0, "week": 604800.0}
_SHORTEST = 4  # steps of a season
_MARGIN = 8  # steps around a season that are looked at
_SPEEDS = (1.0, 0.6, 0.3, 0.12, 0.05, 0.02, 0.005)
_STEADY = ("last", "ewma_0.12", "ewma_0.02", "ridge")
_LARGEST = 1e30


class ForecasterBank:
    """Online quantile forecasts of N series, of values to come and of peaks over lead times.

    Args:
        series: N.
        step_s: seconds between values.
        horizon_steps: how many steps ahead.
        levels: quantile levels in (0, 1), ascending.
        season_steps: length of a season; None for a day. An hour, a week, and cycles that the values
            show by themselves are looked for, too.
        lower: what no value falls below; None where there is no such bound.
        covariates: names of known facts about a step; update and predict take them in this order.
        light: in a third of the time for few series: only levels and a regression as members, no peaks, no
            anomalies, and no new beginning where a level moves.
        slow: models that take too long to fit within a decision, as further members; in groups, each fitted
            as often as suits.
        false_alarm_rate: fraction of ordinary values that `anomalies` may flag, in (0, 1).

    Attributes:
        member_names: whose weights `weights` tells.

    Raises:
        InvalidInput: of an argument out of range.
    """

    learned = ("_blocks",)

    def __init__(  # noqa: PLR0913 - the public entry; what few need are keywords
        self,
        series: int,
        step_s: float,
        horizon_steps: Sequence[int] = (1, 5, 15, 60),
        levels: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99),
        season_steps: int | None = None,
        lower: float | None = 0.0,
        *,
        covariates: Sequence[str] = (),
        light: bool = False,
        slow: Sequence[SlowMembers] = (),
        false_alarm_rate: float = 0.001,
    ) -> None:
        _check(series, step_s, horizon_steps, levels, season_steps)
        if not 0.0 < false_alarm_rate < 1.0:
            raise InvalidInput(f"false_alarm_rate must lie between 0 and 1, not {false_alarm_rate}")
        self._series = series
        self._step_s = step_s
        self._horizon_steps = tuple(horizon_steps)
        self._levels = tuple(float(level) for level in levels)
        self._covariates = tuple(covariates)
        self._season_steps = season_steps
        self._lower = lower
        self._light = light
        self._leads = () if light else peak_leads(horizon_steps)
        self._false_alarm_rate = false_alarm_rate
        leads_J = np.array([*horizon_steps, *self._leads], dtype=np.int64)
        self._targets = Targets(lead_steps_J=leads_J, peak_J=np.arange(len(leads_J)) >= len(horizon_steps))
        sizes = [min(_BLOCK, series - begin) for begin in range(0, series, _BLOCK)]
        members = [self._members(size) for size in sizes]
        self._slow = [
            [RefittedMembers(size, self._targets, self._levels, each) for each in slow] for size in sizes
        ]
        members = [
            replace(quick, quantiles=(*quick.quantiles, *groups))
            for quick, groups in zip(members, self._slow, strict=True)
        ]
        self.member_names = members[0].names
        if twice := {name for name in self.member_names if self.member_names.count(name) > 1}:
            raise InvalidInput(f"two members are called {', '.join(sorted(twice))}")
        self._blocks = tuple(self._block(size, each) for size, each in zip(sizes, members, strict=True))

    def update(self, values_N: Array, covariates_NK: Array | None = None) -> None:
        """Take the next value of every series; NaN or infinite where it is missing.

        Raises:
            InvalidInput: another number of values or covariates than was agreed.
        """
        values_N = np.asarray(values_N, dtype=np.float64)
        _check_shape("values", values_N, (self._series,))
        observed_N = np.where(np.isfinite(values_N), values_N.clip(-_LARGEST, _LARGEST), np.nan)
        shape = (self._series, len(self._covariates))
        told_NK = (
            np.full(shape, np.nan) if covariates_NK is None else np.asarray(covariates_NK, dtype=np.float64)
        )
        _check_shape("covariates", told_NK, shape)
        for block, rows in self._rows():
            block.update(observed_N[rows], told_NK[rows])

    def skip(self, steps: int) -> None:
        """Let so many steps pass of which nothing is known: as updates with missing values, but quickly."""
        for block in self._blocks:
            block.skip(steps)

    def predict(self, covariates_NSK: Array | None = None) -> Array:
        """quantiles_NHL of the values to come: ascending along L, never NaN, never below ``lower``.

        ``covariates_NSK`` are those of the first S steps to come, NaN where unknown, as those beyond are; of
        shape NK, they hold for all steps.

        Raises:
            InvalidInput: other covariates than were agreed.
        """
        return self._forecast(covariates_NSK)[:, : len(self._horizon_steps)]

    def predict_peak(
        self, lead_s: float, levels: Sequence[float] | None = None, covariates_NSK: Array | None = None
    ) -> Array:
        """quantiles_NL of the largest value within the next ``lead_s``; at the bank's levels by default.

        Raises:
            InvalidInput: ``lead_s`` reaches beyond the longest horizon, a level is not in (0, 1), or the bank
                is a light one.
        """
        if self._light:
            raise InvalidInput("a light bank forecasts no peaks")
        peaks_NL = read_peaks(
            self._forecast(covariates_NSK)[:, len(self._horizon_steps) :],
            leads=self._leads,
            lead_steps=lead_s / self._step_s,
            known_levels=self._levels,
            levels=self._levels if levels is None else levels,
        )
        return peaks_NL if self._lower is None else np.maximum(peaks_NL, self._lower)

    def anomalies(self) -> Flags:
        """flags_N: whether the newest value of each series does not belong.

        Its error, one step ahead and relative to the width of its forecast, is too unlikely. Missing values
        and the first ones are never flagged.

        Raises:
            InvalidInput: the bank is a light one.
        """
        if self._light:
            raise InvalidInput("a light bank looks for no anomalies")
        return np.concatenate([block.anomalies_N for block in self._blocks])

    def member_quantiles(self, covariates_NSK: Array | None = None) -> Array:
        """quantiles_NMHL of every member, before they are weighed and calibrated."""
        upcoming = self._upcoming(covariates_NSK)
        members_NMJL = np.concatenate(
            [block.members(part) for block, part in zip(self._blocks, upcoming, strict=True)]
        )
        return members_NMJL[:, :, : len(self._horizon_steps)]

    def weights(self) -> Array:
        """weights_NMHL of the members: how much each counts, summing to 1 along M."""
        weights_NMJL = np.concatenate([block.weights_NMJL for block in self._blocks])
        return weights_NMJL[:, :, : len(self._horizon_steps)].astype(np.float64)

    def state(self) -> dict[str, Any]:
        """A snapshot, arrays in nested dictionaries, that later updates do not change."""
        return snapshot(self)

    def restore(self, state: Snapshot) -> None:
        """Go on from a snapshot of a bank constructed with the same arguments.

        Raises:
            InvalidInput: it was constructed with others.
        """
        restore(self, state)
        for groups in self._slow:
            for group in groups:
                group.forget()

    def _forecast(self, covariates_NSK: Array | None) -> Array:
        upcoming = self._upcoming(covariates_NSK)
        return np.concatenate(
            [block.forecast(part) for block, part in zip(self._blocks, upcoming, strict=True)]
        )

    def _upcoming(self, covariates_NSK: Array | None) -> list[Array | None]:
        """upcoming_NJK of each block: at the step of a target, and of a maximum the largest on the way."""
        if covariates_NSK is None:
            return [None] * len(self._blocks)
        told = np.asarray(covariates_NSK, dtype=np.float64)
        longest = max(self._horizon_steps)
        if told.ndim == 2:
            told = np.repeat(told[:, None], longest, axis=1)
        steps = told.shape[1] if told.ndim == 3 else 0
        _check_shape("covariates", told, (self._series, steps, len(self._covariates)))
        told = np.pad(told, ((0, 0), (0, max(0, longest - steps)), (0, 0)), constant_values=np.nan)
        at_J = self._targets.lead_steps_J - 1
        largest_NJK = np.fmax.accumulate(told, axis=1)[:, at_J]
        upcoming_NJK = np.where(self._targets.peak_J[:, None], largest_NJK, told[:, at_J])
        return [upcoming_NJK[rows] for _, rows in self._rows()]

    def _rows(self) -> list[tuple[SeriesBlock, slice]]:
        return [(block, slice(b * _BLOCK, (b + 1) * _BLOCK)) for b, block in enumerate(self._blocks)]

    def _block(self, series: int, members: Members) -> SeriesBlock:
        return SeriesBlock(
            series,
            self._targets,
            np.asarray(self._levels),
            members=members,
            capacity=self._capacity,
            covariates=len(self._covariates),
            lower=self._lower,
            false_alarm_rate=None if self._light else self._false_alarm_rate,
        )

    @property
    def _capacity(self) -> int:
        if self._light:
            return 1  # its members look at the newest value only
        return max(_HISTORY, (self._season_steps or 0) + max(self._horizon_steps) + _MARGIN)

    @property
    def _day_steps(self) -> int | None:
        """Length of a day, or of the season given, if it is short enough to be remembered."""
        steps = self._season_steps or round(_SEASONS_S["day"] / self._step_s)
        return steps if _SHORTEST <= steps <= self._capacity - max(self._horizon_steps) - _MARGIN else None

    def _seasons(self, series: int) -> dict[str, Seasons]:
        """Those that are short enough to be remembered, by name."""
        periods = {name: round(season_s / self._step_s) for name, season_s in _SEASONS_S.items()}
        if self._season_steps is not None:
            periods["day"] = self._season_steps
        longest = self._capacity - max(self._horizon_steps) - _MARGIN
        return {
            name: Seasons(series, self._targets, name=name, period_steps=steps)
            for name, steps in periods.items()
            if _SHORTEST <= steps <= longest
        }

    def _members(self, series: int) -> Members:
        levels = SmoothedLevels(series, self._targets, weights=_SPEEDS)
        steady = () if self._lower is None else _STEADY  # without a bound, all of them are
        known = len(self._covariates)
        if self._light:
            ridge = RidgeRegression(series, self._targets, covariates=known)
            return Members(points=(levels, ridge), steady=steady[:-1])
        seasons = self._seasons(series)
        cycles = Cycles(series, self._targets)
        regressed = (*(season for name, season in seasons.items() if name == "day"), cycles)
        informed: list[PointMember] = [RidgeRegression(series, self._targets, seasons=regressed)]
        if known:
            informed.append(RidgeRegression(series, self._targets, seasons=regressed, covariates=known))
            informed.append(Proportions(series, self._targets, covariates=self._covariates))
        network = TunedNetwork(series, self._targets, levels=self._levels, season_steps=self._day_steps)
        return Members(
            points=(
                levels,
                DampedTrend(series, self._targets),
                *seasons.values(),
                cycles,
                *informed,
            ),
            quantiles=(network,),
            steady=steady,
        )


def _check_shape(what: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InvalidInput(f"got {what} of shape {array.shape}; this bank takes {shape}")


def _check(
    series: int,
    step_s: float,
    horizon_steps: Sequence[int],
    levels: Sequence[float],
    season_steps: int | None,
) -> None:
    if series < 1:
        raise InvalidInput(f"a bank needs at least 1 series, not {series}")
    if not 0.0 < step_s < float("inf"):
        raise InvalidInput(f"step_s must be positive, not {step_s}")
    if not horizon_steps or min(horizon_steps) < 1:
        raise InvalidInput("horizon_steps must be whole numbers of steps, at least 1")
    if not levels or not all(0.0 < level < 1.0 for level in levels) or sorted(set(levels)) != list(levels):
        raise InvalidInput("levels must lie between 0 and 1 and ascend")
    if season_steps is not None and season_steps < 1:
        raise InvalidInput(f"a season must last at least 1 step, not {season_steps}")
