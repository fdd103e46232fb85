"""A level that is smoothed robustly, with quantiles of its own past errors around it.

Simple exponential smoothing with the error clipped as by Gelper, Fried and Croux, "Robust forecasting
with exponential and Holt-Winters smoothing" (J. Forecasting, 2010), so that a single outlier hardly
moves the level; a two-sided CUSUM of the clipped errors (Page, "Continuous inspection schemes",
Biometrika, 1954) restarts it, so that a lasting shift is taken within four steps. The quantiles are the
empirical ones of the last errors at each horizon, with the (n + 1) rank that makes their coverage exact
for exchangeable errors.

Axes: H = horizon, L = level (of quantile).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isnan
from statistics import median

import numpy as np

from forescale.forecast.forecaster import Array, Covariates, ForecasterState, Upcoming

_SMOOTHING = 0.1  # weight of the newest error
_CLIP = 3.0  # errors count for at most this many scales
_ALLOWANCE = 1.0  # scales an error may have before it is evidence of a shift
_EVIDENCE = 7.0  # sum of evidence that restarts: four clipped errors, 4 x (3 - 1) > 7
_WINDOW = 128  # errors kept per horizon
_FEW = 8  # errors below which a horizon borrows those of a shorter one
_SCALE_PER_MAD = 1.4826  # standard deviation of a Gaussian over its median absolute deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    """Everything the next forecast depends on.

    Attributes:
        levels: the level after each of the last steps since a restart, newest last.
        errors_H: last errors per horizon, newest last.
        above, below: evidence of an upward and of a downward shift, in scales.
        above_values, below_values: the values since that evidence was last nil.
    """

    levels: tuple[float, ...] = ()
    errors_H: tuple[tuple[float, ...], ...]
    above: float = 0.0
    below: float = 0.0
    above_values: tuple[float, ...] = ()
    below_values: tuple[float, ...] = ()


class LevelForecaster:
    """Forecasts that things stay as they are: the same level at every horizon, errors per horizon.

    Args:
        step_s: seconds between values (not used: nothing here depends on time).
        horizon_steps: horizons, ascending.
        levels: quantile levels in (0, 1), ascending.
        season_steps: not used: a level has no season.
    """

    def __init__(
        self,
        step_s: float,  # noqa: ARG002 - every forecaster is constructed alike
        horizon_steps: Sequence[int] = (1, 5, 15, 60),
        levels: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99),
        season_steps: int | None = None,  # noqa: ARG002 - every forecaster is constructed alike
    ) -> None:
        self._horizon_steps = tuple(horizon_steps)
        self._levels = np.asarray(levels, dtype=np.float64)
        self._learned = _Learned(errors_H=((),) * len(self._horizon_steps))
        self._kept_levels = max(self._horizon_steps[-1], round(1.0 / _SMOOTHING))

    def update(self, value: float, covariates: Covariates | None = None) -> None:  # noqa: ARG002 - the protocol's
        if isnan(value):
            return
        learned = self._learned
        if not learned.levels:
            self._learned = replace(learned, levels=(value,))
            return
        error = value - learned.levels[-1]
        scale = self._scale(value)
        clipped = max(-_CLIP, min(_CLIP, error / scale))
        above = max(0.0, learned.above + clipped - _ALLOWANCE)
        below = max(0.0, learned.below - clipped - _ALLOWANCE)
        # The mean of the first values, until the smoothing's own memory is full.
        weight = max(_SMOOTHING, 1.0 / (len(learned.levels) + 1))
        level = learned.levels[-1] + weight * clipped * scale
        learned = replace(
            learned,
            errors_H=self._errors_with(value),
            levels=(*learned.levels, level)[-self._kept_levels :],
            above=above,
            below=below,
            above_values=(*learned.above_values, value)[-_WINDOW:] if above else (),
            below_values=(*learned.below_values, value)[-_WINDOW:] if below else (),
        )
        if above > _EVIDENCE:
            learned = _restarted(learned, learned.above_values)
        elif below > _EVIDENCE:
            learned = _restarted(learned, learned.below_values)
        self._learned = learned

    def predict(self, covariates: Upcoming | None = None) -> Array:  # noqa: ARG002 - the protocol's
        level = self._learned.levels[-1] if self._learned.levels else 0.0
        quantiles_HL = np.full((len(self._horizon_steps), len(self._levels)), level)
        known: tuple[float, ...] = ()
        for h, errors in enumerate(self._learned.errors_H):
            known = errors if len(errors) >= _FEW or not known else known
            if known:
                # The same as np.quantile(known, levels, method="weibull"), in a tenth of its time.
                quantiles_HL[h] += np.interp(
                    self._levels * (len(known) + 1), np.arange(1, len(known) + 1), np.sort(known)
                )
        return quantiles_HL

    def state(self) -> ForecasterState:
        # Tuples all the way down, so nothing needs to be copied.
        return {field.name: getattr(self._learned, field.name) for field in fields(self._learned)}

    def restore(self, state: ForecasterState) -> None:
        self._learned = _Learned(
            levels=tuple(state["levels"]),
            errors_H=tuple(tuple(errors) for errors in state["errors_H"]),
            above=state["above"],
            below=state["below"],
            above_values=tuple(state["above_values"]),
            below_values=tuple(state["below_values"]),
        )

    def _scale(self, value: float) -> float:
        """Standard deviation of the shortest horizon's errors, estimated robustly."""
        errors = self._learned.errors_H[0]
        # Without a floor, a series that was constant so far would make every change infinitely surprising.
        floor = 1e-6 * max(abs(value), abs(self._learned.levels[-1]), 1e-6)
        if len(errors) < _FEW:
            # Too few errors to tell noise from change: this one is ordinary, the level follows it.
            return max(floor, abs(value - self._learned.levels[-1]))
        return max(floor, _SCALE_PER_MAD * median(abs(error) for error in errors))

    def _errors_with(self, value: float) -> tuple[tuple[float, ...], ...]:
        levels = self._learned.levels
        return tuple(
            (*errors, value - levels[-steps])[-_WINDOW:] if len(levels) >= steps else errors
            for steps, errors in zip(self._horizon_steps, self._learned.errors_H, strict=True)
        )


def _restarted(learned: _Learned, values: tuple[float, ...]) -> _Learned:
    """Begin again at the level of the values since the shift.

    The errors the shift itself caused are dropped: they say nothing about the noise around either level.
    """
    return _Learned(
        levels=(median(values),),
        errors_H=tuple(errors[: -len(values)] for errors in learned.errors_H),
    )
