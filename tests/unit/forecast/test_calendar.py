from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from forescale.forecast.calendar import CALENDAR, calendar_facts

MONDAY_S = datetime(2026, 3, 2, tzinfo=UTC).timestamp()


def test_the_times_of_day_and_week_are_points_on_circles() -> None:
    midnight, noon = calendar_facts(MONDAY_S, 43200.0, 2)
    assert tuple(midnight) == CALENDAR
    assert (midnight["day_sin"], midnight["day_cos"]) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert (noon["day_sin"], noon["day_cos"]) == pytest.approx((0.0, -1.0), abs=1e-6)
    assert (midnight["week_sin"], midnight["week_cos"]) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert noon["half_day_cos"] == pytest.approx(1.0)


def test_facts_return_after_a_week_and_not_before() -> None:
    hours = np.array([list(facts.values()) for facts in calendar_facts(MONDAY_S + 7200.0, 3600.0, 169)])
    assert hours[168] == pytest.approx(hours[0], abs=1e-6)
    assert np.abs(hours[1:168] - hours[0]).max(axis=1).min() > 0.01


def test_saturday_and_sunday_are_the_weekend() -> None:
    days = calendar_facts(MONDAY_S, 86400.0, 8)
    assert [facts["weekend"] for facts in days] == [0, 0, 0, 0, 0, 1, 1, 0]
    minutes = calendar_facts(MONDAY_S + 5 * 86400 - 60, 60.0, 2)
    assert [facts["weekend"] for facts in minutes] == [0, 1]
