"""How much less is held in reserve than a moving maximum would, at the same coverage.

Axes: T = time, O = origin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.forecast.forecaster import Array


def over_reservation(peaks_O: Array, reserved_O: Array) -> float:
    """Mean of what was reserved and not needed."""
    return float(np.maximum(0.0, reserved_O - peaks_O).mean())


def moving_maximum(
    values_T: Array, origins: Sequence[int], peaks_O: Array, windows: Sequence[int], covered: float
) -> float:
    """The least over-reservation of a moving maximum that covers as many of the peaks.

    It is chosen with hindsight, on the very origins it is compared at: the window, and whether the maximum
    is multiplied or added to; how much by follows from the coverage asked for.
    """
    found: list[float] = []
    for window in windows:
        highest_O = np.array([values_T[max(0, origin + 1 - window) : origin + 1].max() for origin in origins])
        added = _least_covering(peaks_O - highest_O, covered)
        found.append(over_reservation(peaks_O, highest_O + added))
        if (highest_O > 0.0).all():
            found.append(over_reservation(peaks_O, highest_O * _least_covering(peaks_O / highest_O, covered)))
    return min(found)


def _least_covering(needed_O: Array, covered: float) -> float:
    """The smallest of the needs that is enough for a share of them."""
    return float(np.sort(needed_O)[max(0, int(np.ceil(covered * len(needed_O) - 1e-9)) - 1)])
