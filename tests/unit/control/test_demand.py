"""What is forecast of models' demand, and that it can be kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forescale.control.demand import DemandForecast, Minute
from forescale.core.errors import InvalidInput
from forescale.forecast.named import NamedForecasts

LEVELS = (0.5, 0.75)
LEADS_S = {"digits": 2.5, "words": 1.0}


def fed(forecast: DemandForecast, begin_s: int, end_s: int) -> DemandForecast:
    """Ten busy seconds of twenty, and a steady trickle."""
    for second in range(begin_s, end_s):
        rates_per_s = {"digits": 40.0 if second % 20 < 10 else 5.0, "words": 3.0}
        forecast = forecast.taken_in(rates_per_s, float(second))
    return forecast


@pytest.fixture(scope="module")
def known() -> DemandForecast:
    return fed(DemandForecast(), 0, 300)


def test_no_more_is_expected_than_three_times_what_was_ever_asked() -> None:
    forecast = DemandForecast()
    for second in range(20):
        forecast = forecast.taken_in({"digits": float(second)}, float(second))
    (peak_per_s,) = forecast.peaks_per_s({"digits": 30.0}, (0.99,))["digits"]
    assert 19.0 < peak_per_s <= 57.0


def test_models_that_nobody_asks_for_are_not_forecast_and_forgotten_after_two_hours(
    known: DemandForecast,
) -> None:
    silent = known.taken_in({"digits": 0.0, "words": 0.0, "asleep": 0.0}, 300.0)
    assert silent.peaks_per_s({**LEADS_S, "asleep": 1.0}, LEVELS).keys() == LEADS_S.keys()
    later = silent.taken_in({"digits": 0.0, "words": 1.0}, 7600.0)
    assert later.peaks_per_s(LEADS_S, LEVELS).keys() == {"words"}


def test_it_goes_on_from_a_snapshot_as_if_nothing_had_been_in_between(known: DemandForecast) -> None:
    # Another process' clock shows other times.
    found = DemandForecast(epoch_s=-5000.0).restored(known.state(10**9), now_s=-4701.0)
    assert found.peaks_per_s(LEADS_S, LEVELS) == known.peaks_per_s(LEADS_S, LEVELS)
    begun = known
    for second in range(300, 310):
        begun = begun.taken_in({"digits": np.nan, "words": np.nan}, float(second))
    late = DemandForecast().restored(known.state(10**9), now_s=309.0)
    for model, peaks in begun.peaks_per_s(LEADS_S, LEVELS).items():
        assert late.peaks_per_s(LEADS_S, LEVELS)[model] == pytest.approx(peaks, rel=1e-6)


def test_the_time_in_between_has_passed(known: DemandForecast) -> None:
    def soon_per_s(away_s: int) -> float:
        found = DemandForecast().restored(known.state(10**9), now_s=299.0 + away_s)
        return found.peaks_per_s({"digits": 1.0}, (0.5,))["digits"][0]

    # Seconds 300 to 309 are busy, then ten are not.
    assert soon_per_s(5) > 25.0
    assert soon_per_s(15) < 15.0


def test_after_hours_only_what_was_asked_is_known(known: DemandForecast) -> None:
    later = DemandForecast().restored(known.state(10**9), now_s=8000.0)
    assert later.peaks_per_s(LEADS_S, LEVELS) == {}
    back = DemandForecast().restored(known.state(10**9), now_s=200.0)  # the clock was set back
    assert back.peaks_per_s(LEADS_S, LEVELS) == known.peaks_per_s(LEADS_S, LEVELS)


def test_a_snapshot_is_bounded() -> None:
    forecast = DemandForecast()
    for second in range(2):
        forecast = forecast.taken_in({f"m{number}": 1.0 for number in range(20)}, float(second))
    state = forecast.state(4_000_000)["seconds"]
    assert state["sizes"] == [8]
    assert sorted(state["places"].values()) == list(range(8))


NOW_S = 200_000 * 60.0
"""A full hour would be 40 minutes later."""


@pytest.fixture(scope="module")
def minutes() -> dict[str, Any]:
    """What is kept of a model that is asked 60 rows/s in one minute of each hour, else 5."""
    forecast = NamedForecasts(step_s=60.0, horizon_steps=(1, 2))
    for minute in range(199_760, 200_000):
        forecast = forecast.taken_in({"digits": 60.0 if minute % 60 == 0 else 5.0})
    return forecast.state(10**9)


def taught(minutes: dict[str, Any], *, asked_s: tuple[float, float]) -> DemandForecast:
    """Known by the minute, and asked for the first and last time as long ago."""
    first_s, last_s = asked_s
    known = {"taken_s": NOW_S, "minute": 200_000, "minutes": minutes}
    known["asked"] = {"digits": [70.0, NOW_S - first_s, NOW_S - last_s]}
    return DemandForecast().restored({**DemandForecast().state(10**9), **known}, NOW_S)


def at_the_hour(forecast: DemandForecast, rate_per_s: float) -> list[float]:
    """What is expected within three seconds: a minute, ten seconds and one second before the full hour."""
    found: list[float] = []
    for second in range(37 * 60, 40 * 60):
        forecast = forecast.taken_in({"digits": rate_per_s}, NOW_S + second)
        if second in {39 * 60, 40 * 60 - 10, 40 * 60 - 1}:
            found.append(forecast.peaks_per_s({"digits": 3.0}, LEVELS)["digits"][0])
    return found


def test_the_time_of_day_is_known_by_the_minute(minutes: dict[str, Any]) -> None:
    before, soon, now = at_the_hour(taught(minutes, asked_s=(90_000.0, 0.0)), 5.0)
    assert (before, soon) == pytest.approx((5.0, 5.0), abs=1.0)
    assert now > 40.0
    assert max(at_the_hour(taught(minutes, asked_s=(40_000.0, 0.0)), 5.0)) < 6.0, "it was not there yesterday"


def test_models_that_sleep_are_known_by_the_minute_alone(minutes: dict[str, Any]) -> None:
    before, soon, now = at_the_hour(taught(minutes, asked_s=(90_000.0, 8000.0)), 0.0)
    assert now > 40.0 > before >= soon


def test_a_minute_is_worth_what_nine_of_ten_seconds_stay_below() -> None:
    minute = Minute(number=1)
    for second in range(60):
        minute = minute.taken_in({"digits": 9.0 if second < 7 else 2.0, "burst": 50.0 * (second < 5)})
    assert minute.values(["digits", "burst", "asleep"]) == {"digits": 9.0, "burst": 0.0, "asleep": 0.0}
    begun = Minute(number=1).taken_in({"digits": 9.0})
    assert np.isnan(begun.values(["digits"])["digits"]), "most of it is not known"


@pytest.mark.parametrize(
    "damage",
    [
        {"seconds": {"sizes": [1, 1], "places": {}, "banks": []}},
        {"seconds": {"sizes": [], "places": {"digits": 0}, "banks": []}},
        {"seconds": {"sizes": [8], "places": {}, "banks": [{"_blocks": [{"_step": 1}]}]}},
        {"seconds": None},
        {"asked": {"digits": 1.0}},
        {"asked": {"digits": [float("nan"), 1.0]}},
        {"taken_s": "now"},
    ],
)
def test_what_is_no_snapshot_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        DemandForecast().restored({**DemandForecast().state(10**6), **damage}, 0.0)
