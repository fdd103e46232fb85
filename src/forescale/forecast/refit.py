"""Models that take too long to fit within a decision: fitted now and then, used at once.

A `SlowModel` makes a `Fit` of a history. A `RefittedForecaster` fits when it is asked, as a backtest wants
it; in an ensemble, `forescale.forecast.members.refitted` fits in the background.

Axes: T = time (oldest first), J = target, L = level, H = horizon, S = step ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array, Covariates
from forescale.forecast.members.member import Targets

FEW = 16  # values with which no model is fitted: the last one goes on
_BEYOND = 3.0  # ranges of its history that a forecast may lie outside it


class Fit(Protocol):
    """A model fitted to a history; may be pickled, so that another process can make it."""

    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:
        """Forecasts of the targets it was fitted for, ascending along L, never NaN; takes no time.

        Args:
            values_T: the last values known now, as many as the model's ``history_steps`` if there are.
            elapsed: how many of them came after the fit.
        """
        ...


class SlowModel(Protocol):
    """Something that can be fitted to one series; may be pickled.

    Attributes:
        name: what it is called in tables.
        history_steps: how many of the last values it is fitted to.
    """

    @property
    def name(self) -> str: ...

    @property
    def history_steps(self) -> int: ...

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> Fit:
        """Takes seconds. ``values_T`` has no NaN, but may be short or constant."""
        ...


def require(module: str) -> None:
    """Raises InvalidInput, saying what to install, if a package of the extra is missing."""
    if find_spec(module) is None:
        raise InvalidInput(f"this forecaster needs {module}: pip install 'forescale[forecast]'")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFit:
    """A forecast of the steps after a fit, made with it, and read off as time goes on.

    Of a maximum it knows only that it is no smaller than any value on the way.

    Attributes:
        quantiles_SL: of the first, second, ... value after the fit. Beyond the last, the last.
    """

    quantiles_SL: Array
    targets: Targets

    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:  # noqa: ARG002 - the protocol's
        last = len(self.quantiles_SL) - 1
        found = []
        for lead, peak in zip(self.targets.lead_steps_J.tolist(), self.targets.peak_J.tolist(), strict=True):
            at = min(elapsed + lead - 1, last)
            found.append(
                self.quantiles_SL[min(elapsed, last) : at + 1].max(axis=0) if peak else self.quantiles_SL[at]
            )
        return np.array(found)


def path_fit(quantiles_SL: Array, values_T: Array, targets: Targets) -> PathFit:
    """A forecast of the steps after ``values_T``, made safe: ascending, finite, not far from them.

    Exponential smoothing with a multiplicative trend, for one, can leave the range of numbers.
    """
    lowest, highest = float(values_T.min()), float(values_T.max())
    reach = _BEYOND * (highest - lowest)
    bounded_SL = np.clip(
        np.nan_to_num(quantiles_SL, nan=float(values_T[-1])), lowest - reach, highest + reach
    )
    return PathFit(quantiles_SL=np.sort(bounded_SL, axis=1), targets=targets)


def path_steps(targets: Targets) -> int:
    """Steps a path is long: the longest lead time, from a fit as old as it may well become."""
    return 2 * int(targets.lead_steps_J.max())


class RefittedForecaster:
    """A model as a contender of a backtest: fitted when asked, if the last fit is old.

    Until there are values enough, the last value goes on. Missing values are taken to be the last known.

    Args:
        every_steps: values after which a fit is old; 1 to fit for each forecast.
    """

    def __init__(
        self,
        model: SlowModel,
        horizon_steps: Sequence[int],
        levels: Sequence[float],
        every_steps: int = 1,
    ) -> None:
        self._model = model
        self._levels = tuple(levels)
        self._targets = Targets(
            lead_steps_J=np.array(horizon_steps), peak_J=np.zeros(len(tuple(horizon_steps)), dtype=bool)
        )
        self._every = every_steps
        self._values: deque[float] = deque(maxlen=model.history_steps)
        self._fit: Fit | None = None
        self._elapsed = 0

    def update(self, value: float, covariates: Covariates | None = None) -> None:  # noqa: ARG002 - the protocol's
        if np.isnan(value):
            if not self._values:
                return
            value = self._values[-1]
        self._values.append(value)
        self._elapsed += 1

    def predict(self, covariates: Covariates | None = None) -> Array:  # noqa: ARG002 - the protocol's
        values_T = np.array(self._values)
        if len(values_T) < FEW:
            last = values_T[-1] if len(values_T) else 0.0
            return np.full((len(self._targets.lead_steps_J), len(self._levels)), last)
        if self._fit is None or self._elapsed >= self._every:
            self._fit = self._model.fit(values_T, self._targets, self._levels)
            self._elapsed = 0
        return self._fit.quantiles_JL(values_T, self._elapsed)
