"""Maxima over lead times: which are learned, and how those between are read from them.

The quantile of a maximum does not follow from quantiles at points, so maxima over some lead times are
targets of their own. Between them, quantiles are on straight lines over the logarithm of the lead.

Axes: N = series, P = lead time learned, L = level known, K = level asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.calibration import read_at, scores
from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Targets

_WIDEST = 3.0  # ratio of neighbouring lead times


def peak_leads(horizon_steps: Sequence[int]) -> tuple[int, ...]:
    """Lead times to learn: 1, the horizons, and some between where they are far apart; ascending."""
    leads = [1]
    for horizon in sorted(horizon_steps):
        parts = max(1, math.ceil(math.log(horizon / leads[-1]) / math.log(_WIDEST) - 1e-9))
        ratio = (horizon / leads[-1]) ** (1.0 / parts)
        begin = leads[-1]
        leads += [round(begin * ratio**part) for part in range(1, parts + 1)]
    return tuple(sorted(set(leads)))


def raise_peaks(quantiles_NJL: Array, targets: Targets) -> None:
    """Make maxima no lower than the values and the shorter maxima that they cover, in place.

    Each was learned for itself. Over one step, the maximum is the value.
    """
    leads_J, peak_J = targets.lead_steps_J, targets.peak_J
    for column in np.flatnonzero(peak_J):
        covered_J = leads_J <= leads_J[column]
        if leads_J[column] == 1 and not peak_J[covered_J].all():
            covered_J &= ~peak_J
        quantiles_NJL[:, column] = quantiles_NJL[:, covered_J].max(axis=1)


def read_peaks(
    peaks_NPL: Array,
    *,
    leads: Sequence[int],
    lead_steps: float,
    known_levels: Sequence[float],
    levels: Sequence[float],
) -> Array:
    """quantiles_NK of the maximum over the next ``lead_steps``.

    Raises:
        InvalidInput: the lead is longer than any learned, or a level is not in (0, 1).
    """
    if not lead_steps <= leads[-1]:
        raise InvalidInput(
            f"peaks are learned over up to {leads[-1]} steps, not {lead_steps:g}: add a longer horizon"
        )
    asked = np.asarray(levels, dtype=np.float64)
    if not ((asked > 0.0) & (asked < 1.0)).all():
        raise InvalidInput("levels of a peak must lie between 0 and 1")
    above = int(np.searchsorted(leads, max(lead_steps, 1.0)))
    peaks_NL = peaks_NPL[:, above]
    if above and lead_steps < leads[above]:
        share = math.log(max(lead_steps, 1.0) / leads[above - 1]) / math.log(leads[above] / leads[above - 1])
        peaks_NL = peaks_NPL[:, above - 1] + share * (peaks_NL - peaks_NPL[:, above - 1])
    if tuple(levels) == tuple(known_levels):
        return peaks_NL.copy()
    if len(known_levels) == 1:
        return np.repeat(peaks_NL, len(asked), axis=1)
    wanted_NK = np.broadcast_to(scores(asked), (len(peaks_NL), len(asked)))
    return read_at(peaks_NL, scores(np.asarray(known_levels)), wanted_NK)
