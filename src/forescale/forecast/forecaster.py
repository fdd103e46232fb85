"""What every forecaster can do, whatever it is made of.

Axes: H = horizon (order of ``horizon_steps``), L = level (order of ``levels``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

ForecasterState = Mapping[str, Any]
"""Everything a forecaster has learned, as JSON values; opaque to its users."""

Covariates = Mapping[str, float]
"""Known facts about a step by name, e.g. the predicted compute of the upcoming batch."""

Upcoming = Covariates | Sequence[Covariates]
"""Facts about the steps to come: of all alike, or of the first, the second, ... as far as they are known."""


class Forecaster(Protocol):
    """Online forecasts of one regularly spaced series, as quantiles.

    Constructors take ``(step_s, horizon_steps, levels, season_steps=None)``: seconds between values,
    how many steps ahead to forecast, quantile levels in (0, 1), and the length of a season in steps.
    """

    def update(self, value: float, covariates: Covariates | None = None) -> None:
        """Take the next value of the series; NaN when it is missing."""
        ...

    def predict(self, covariates: Upcoming | None = None) -> Array:
        """quantiles_HL of the values to come: never NaN, ascending along L."""
        ...

    def state(self) -> ForecasterState:
        """A snapshot that later updates do not change."""
        ...

    def restore(self, state: ForecasterState) -> None:
        """Go on from a snapshot of a forecaster constructed with the same arguments."""
        ...
