"""Facts about forecasts that wait until what they forecast is known.

Axes: N = series, J = target, R = ring: the leads of all targets, one after the other, D = facts (any shape).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forescale.forecast.members.member import SmallArray, Targets

_LARGEST = {np.float16: 6e4, np.float32: 3e38}


class Waiting:
    """For each target as many places as its lead is long; what was put is due when its place comes again.

    Args:
        series: N.
        targets: their leads.
        facts: shape of what is kept for each series and target.
        coarse: whether three digits are enough, and numbers of up to 60,000: for half the memory.
    """

    learned = ("_ring_NRD",)

    def __init__(
        self, series: int, targets: Targets, facts: tuple[int, ...], *, coarse: bool = False
    ) -> None:
        leads_J = targets.lead_steps_J
        self._leads_J = leads_J
        self._begin_J = np.cumsum(leads_J) - leads_J
        dtype = np.float16 if coarse else np.float32
        self._ring_NRD = np.full((series, int(leads_J.sum()), *facts), np.nan, dtype=dtype)
        self._largest = _LARGEST[dtype]

    def put(self, step: int, facts_NJD: npt.NDArray[np.floating]) -> None:
        """Keep the facts of ``step`` for as many steps as each lead is long."""
        self._ring_NRD[:, self._places(step)] = np.clip(facts_NJD, -self._largest, self._largest)

    def due(self, step: int) -> SmallArray:
        """facts_NJD put at ``step - lead``, NaN where nothing was; those of ``step`` itself once put."""
        return self._ring_NRD[:, self._places(step)].astype(np.float32, copy=False)

    def forget(self, rows: npt.NDArray[np.int64]) -> None:
        """Drop all that waits of some series."""
        self._ring_NRD[rows] = np.nan

    def _places(self, step: int) -> npt.NDArray[np.int64]:
        return self._begin_J + step % self._leads_J
