"""Quantiles of past errors, from a window of them for each forecast and target.

Axes: N = series, V = variant of a forecast, J = target, L = level, W = window.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import SmallArray, Targets

_FIRST_Z = (-1.6, -0.8, -0.3, 0.0, 0.3, 0.8, 1.6)


class ErrorWindows:
    """The last errors and their empirical quantiles, with the (n + 1) rank.

    Errors of long leads overlap, so only every few steps one is kept: the window reaches further back.

    Args:
        series, variants: N, V.
        targets: J of them.
        levels_L: quantile levels.
        window: W.
    """

    learned = ("_errors_NVJW", "quantiles_NVJL")

    def __init__(
        self, series: int, variants: int, targets: Targets, levels_L: Array, *, window: int, density: int = 8
    ) -> None:
        leads_J = targets.lead_steps_J
        self._levels_L = levels_L
        self._window = window
        self._stride_J = np.maximum(leads_J // density, 1)
        self._errors_NVJW = np.full((series, variants, len(leads_J), window), np.nan, dtype=np.float32)
        self._errors_NVJW[..., : len(_FIRST_Z)] = (
            np.asarray(_FIRST_Z)[None, :] * np.minimum(leads_J[:, None], 16) ** 0.25
        )
        self.quantiles_NVJL = np.zeros((series, variants, len(leads_J), len(levels_L)), dtype=np.float32)
        self._refresh(np.arange(len(leads_J)))

    def append(self, errors_NVJ: SmallArray, step: int) -> None:
        """Take the errors that became known at ``step``, NaN where there are none."""
        due_J = np.flatnonzero(step % self._stride_J == 0)
        place_J = (step // self._stride_J[due_J] + len(_FIRST_Z)) % self._window
        self._errors_NVJW[:, :, due_J, place_J] = errors_NVJ[:, :, due_J]
        self._refresh(due_J)

    def _refresh(self, due_J: npt.NDArray[np.int64]) -> None:
        sorted_NVJW = np.sort(self._errors_NVJW[:, :, due_J], axis=-1)
        known_NVJ = self._window - np.isnan(sorted_NVJW).sum(axis=-1)
        rank_NVJL = (self._levels_L * (known_NVJ[..., None] + 1) - 1.0).clip(0.0, known_NVJ[..., None] - 1.0)
        below_NVJL = rank_NVJL.astype(np.int64)
        above_NVJL = np.minimum(below_NVJL + 1, known_NVJ[..., None] - 1)
        low_NVJL = np.take_along_axis(sorted_NVJW, below_NVJL, axis=-1)
        high_NVJL = np.take_along_axis(sorted_NVJW, above_NVJL, axis=-1)
        self.quantiles_NVJL[:, :, due_J] = low_NVJL + (rank_NVJL - below_NVJL) * (high_NVJL - low_NVJL)
