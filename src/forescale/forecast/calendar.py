"""What the calendar says of a step, as facts that a forecast may go by."""

from __future__ import annotations

import numpy as np

from forescale.forecast.forecaster import Covariates

_DAY_S, _WEEK_S = 86400.0, 604800.0
_MONDAY_S = 4 * _DAY_S  # 1970 began on a Thursday

CALENDAR = ("day_sin", "day_cos", "half_day_sin", "half_day_cos", "week_sin", "week_cos", "weekend")
"""Names of the facts: the times of day and week as points on circles, and 1 on Saturdays and Sundays."""


def calendar_facts(start_s: float, step_s: float, steps: int) -> list[Covariates]:
    """Facts about steps that follow each other.

    Args:
        start_s: seconds since 1970 of the first, by the clock of those whose habits count.
        step_s: seconds from one to the next.
        steps: how many.
    """
    at_s_T = start_s + step_s * np.arange(steps)
    turns = {
        "day": at_s_T / _DAY_S,
        "half_day": 2.0 * at_s_T / _DAY_S,
        "week": (at_s_T - _MONDAY_S) / _WEEK_S,
    }
    columns = [wave(2.0 * np.pi * turn_T) for turn_T in turns.values() for wave in (np.sin, np.cos)]
    columns.append(turns["week"] % 1.0 >= 5.0 / 7.0)
    return [dict(zip(CALENDAR, facts, strict=True)) for facts in np.column_stack(columns).tolist()]
