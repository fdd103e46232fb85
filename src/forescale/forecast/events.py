"""Events whose times are known beforehand: campaigns, deployments, batch jobs, holidays.

Events of one name are of one kind: what the first ones did to the series is expected of the next.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array, Covariates
from forescale.forecast.series_table import epoch_unit_s, parsed_time

_COLUMNS = ("start", "end", "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEvent:
    """Something that lasts from ``start_s`` to ``end_s``, seconds since 1970."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Events, in the order of their starts.

    Attributes:
        zoned: whether their times are points in time, not dates without a zone.
    """

    events: tuple[PlannedEvent, ...]
    zoned: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({event.name for event in self.events}))


def event_facts(
    events: Sequence[PlannedEvent], start_s: float, step_s: float, steps: int
) -> list[Covariates]:
    """For each step, by the name of an event, the share of the step that it takes up: 0 to 1.

    Args:
        events: those of one name do not overlap.
        start_s: seconds since 1970 of the first step.
        step_s: seconds from one step to the next.
        steps: how many.
    """
    at_s_T = start_s + step_s * np.arange(steps)
    share: dict[str, Array] = {event.name: np.zeros(steps) for event in events}
    for event in events:
        covered_s_T = np.minimum(event.end_s, at_s_T + step_s) - np.maximum(event.start_s, at_s_T)
        share[event.name] += np.maximum(covered_s_T, 0.0) / step_s
    return (
        [dict(zip(share, facts, strict=True)) for facts in np.column_stack([*share.values()]).tolist()]
        if share
        else [{}] * steps
    )


def read_plan(lines: Iterable[str]) -> Plan:
    """Reads a file with the columns ``start``, ``end`` and ``name``, separated by commas.

    Times are ISO 8601 or seconds (milli-, micro-, nanoseconds) since 1970.

    Raises:
        InvalidInput: it is no such file; the message names the line.
    """
    rows = csv.reader(lines, skipinitialspace=True)
    header = [name.strip().lower() for name in next(rows, [])]
    if sorted(header) != sorted(_COLUMNS):
        raise InvalidInput(f"its columns are {', '.join(header) or 'none'}; give {', '.join(_COLUMNS)}")
    found: list[tuple[int, str, float, float]] = []
    zones = set[bool | None]()
    for row in rows:
        number = rows.line_num
        if not row or row[0].startswith("#"):
            continue
        if len(row) != len(header):
            raise InvalidInput(f"line {number} has {len(row)} fields, not {len(header)}")
        fields = dict(zip(header, (field.strip() for field in row), strict=True))
        if not fields["name"]:
            raise InvalidInput(f"line {number}: the event has no name")
        start, end = (_time(number, fields[column], zones) for column in ("start", "end"))
        if not start < end:
            raise InvalidInput(f"line {number}: the event does not end after its start")
        found.append((number, fields["name"], start, end))
    if not found:
        raise InvalidInput("there is no event in it")
    return Plan(events=_in_order(found, None in zones), zoned=False not in zones)


def _time(number: int, text: str, zones: set[bool | None]) -> float:
    """A time, whose kind is added to ``zones``."""
    time = parsed_time(text)
    if time is None or np.isnan(time[0]):
        raise InvalidInput(
            f"line {number}: {text!r} is neither seconds since 1970 nor an ISO 8601 time "
            "such as 2026-03-01T12:00:00Z"
        )
    zones.add(time[1])
    if len(zones) > 1:
        raise InvalidInput(f"line {number}: {text!r} is not written as the times before it (zone, or unit)")
    return time[0]


def _in_order(found: Sequence[tuple[int, str, float, float]], numbered: bool) -> tuple[PlannedEvent, ...]:
    unit_s = (
        epoch_unit_s(np.array([time for _, _, start, end in found for time in (start, end)]))
        if numbered
        else 1.0
    )
    if unit_s is None:
        raise InvalidInput("its times are numbers, but not seconds since 1970")
    ordered = sorted(found, key=lambda event: event[2])
    for name in {name for _, name, _, _ in ordered}:
        for (before, _, _, end), (after, _, start, _) in pairwise(
            event for event in ordered if event[1] == name
        ):
            if start < end:
                raise InvalidInput(
                    f"lines {min(before, after)} and {max(before, after)}: two events {name!r} overlap"
                )
    return tuple(
        PlannedEvent(name=name, start_s=start * unit_s, end_s=end * unit_s) for _, name, start, end in ordered
    )
