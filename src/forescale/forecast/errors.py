"""Quantiles of past errors, from a window of them for each forecast and target.

Axes: N = series, M = forecast, J = target, L = level, W = window, R = ring of past quantiles: those of all
targets, one after the other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import SmallArray, Targets

# Errors to start with, in spreads: about those of a Gaussian. Real ones take their places.
_FIRST = np.array([-1.6, -0.8, -0.3, 0.0, 0.3, 0.8, 1.6])
_DENSITY, _PEAK_DENSITY = (
    8,
    3,
)  # errors kept per lead time: maxima of overlapping stretches are the same for long
_LARGEST = 50.0  # spreads; what is beyond (a burst after idleness) says nothing about sizes


class ErrorWindows:
    """The last errors and their empirical quantiles, with the (n + 1) rank of exchangeable ones.

    Errors of long leads overlap, so only every few steps one is kept: the window reaches further back.

    Args:
        series, forecasts: N, M.
        targets: J of them.
        levels_L: quantile levels.
        window: W, errors kept.

    Attributes:
        quantiles_NMJL: of the errors, in the unit they were given in.
    """

    learned = ("_errors_NMJW", "_past_NRML", "quantiles_NMJL")

    def __init__(
        self, series: int, forecasts: int, targets: Targets, levels_L: Array, *, window: int = 96
    ) -> None:
        self._leads_J = leads_J = targets.lead_steps_J
        shape = (series, forecasts, len(leads_J))
        self._levels_L = levels_L
        self._window = window
        self._stride_J = np.where(
            targets.peak_J, -(-leads_J // _PEAK_DENSITY), np.maximum(leads_J // _DENSITY, 1)
        )
        self._errors_NMJW = np.full((*shape, window), np.nan, dtype=np.float16)
        self._errors_NMJW[..., : len(_FIRST)] = _FIRST * np.minimum(leads_J[:, None], 16) ** 0.25
        self.quantiles_NMJL = np.zeros((*shape, len(levels_L)), dtype=np.float32)
        self._refresh(np.arange(len(leads_J)))
        self._length_J = (leads_J - 1) // self._stride_J + 2  # quantiles in use while a forecast is not due
        self._begin_J = np.cumsum(self._length_J) - self._length_J
        past_NJML = self.quantiles_NMJL.swapaxes(1, 2).astype(np.float16)
        self._past_NRML = np.repeat(past_NJML, self._length_J, axis=1)

    def append(self, errors_NMJ: SmallArray, step: int) -> None:
        """Take the errors that became known at ``step``, NaN where there are none."""
        due_J = np.flatnonzero(step % self._stride_J == 0)
        place_J = (step // self._stride_J[due_J] + len(_FIRST)) % self._window
        self._errors_NMJW[:, :, due_J, place_J] = errors_NMJ[:, :, due_J].clip(-_LARGEST, _LARGEST)
        self._refresh(due_J)
        self._past_NRML[:, self._places(step)[due_J]] = self.quantiles_NMJL[:, :, due_J].swapaxes(1, 2)

    def issued_NMJL(self, step: int) -> SmallArray:
        """The quantiles that forecasts were made with which are due at ``step``, to three digits."""
        return self._past_NRML[:, self._places(step - self._leads_J)].swapaxes(1, 2).astype(np.float32)

    def _places(self, step_J: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._begin_J + step_J // self._stride_J % self._length_J

    def _refresh(self, due_J: npt.NDArray[np.int64]) -> None:
        sorted_NMJW = np.sort(self._errors_NMJW[:, :, due_J].astype(np.float32), axis=-1)  # NaN last
        last_NMJ1 = (self._window - 1 - np.isnan(sorted_NMJW).sum(axis=-1))[..., None].clip(0)
        rank_NMJL = (self._levels_L * (last_NMJ1 + 2) - 1.0).clip(0.0, last_NMJ1)
        below_NMJL = rank_NMJL.astype(np.int64)
        low_NMJL = np.take_along_axis(sorted_NMJW, below_NMJL, axis=-1)
        high_NMJL = np.take_along_axis(sorted_NMJW, np.minimum(below_NMJL + 1, last_NMJ1), axis=-1)
        quantiles_NMJL = low_NMJL + (rank_NMJL - below_NMJL) * (high_NMJL - low_NMJL)
        # Where all are missing (a gap as long as the window) the last known quantiles stay.
        self.quantiles_NMJL[:, :, due_J] = np.where(
            np.isnan(quantiles_NMJL), self.quantiles_NMJL[:, :, due_J], quantiles_NMJL
        )
