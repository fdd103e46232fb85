"""Lines of a text file to times and values: which column is which is found out.

Read is what monitoring systems and access logs export: one number a line; a column of times beside one or
more columns of values; or times alone, each an event. Fields are separated by commas, semicolons, tabs, bars
or blanks, with or without a head; lines that begin with ``#`` are skipped.

Axes: R = line of the file that holds data.
"""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from itertools import chain, islice
from math import inf, isnan, nan

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array

_SAMPLE = 200
"""Lines from which the columns are told."""
_LARGEST, _LATEST = 1e30, 1e20
"""Beyond these, a value or a time (nanoseconds since 1970) is no measurement, nor is it forecast."""
_YEARS = range(1900, 2200)
"""Dates in others stand for something that is no date."""
_MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "-", "?"})
_TIME_NAMES = frozenset(
    {"t", "ts", "ds", "time", "date", "when", "epoch", "index", "idx", "step"}
    | {f"{unit}{s}" for unit in ("second", "minute", "hour", "day") for s in ("", "s")}
)
_TIME_NAME = re.compile(
    r"timestamp|datetime|^(t|time|start|elapsed)_(ns|us|ms|s|sec|seconds|min|minutes|h|hours)$"
)
_VALUE_NAMES = frozenset({"y", "value", "values"})
_UNIT = re.compile(r"(?:^|_)(?:(ns)|(us)|(ms)|(s|secs?|seconds?)|(min|minutes?)|(h|hours?)|(days?))$")
_UNITS_S = (1e-9, 1e-6, 1e-3, 1.0, 60.0, 3600.0, 86400.0)
_EPOCH_S = (3e8, 4.2e9)
"""Seconds since 1970 that are taken for a date: 1979 to 2103. Fewer are counted from the file's own start."""
_EPOCH_UNITS_S = (1.0, 1e-3, 1e-6, 1e-9)


class TimeKind(Enum):
    """What the times of a file are."""

    NONE = "none"
    COUNTED = "counted"  # a number of units that is no date: steps, seconds, minutes, ...
    LOCAL = "local"  # dates without a zone
    ZONED = "zoned"  # points in time


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file's times and values, in its own order.

    Attributes:
        kind: what ``times_R`` are.
        times_R: of a date, seconds since 1970 (in its own zone if that is not known); else as written.
        unit_s: seconds that 1 stands for in ``times_R``; None where nobody says.
        values_R: NaN where missing; None where there is no column of values, and each line is an event.
        column: name of the values' column, empty if it has none.
        others: names of columns that could have been it.
        timeless: lines left out because they had no time.
        unread: where there is no column of values, the first that is not the time's, and what it begins with;
            empty if there is none.
    """

    kind: TimeKind
    times_R: Array | None
    unit_s: float | None
    values_R: Array | None
    column: str
    others: tuple[str, ...]
    timeless: int
    unread: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where in a line things are: its time (``stamp``), its value; ``width`` is the number of its fields."""

    delimiter: str
    headed: bool
    names: tuple[str, ...]
    width: int
    stamp: int | None
    value: int | None
    others: tuple[int, ...]
    unread: str


def read_table(lines: Iterable[str], *, column: str | None = None) -> Table:
    """Reads a file's times and values, line by line.

    Args:
        lines: of the file, with or without their ends.
        column: name of the column of values, or its number from 1; None for the first that holds numbers, but
            one called ``y`` or ``value`` before all others.

    Raises:
        InvalidInput: there is nothing in it, or no such column, or a field is not what its column holds; the
            message names the line.
    """
    rest = iter(lines)
    sample = list(islice(rest, _SAMPLE))
    layout = _layout(sample, column)
    rows = _rows(chain(sample, rest), layout.delimiter)
    if layout.headed:
        next(rows)
    times, values, zoned, timeless = _columns(rows, layout)
    if not values:
        raise InvalidInput("there is no line of data")
    known = np.frombuffer(times, dtype=np.float64) if layout.stamp is not None else None
    kind, unit_s = TimeKind.NONE, None
    if known is not None and layout.stamp is not None:
        kind, unit_s = (TimeKind.ZONED if zoned else TimeKind.LOCAL), 1.0
        if zoned is None:
            kind, unit_s = _unit(known, layout.names[layout.stamp])
    return Table(
        kind=kind,
        times_R=known * unit_s if known is not None and unit_s is not None else known,
        unit_s=unit_s,
        values_R=None if layout.value is None else np.frombuffer(values, dtype=np.float64),
        column="" if layout.value is None else layout.names[layout.value],
        others=tuple(layout.names[other] for other in layout.others),
        timeless=timeless,
        unread=layout.unread if layout.value is None else "",
    )


