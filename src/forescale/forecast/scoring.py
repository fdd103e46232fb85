"""How good quantile forecasts were: pinball loss, weighted quantile loss, coverage.

The weighted quantile loss is that of Salinas et al., "DeepAR" (Int. J. Forecasting, 2020), averaged over
levels: twice the pinball loss, summed over forecasts, over the sum of absolute values. Targets that are
missing (NaN) count for nothing.

Axes: T = forecast, L = level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.forecast.forecaster import Array


def pinball_losses(values_T: Array, quantiles_TL: Array, levels: Sequence[float]) -> Array:
    """losses_TL in the series' unit: ``level`` per unit of shortfall, ``1 - level`` per unit of excess.

    NaN where the value is missing.
    """
    shortfall_TL = values_T[:, None] - quantiles_TL
    levels_L = np.asarray(levels)
    return np.maximum(levels_L * shortfall_TL, (levels_L - 1.0) * shortfall_TL)


def weighted_quantile_loss(values_T: Array, quantiles_TL: Array, levels: Sequence[float]) -> float:
    """2 x pinball, averaged over levels, summed over forecasts, over the sum of the values' magnitudes.

    NaN when every value is missing; infinite when all values are zero and something else was forecast.
    """
    known_T = ~np.isnan(values_T)
    if not known_T.any():
        return float("nan")
    losses_TL = pinball_losses(values_T[known_T], quantiles_TL[known_T], levels)
    loss = 2.0 * float(losses_TL.mean(axis=1).sum())
    magnitude = float(np.abs(values_T[known_T]).sum())
    if magnitude == 0.0:
        return float("inf") if loss else 0.0
    return loss / magnitude


def coverage(values_T: Array, quantiles_TL: Array) -> Array:
    """coverage_L: share of the known values at or below each quantile; NaN when none is known."""
    known_T = ~np.isnan(values_T)
    if not known_T.any():
        return np.full(quantiles_TL.shape[1], np.nan)
    return (values_T[known_T, None] <= quantiles_TL[known_T]).mean(axis=0)
