"""What a bank tells its members, and what they answer.

A file of this package holds a family: one class that makes one or more forecasts (its ``names``) for N
series at once, by array operations. There are two kinds. A `PointMember` says where a value will be; the
bank learns how wrong it was and makes quantiles of it. A `QuantileMember` says the quantiles itself; the
bank only weighs them. Members may be wrong, but not NaN or infinite, and see no value before it is due.

Axes: N = series, M = forecasts of the family, J = target (column), L = level, K = covariate, T = time
(oldest first), X = any shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array

SmallArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What is forecast, a column each.

    Attributes:
        lead_steps_J: steps ahead, at least 1; not ordered.
        peak_J: True where the target is the maximum of the next ``lead_steps_J`` values, False where it
            is the value after that many steps.
    """

    lead_steps_J: npt.NDArray[np.int64]
    peak_J: npt.NDArray[np.bool_]


class History(Protocol):
    """The last values of all series; a missing one is replaced by what the bank expected of it."""

    @property
    def steps(self) -> int:
        """How many are known now; grows to the capacity that the bank has set and stays there."""
        ...

    def last(self, steps: int) -> Array:
        """The last min(steps, self.steps) values_NT, newest last: a copy."""
        ...

    def at(self, ago_X: npt.NDArray[np.int64]) -> Array:
        """values_NX of so many steps ago (0 = the newest); the oldest known where that is too long ago."""
        ...

    def at_each(self, ago_NX: npt.NDArray[np.int64]) -> Array:
        """values_NX where each series asks for steps of its own."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The present, as all members may see it.

    Attributes:
        step: values so far, this one included; missing ones count.
        seen_N: those that were not missing, since the first or since the level last moved for good; at
            least 1. Averages begin again with it: of values before, none is like those to come.
        observed_N: the newest values, NaN where missing.
        values_N: the same with missing ones replaced, never NaN.
        level_N: local level (a smoothed value) after the newest value.
        scale_N: typical size of the changes around that level, with a floor: always positive. Divide by
            it to make series comparable, after level_N was subtracted.
        due_NJ: the targets that became known with the newest value, as
            (target - level_N) / scale_N with the level and scale of the moment they were forecast at,
            ``step - lead_steps_J``; NaN where that was before the first value, or the value is missing.
        history: the values so far, the newest one included.
        covariates_NK: known facts about the newest step; None where the bank has none.
        came_NJK: those of the targets that became known: of the newest step, and of a maximum the largest on
            the way.
    """

    step: int
    seen_N: Array
    observed_N: Array
    values_N: Array
    level_N: Array
    scale_N: Array
    due_NJ: Array
    history: History
    covariates_NK: Array | None = None
    came_NJK: Array | None = None


class Member(Protocol):
    """A family of forecasts.

    Its constructor takes ``(series, targets, *, ...)``: how many series there are, and what is forecast.

    Attributes:
        names: one for each of its M forecasts, unique in the bank.
        learned: the attributes (numpy arrays or numbers, changed in place or replaced) that hold all it
            has learned. The bank saves and restores exactly these.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def learned(self) -> tuple[str, ...]: ...

    def update(self, now: Moment) -> None:
        """Take the newest values."""
        ...


class PointMember(Member, Protocol):
    """Says where the targets will be."""

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:
        """Forecasts made ``now``, in the unit of the series; `update` has seen the same moment.

        ``upcoming_NJK`` are the covariates of the steps that the targets are at, of a maximum the largest on
        the way; NaN or None where unknown.
        """
        ...


class QuantileMember(Member, Protocol):
    """Says the quantiles of the targets, at the levels its constructor was given."""

    def quantiles_NMJL(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:
        """Forecasts made ``now``, in the unit of the series; the bank sorts them along L."""
        ...