# --- lines ---------------------------------------------------------------------------------------------


def _rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line that is neither blank nor a comment.

    Where a line is one field, a blank one amid others is a missing value.
    """
    if delimiter in {"", " "}:
        blank = 0
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text:
                blank += 1
            elif not text.startswith("#"):
                if not delimiter:
                    yield from ((number - k, [""]) for k in range(blank, 0, -1))
                blank = 0
                yield number, [text.strip('"')] if not delimiter else text.split()
        return
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        for row in reader:
            if row and not row[0].startswith("#"):
                yield reader.line_num, row
    except csv.Error as error:
        raise InvalidInput(f"line {reader.line_num}: {error}") from error


def _columns(
    rows: Iterable[tuple[int, list[str]]], layout: _Layout
) -> tuple[array[float], array[float], bool | None, int]:
    """Times; values (1 for an event); whether times that are dates have a zone; lines without a time."""
    times, values, timeless = array("d"), array("d"), 0
    zoned: bool | None = None
    of_time, of_value = layout.stamp, layout.value
    needed = max(k for k in (of_time, of_value) if k is not None) + 1
    for number, row in rows:
        if len(row) < needed:
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            raise InvalidInput(f"line {number} has {fields}; the first line of data has {layout.width}")
        if of_time is not None:
            text = row[of_time]
            time, date_zoned = _time(number, text)
            if isnan(time):
                timeless += 1
                continue
            if times and date_zoned is not zoned:
                raise InvalidInput(
                    f"line {number}: {text!r} is not written as the times before it (zone, or unit)"
                )
            zoned = date_zoned
            times.append(time)
        values.append(1.0 if of_value is None else _value(number, row[of_value]))
    return times, values, zoned, timeless


def _value(number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        if text.strip().lower() in _MISSING:
            return nan
        raise InvalidInput(
            f"line {number}: {text!r} is not a number (a missing value is empty, NaN or NA)"
        ) from None
    if abs(value) > _LARGEST:
        raise InvalidInput(f"line {number}: {text!r} is {'not finite' if abs(value) == inf else 'too large'}")
    return value


def _time(number: int, text: str) -> tuple[float, bool | None]:
    found = parsed_time(text)
    if found is None:
        raise InvalidInput(
            f"line {number}: {text!r} is neither a number nor an ISO 8601 time such as 2026-03-01T12:00:00Z"
        )
    return found


def parsed_time(text: str) -> tuple[float, bool | None] | None:
    """Seconds since 1970 and whether the zone is known, or a plain number and None; NaN where missing.

    None if it is neither.
    """
    try:
        value = float(text)
    except ValueError:
        pass
    else:
        return None if abs(value) > _LATEST else (value, None)
    if text.strip().lower() in _MISSING:
        return nan, None
    try:
        date = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    if date.year not in _YEARS:
        return None
    if date.tzinfo is None:
        return date.replace(tzinfo=UTC).timestamp(), False
    return date.timestamp(), True


# --- which column is which -----------------------------------------------------------------------------


def _layout(sample: Sequence[str], column: str | None) -> _Layout:
    full = [line.strip() for line in sample if line.strip() and not line.lstrip().startswith("#")]
    if not full:
        raise InvalidInput("it is empty")
    delimiter = _delimiter(full)
    rows = [row for _, row in _rows(sample, delimiter)]
    headed = any(parsed_time(field) is None for field in rows[0])
    body = rows[1:] if headed else rows
    if not body:
        raise InvalidInput("there is no line of data")
    width = len(body[0])
    names = tuple(name.strip() for name in rows[0]) if headed else ()
    if len(names) != width:  # some write no name above an index
        names = (*("" for _ in range(width - len(names))), *names)[-width:]
    fields = [[row[k] for row in body if len(row) > k] for k in range(width)]
    numeric = [k for k in range(width) if _mostly(fields[k], _is_number)]
    time = _time_column(names, fields, numeric)
    values = [k for k in numeric if k != time]
    value = _value_column(names, values, time, column)
    others = tuple(k for k in values if k != value)
    unread = next((f"column {names[k] or k + 1} ({fields[k][0]!r})" for k in range(width) if k != time), "")
    return _Layout(
        delimiter=delimiter,
        headed=headed,
        names=names,
        width=width,
        stamp=time,
        value=value,
        others=others,
        unread=unread,
    )


def _delimiter(full: Sequence[str]) -> str:
    """Empty where a line is one field."""
    for delimiter in ",;\t|":
        if all(delimiter in line for line in full[:20]):
            return delimiter
    last = full[-1].strip('"')
    return " " if parsed_time(last) is None and len(last.split()) > 1 else ""


def _time_column(names: Sequence[str], fields: Sequence[Sequence[str]], numeric: Sequence[int]) -> int | None:
    """By name, by dates in it, or because it goes up evenly beside another column of numbers."""
    for k, name in enumerate(names):
        if name.lower() in _TIME_NAMES or _TIME_NAME.search(name.lower()):
            return k
    for k, column in enumerate(fields):
        if k not in numeric and _mostly(column, lambda field: parsed_time(field) is not None):
            return k
    for k in numeric:
        known = np.array([float(field) for field in fields[k] if _is_number(field)])
        gaps = np.diff(known)
        if len(known) < 3 or len(known) < len(fields[k]):
            continue
        if len(numeric) > 1 and (epoch_unit_s(known) is not None or np.ptp(gaps) == 0) and gaps.min() > 0:
            return k
        if len(fields) == 1 and not names[k] and epoch_unit_s(known) and gaps.min() >= 0 and gaps.max() > 0:
            return k
    return None


def _value_column(
    names: Sequence[str], candidates: Sequence[int], time: int | None, wanted: str | None
) -> int | None:
    if wanted is None:
        preferred = [k for k in candidates if names[k].lower() in _VALUE_NAMES]
        value = next(iter(preferred or candidates), None)
        if value is None and time is None:
            raise InvalidInput("no column holds numbers or ISO 8601 times")
        return value
    named = [k for k, name in enumerate(names) if name == wanted]
    if not named and wanted.isdigit() and 1 <= int(wanted) <= len(names):
        named = [int(wanted) - 1]
    if not named:
        known = ", ".join(name or f"(number {k + 1})" for k, name in enumerate(names))
        raise InvalidInput(f"there is no column {wanted!r}; it has {known}")
    if named[0] == time:
        raise InvalidInput(f"column {wanted!r} holds the times, not values")
    return named[0]


def _mostly(fields: Sequence[str], fits: Callable[[str], bool]) -> bool:
    """More than half of what is there, so that a single wrong field is found out by its line."""
    there = [field for field in fields if field.strip().lower() not in _MISSING]
    return 2 * sum(map(fits, there)) > len(there)


def _is_number(field: str) -> bool:
    try:
        return abs(float(field)) <= _LARGEST
    except ValueError:
        return False


def _unit(times_R: Array, name: str) -> tuple[TimeKind, float | None]:
    """Of times that are numbers: seconds since 1970 in some unit, or the unit in the column's name."""
    if epoch := epoch_unit_s(times_R):
        return TimeKind.ZONED, epoch
    found = _UNIT.search(name.lower())
    if found is None or found.lastindex is None:
        return TimeKind.COUNTED, None
    return TimeKind.COUNTED, _UNITS_S[found.lastindex - 1]


def epoch_unit_s(times_R: Array) -> float | None:
    """The unit in which most of these numbers are dates."""
    middle = float(np.median(times_R)) if len(times_R) else 0.0
    return next((unit for unit in _EPOCH_UNITS_S if _EPOCH_S[0] <= middle * unit <= _EPOCH_S[1]), None)
