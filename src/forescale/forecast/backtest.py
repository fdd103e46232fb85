"""Rolling-origin backtest of a forecaster on one series.

The forecaster takes the series value by value. At each origin it is asked for quantiles, having seen the
values up to and including the origin and none after (Tashman, "Out-of-sample tests of forecasting
accuracy", Int. J. Forecasting, 2000). Scores are formed when the series is over.

Axes: T = time, O = origin, H = horizon, L = level, K = covariate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from forescale.core.clock import Clock
from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array, Covariates
from forescale.forecast.scoring import coverage, weighted_quantile_loss


class Contender(Protocol):
    """What a backtest asks of a forecaster."""

    def update(self, value: float, covariates: Covariates | None = None) -> None: ...

    def predict(self, covariates: Covariates | None = None) -> Array: ...


class PeakContender(Contender, Protocol):
    """A contender that forecasts maxima too."""

    def predict_peak(self, lead_s: float, levels: Sequence[float]) -> Array: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backtest:
    """What was forecast and what came.

    Attributes:
        origins: indices of the last values seen, ascending.
        targets_OH: the value ``horizon_steps`` after each origin (of a peak: the largest of the values after
            the origin up to there); NaN when missing.
        quantiles_OHL: what was forecast for it.
        update_s: mean seconds an ``update`` took.
        decision_s: mean seconds from a value's arrival to its forecast: one ``update`` and one ``predict``.
    """

    horizon_steps: tuple[int, ...]
    levels: tuple[float, ...]
    origins: tuple[int, ...]
    targets_OH: Array
    quantiles_OHL: Array
    update_s: float
    decision_s: float

    @property
    def loss_H(self) -> Array:
        """Weighted quantile loss at each horizon."""
        return np.array(
            [
                weighted_quantile_loss(self.targets_OH[:, h], self.quantiles_OHL[:, h], self.levels)
                for h in range(len(self.horizon_steps))
            ]
        )

    @property
    def coverage_HL(self) -> Array:
        """Share of targets at or below each quantile."""
        return np.array(
            [
                coverage(self.targets_OH[:, h], self.quantiles_OHL[:, h])
                for h in range(len(self.horizon_steps))
            ]
        )

    def at(self, origins: Sequence[int]) -> Backtest:
        """The same at some of the origins only, to compare with a contender that was asked less often."""
        kept = np.isin(self.origins, origins)
        return replace(
            self,
            origins=tuple(np.array(self.origins)[kept].tolist()),
            targets_OH=self.targets_OH[kept],
            quantiles_OHL=self.quantiles_OHL[kept],
        )


def spread_origins(
    length: int, horizon_steps: Sequence[int], count: int | None = None, warm_up: int | None = None
) -> tuple[int, ...]:
    """Origins evenly over the part of a series that follows the warm-up, each with all its targets inside.

    Args:
        length: values in the series.
        horizon_steps: horizons in steps.
        count: origins wanted; None for every one there is.
        warm_up: values seen before the first forecast; None for half of the series.

    Raises:
        InvalidInput: the series is too short for a single origin.
    """
    first = max(1, length // 2 if warm_up is None else warm_up) - 1
    last = length - 1 - max(horizon_steps)
    if last < first:
        raise InvalidInput(
            f"a series of {length} values is too short to backtest {max(horizon_steps)} steps ahead after "
            f"{first + 1} values; use shorter horizons or a longer series"
        )
    there = last - first + 1
    chosen = np.linspace(first, last, min(count or there, there))
    return tuple(np.round(chosen).astype(int).tolist())


def run_backtest(
    forecaster: Contender,
    values_T: Array,
    *,
    horizon_steps: Sequence[int],
    levels: Sequence[float],
    origins: Sequence[int],
    clock: Clock,
    covariates_T: Sequence[Covariates] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Backtest:
    """Gives the forecaster the series and asks it at every origin.

    Args:
        forecaster: fresh, and made for these ``horizon_steps`` and ``levels``.
        values_T: the series; NaN when missing.
        origins: as from `spread_origins`.
        covariates_T: facts known about each step. A step's are given with its value; a forecast is given
            those of the step that follows its origin.
        on_progress: called after each value with the number of values seen.
    """
    rounds = _Rounds(tuple(origins), clock, on_progress)

    def ask(origin: int) -> Array:
        return forecaster.predict(covariates_T[origin + 1] if covariates_T else None)

    quantiles_OHL = rounds.run(forecaster, ask, values_T, covariates_T)
    return _scored(rounds, tuple(horizon_steps), levels, quantiles_OHL, values_T, _value_ahead)


def run_backtest_with_peaks(
    forecaster: PeakContender,
    values_T: Array,
    *,
    step_s: float,
    horizon_steps: Sequence[int],
    levels: Sequence[float],
    origins: Sequence[int],
    clock: Clock,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Backtest, Backtest]:
    """The same, and in the second result the maxima of the values from the origin up to each horizon.

    ``decision_s`` of both counts forecasts of values and of maxima together.
    """
    steps = tuple(horizon_steps)
    rounds = _Rounds(tuple(origins), clock, on_progress)

    def ask(origin: int) -> Array:  # noqa: ARG001 - what is known about a step does not matter here
        peaks = [forecaster.predict_peak(step * step_s, levels) for step in steps]
        return np.vstack([forecaster.predict(), *peaks])

    quantiles = rounds.run(forecaster, ask, values_T, None)
    return (
        _scored(rounds, steps, levels, quantiles[:, : len(steps)], values_T, _value_ahead),
        _scored(rounds, steps, levels, quantiles[:, len(steps) :], values_T, _peak_ahead),
    )


class _Rounds:
    """Values in, forecasts out, and the time that took. Nothing after the last origin is given."""

    def __init__(
        self, origins: tuple[int, ...], clock: Clock, on_progress: Callable[[int], None] | None
    ) -> None:
        self.origins = origins
        self.update_s = 0.0
        self.decision_s = 0.0
        self._clock = clock
        self._on_progress = on_progress

    def run(
        self,
        forecaster: Contender,
        ask: Callable[[int], Array],
        values_T: Array,
        covariates_T: Sequence[Covariates] | None,
    ) -> Array:
        wanted = frozenset(self.origins)
        found: list[Array] = []
        updates_s = asks_s = 0.0
        given = self.origins[-1] + 1
        for t, value in enumerate(values_T[:given].tolist()):
            begun_s = self._clock.monotonic_s()
            forecaster.update(value, covariates_T[t] if covariates_T else None)
            updated_s = self._clock.monotonic_s()
            updates_s += updated_s - begun_s
            if t in wanted:
                found.append(np.array(ask(t), dtype=np.float64))
                asks_s += self._clock.monotonic_s() - updated_s
            if self._on_progress:
                self._on_progress(t + 1)
        self.update_s = updates_s / given
        self.decision_s = self.update_s + asks_s / len(found)
        return np.stack(found)


def _scored(
    rounds: _Rounds,
    steps: tuple[int, ...],
    levels: Sequence[float],
    quantiles_OHL: Array,
    values_T: Array,
    target: Callable[[Array, int, int], float],
) -> Backtest:
    return Backtest(
        horizon_steps=steps,
        levels=tuple(levels),
        origins=rounds.origins,
        targets_OH=np.array(
            [[target(values_T, origin, step) for step in steps] for origin in rounds.origins]
        ),
        quantiles_OHL=quantiles_OHL,
        update_s=rounds.update_s,
        decision_s=rounds.decision_s,
    )


def _value_ahead(values_T: Array, origin: int, steps: int) -> float:
    return float(values_T[origin + steps])


def _peak_ahead(values_T: Array, origin: int, steps: int) -> float:
    """The largest known value of the steps after an origin; NaN when none is known."""
    ahead = values_T[origin + 1 : origin + 1 + steps]
    known = ahead[~np.isnan(ahead)]
    return float(known.max()) if len(known) else float("nan")
