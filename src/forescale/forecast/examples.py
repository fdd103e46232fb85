"""What a model that is trained learns from: examples cut from one series.

Axes: T = time, B = example, J = target.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Targets
from forescale.forecast.refit import FEW


def targets_ahead(values_T: Array, ends: npt.NDArray[np.int64], targets: Targets) -> Array:
    """targets_BJ of the steps from each end on: ``values_T[end]`` is the first that is not known yet."""
    return np.column_stack(
        [
            sliding_window_view(values_T, lead)[ends].max(axis=1) if peak else values_T[ends + lead - 1]
            for lead, peak in zip(targets.lead_steps_J.tolist(), targets.peak_J.tolist(), strict=True)
        ]
    )


def seasons_back(season_steps: int, lead_steps: int) -> int:
    """Steps from a target back to the newest value of its phase that is known now: whole seasons."""
    return season_steps * -(-lead_steps // season_steps)


def steps_before(season_steps: int | None, length: int, targets: Targets, window_steps: int) -> int:
    """Values before the first example that has a season before each target; 0 when there is no room."""
    if not season_steps:
        return 0
    longest = int(targets.lead_steps_J.max())
    needed = seasons_back(season_steps, longest)
    return needed if length >= needed + longest + window_steps + FEW else 0
