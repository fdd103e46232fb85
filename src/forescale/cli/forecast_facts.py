"""What is known of each step of a series, and of those to come: the calendar, planned events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forescale.core.errors import InvalidInput
from forescale.forecast.calendar import CALENDAR, calendar_facts
from forescale.forecast.events import Plan, event_facts
from forescale.forecast.forecaster import Covariates
from forescale.forecast.series import Series


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts about the steps of a series and as many after its end as are forecast.

    Attributes:
        names: of the facts; none where nothing is known.
        of_steps: of the first step, the second, ...
        notes: what was made of events, a sentence each.
    """

    names: tuple[str, ...] = ()
    of_steps: Sequence[Covariates] = ()
    notes: tuple[str, ...] = ()


def known_facts(series: Series, ahead: int, *, plan: Plan | None, calendar: bool) -> Facts:
    """Facts for a forecast up to ``ahead`` steps.

    Raises:
        InvalidInput: the series has no dates, or with a zone where the events have none.
    """
    if plan is None and not calendar:
        return Facts()
    if series.start_s is None:
        option = "--calendar" if plan is None else "--events"
        raise InvalidInput(f"{option} needs a series whose times are dates")
    if plan is not None and plan.zoned is not series.zoned:
        there, missing = ("events", "series") if plan.zoned else ("series", "events")
        raise InvalidInput(
            f"times of the {there} have a zone, those of the {missing} do not: write them alike"
        )
    steps = len(series.values_T) + ahead
    found: list[dict[str, float]] = [{} for _ in range(steps)]
    names: tuple[str, ...] = ()
    notes: list[str] = []
    if calendar:
        names += CALENDAR
        _add(found, calendar_facts(series.start_s, series.step_s, steps))
    if plan is not None:
        names += plan.names
        _add(found, event_facts(plan.events, series.start_s, series.step_s, steps))
        notes += _notes(series, ahead, plan, found)
    return Facts(names=names, of_steps=found, notes=tuple(notes))


def _add(found: Sequence[dict[str, float]], facts: Sequence[Covariates]) -> None:
    for step, more in zip(found, facts, strict=True):
        step.update(more)


def _notes(series: Series, ahead: int, plan: Plan, found: Sequence[Covariates]) -> list[str]:
    """Which events play a part, and which of them nothing can be learned about."""
    assert series.start_s is not None
    now_s = series.start_s + len(series.values_T) * series.step_s
    end_s = now_s + ahead * series.step_s
    past = sum(series.start_s < event.end_s and event.start_s < now_s for event in plan.events)
    to_come = sum(now_s < event.end_s and event.start_s < end_s for event in plan.events)
    notes = [f"of {len(plan.events)} events {past} fall into the series, {to_come} into the time forecast"]
    seen, coming = found[: len(series.values_T)], found[len(series.values_T) :]
    new = [name for name in plan.names if _any(coming, name) and not _any(seen, name)]
    return notes + [f"{name!r} never was in the series: nothing is known of what it does" for name in new]


def _any(steps: Sequence[Covariates], name: str) -> bool:
    return any(step[name] for step in steps)
