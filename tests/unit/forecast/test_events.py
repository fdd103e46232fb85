from __future__ import annotations

import pytest

from forescale.core.errors import InvalidInput
from forescale.forecast.events import PlannedEvent, event_facts, read_plan

HEAD = "start,end,name"


def sale(start_s: float, end_s: float, name: str = "sale") -> PlannedEvent:
    return PlannedEvent(name=name, start_s=start_s, end_s=end_s)


def test_an_event_shows_by_its_share_of_each_step() -> None:
    facts = event_facts([sale(1060.0, 1210.0)], 1000.0, 60.0, 5)
    assert [step["sale"] for step in facts] == [0.0, 1.0, 1.0, 0.5, 0.0]


def test_events_of_one_name_are_one_fact_and_of_two_names_two() -> None:
    events = [sale(0.0, 10.0), sale(20.0, 30.0), sale(10.0, 30.0, "backup")]
    assert event_facts(events, 0.0, 10.0, 4) == [
        {"sale": 1.0, "backup": 0.0},
        {"sale": 0.0, "backup": 1.0},
        {"sale": 1.0, "backup": 1.0},
        {"sale": 0.0, "backup": 0.0},
    ]
    assert event_facts([], 0.0, 10.0, 2) == [{}, {}]


def test_a_plan_is_read_in_any_order_of_lines_and_columns() -> None:
    plan = read_plan(
        [
            "name, Start ,end",
            "# known in May",
            "sale,2026-05-02T00:00:00Z,2026-05-02T12:00:00+02:00",
            "",
            '"move, to new hosts",2026-05-01T00:00:00Z,2026-05-03T00:00:00Z',
        ]
    )
    assert [event.name for event in plan.events] == ["move, to new hosts", "sale"]
    assert plan.events[1].end_s - plan.events[1].start_s == 36000.0
    assert plan.zoned
    assert plan.names == ("move, to new hosts", "sale")


def test_times_are_seconds_or_milliseconds_since_1970_or_dates_without_a_zone() -> None:
    seconds = read_plan([HEAD, "1777000000,1777000600,sale"])
    millis = read_plan([HEAD, "1777000000000,1777000600000,sale"])
    assert seconds == millis
    assert seconds.zoned
    assert not read_plan([HEAD, "2026-05-01 00:00,2026-05-02,sale"]).zoned


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "its columns are none; give start, end, name"),
        (["start,end,title", "1,2,x"], "its columns are start, end, title; give start, end, name"),
        ([HEAD + ",place", "1,2,x,y"], "give start, end, name"),
        ([HEAD], "there is no event in it"),
        ([HEAD, "2026-05-01,2026-05-02"], "line 2 has 2 fields, not 3"),
        ([HEAD, "2026-05-01,2026-05-02, "], "line 2: the event has no name"),
        ([HEAD, "2026-05-01,soon,sale"], "line 2: 'soon' is neither seconds since 1970 nor"),
        ([HEAD, "2026-05-01,,sale"], "line 2: '' is neither"),
        ([HEAD, "2026-05-02,2026-05-02,sale"], "line 2: the event does not end after its start"),
        ([HEAD, "2026-05-01,2026-05-02T00:00:00Z,sale"], "line 2: '2026-05-02T00:00:00Z' is not written as"),
        ([HEAD, "3,7,sale"], "its times are numbers, but not seconds since 1970"),
        (
            [HEAD, "2026-05-03,2026-05-05,sale", "2026-05-01,2026-05-04,sale"],
            "lines 2 and 3: two events 'sale' overlap",
        ),
    ],
)
def test_what_is_no_plan_is_said_by_line(lines: list[str], said: str) -> None:
    with pytest.raises(InvalidInput, match=r"\A.*" + said.replace("(", r"\(")):
        read_plan(lines)


def test_events_that_follow_each_other_do_not_overlap() -> None:
    lines = [HEAD, "2026-05-01,2026-05-02,sale", "2026-05-02,2026-05-03,sale", "2026-05-01,2026-05-09,move"]
    assert len(read_plan(lines).events) == 3
