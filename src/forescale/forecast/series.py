"""What a file holds to a regularly spaced series, and what had to be done for it, in words.

Axes: R = line of the file that holds data, T = step of the series.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array
from forescale.forecast.series_table import Table, TimeKind, read_table

Combination = Literal["sum", "mean", "count"]

_FEWEST = 10
_MOST = 10_000_000
_SPARSE = 100
"""Steps per line beyond which something is wrong with the times, in a series that is long at all."""
_LONG = 100_000
_NEAR = 0.5  # of the usual gap: what a stamp may be off and still count as on the grid
_ALIKE = 0.6  # share of gaps near the usual one that makes stamps regular
_GRIDDED = 0.9  # share of gaps that are whole multiples of the usual one, if there are holes
_ROUND_S = (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400)
_ROUND_TO_S = (86400.0, 3600.0, 60.0, 10.0, 5.0, 1.0, 0.1, 1e-3)
_EVENTS_PER_STEP = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A regularly spaced series.

    Attributes:
        name: of its column; ``events`` where lines were counted; empty where the file gives none.
        values_T: NaN where missing.
        step_s: seconds between values.
        start_s: seconds since 1970 of the first value (of the beginning of its step, where several lines made
            one value); None where the file has no dates.
        zoned: whether ``start_s`` is a point in time, not a date without a zone.
        counts: whole numbers from 0.
        step_known: False where ``step_s`` is a guess: nobody said how far apart values are.
        lower: 0 if no value was below: demand and utilisation never are; None if some were.
        notes: what was decided and done, a sentence each.
    """

    name: str
    values_T: Array
    step_s: float
    start_s: float | None
    zoned: bool
    counts: bool
    step_known: bool
    lower: float | None
    notes: tuple[str, ...]

    @property
    def missing(self) -> int:
        return int(np.isnan(self.values_T).sum())


def read_series(
    lines: Iterable[str],
    *,
    step_s: float | None = None,
    column: str | None = None,
    combination: Combination | None = None,
) -> Series:
    """Reads a series, see `series_table` for what may be in the file.

    Args:
        step_s: seconds between values; None for those of the file. Where the file counts steps, their length.
        column: as for `read_table`.
        combination: how lines that fall into one step become one value; ``count`` counts them, whatever they
            hold. None decides: events are counted, whole numbers from 0 summed, others averaged.

    Raises:
        InvalidInput: the file cannot be read so, or holds too few values.
    """
    table = read_table(lines, column=column)
    notes = _Notes()
    if table.times_R is None:
        if combination is not None or table.values_R is None:
            raise InvalidInput("it has no times, so every line is one step: there is nothing to combine")
        return _series(table, table.values_R, _told(step_s, notes), None, notes)
    if table.timeless:
        notes.add(f"{_lines(table.timeless)} without a time left out")
    return _timed(table, table.times_R, step_s, combination, chosen=column is not None, notes=notes)


class _Notes:
    """Sentences in the order in which things were done, and whether the step is only a guess."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.step_known = True

    def add(self, text: str) -> None:
        self.said.append(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spacing:
    """How a file's times lie: ``spacing_s`` apart, more or less; ``regular`` if one can speak of a grid."""

    spacing_s: float
    regular: bool


def _timed(
    table: Table,
    times_R: Array,
    step_s: float | None,
    combination: Combination | None,
    *,
    chosen: bool,
    notes: _Notes,
) -> Series:
    values_R = np.ones(len(times_R)) if table.values_R is None else table.values_R
    backward = int((np.diff(times_R) < 0).sum())
    if backward:
        order_R = np.argsort(times_R, kind="stable")
        times_R, values_R = times_R[order_R], values_R[order_R]
        notes.add(f"the times go back in {_places(backward)}: sorted")
    spacing = _spacing(times_R)
    times_R, spacing, step_s = _in_seconds(table, times_R, spacing, step_s, notes)
    if table.unread and spacing.regular and combination is None:
        raise InvalidInput(
            f"{table.unread} holds no numbers; lines are counted if they are combined by count"
        )
    combination = combination or _combination(table, spacing, chosen=chosen)
    if combination == "count":
        values_R = np.ones(len(times_R))
        if table.values_R is not None:
            notes.add("every line counts as one event; column and combination can be chosen")
    events = combination == "count" or (combination == "sum" and not spacing.regular)
    if events:
        values_T, start_s, step_s = _binned(times_R, values_R, step_s, notes)
    else:
        times_R, values_R = _merged(times_R, values_R, combination, notes)
        values_T, start_s, step_s = _resampled(times_R, values_R, spacing, step_s, combination, notes)
    start = start_s if table.kind in {TimeKind.LOCAL, TimeKind.ZONED} else None
    return _series(table, values_T, step_s, start, notes, counted=combination == "count")


def _series(
    table: Table,
    values_T: Array,
    step_s: float,
    start_s: float | None,
    notes: _Notes,
    *,
    counted: bool = False,
) -> Series:
    known = values_T[~np.isnan(values_T)]
    if len(known) < _FEWEST:
        few = "1 value is" if len(known) == 1 else f"{len(known)} values are"
        raise InvalidInput(f"{few} too few to forecast from; give at least {_FEWEST}")
    if table.others and not counted:
        notes.add(
            f"column {table.column or '(without a name)'} is forecast; others: {', '.join(table.others)}"
        )
    _note_missing(np.isnan(values_T), notes)
    counts = _are_counts(known)
    below = int((known < 0).sum())
    if counts:
        notes.add("counts: whole numbers from 0, and no forecast is below 0")
    elif below and _are_counts(np.abs(known)):
        notes.add(f"whole numbers, but {below} below 0, so not counts: forecasts may be below 0 too")
    if known.min() == known.max():
        notes.add(f"constant: every value is {known[0]:g}")
    name = "events" if counted else table.column
    return Series(
        name=name,
        values_T=values_T,
        step_s=step_s,
        start_s=start_s,
        zoned=table.kind is TimeKind.ZONED,
        counts=counts,
        step_known=notes.step_known,
        lower=None if below else 0.0,
        notes=tuple(notes.said),
    )


# --- times ---------------------------------------------------------------------------------------------


def _spacing(times_R: Array) -> _Spacing:
    gaps = np.diff(times_R)
    gaps = gaps[gaps > 0]
    if not len(gaps):
        raise InvalidInput("all lines have the same time")
    usual = float(np.median(gaps))
    near = np.abs(gaps - usual) <= _NEAR * usual
    # With many holes the usual gap is more than one step, but all are whole multiples of the short ones.
    short = float(np.quantile(gaps, 0.25, method="lower"))
    multiples = gaps / short
    on_grid = np.abs(multiples - np.maximum(1.0, np.round(multiples))) <= 0.1
    if on_grid.mean() >= _GRIDDED:
        usual, near = short, np.abs(gaps - short) <= 0.1 * short
    elif near.mean() < _ALIKE:
        return _Spacing(spacing_s=usual, regular=False)
    mean = float(gaps[near].mean())
    even = float(times_R[-1] - times_R[0]) / len(
        gaps
    )  # right if there is no hole, however much stamps are off
    rounded = [round(mean / unit) * unit for unit in _ROUND_TO_S]
    candidates = [s for s in (*rounded, even, mean, usual) if abs(s - mean) <= 0.1 * mean]
    fits = [_concentration(times_R, spacing_s) for spacing_s in candidates]
    return _Spacing(
        spacing_s=next(s for s, fit in zip(candidates, fits, strict=True) if fit >= 0.9 * max(fits)),
        regular=True,
    )


def _concentration(times_R: Array, spacing_s: float) -> float:
    """How much stamps lie in one place of the period: 1 on a grid of that spacing, 0 if anywhere."""
    return float(np.abs(np.exp((2j * np.pi / spacing_s) * (times_R - times_R[0])).mean()))


def _in_seconds(
    table: Table, times_R: Array, spacing: _Spacing, step_s: float | None, notes: _Notes
) -> tuple[Array, _Spacing, float | None]:
    """Times whose unit nobody says: steps, if they are counted one by one, else seconds."""
    if table.unit_s is not None:
        return times_R, spacing, step_s
    if spacing.spacing_s != 1.0 or (times_R % 1.0).any():
        notes.add("times are taken for seconds")
        return times_R, spacing, step_s
    unit_s = _told(step_s, notes)
    return times_R * unit_s, _Spacing(spacing_s=unit_s, regular=spacing.regular), unit_s


def _told(step_s: float | None, notes: _Notes) -> float:
    if step_s is None:
        notes.step_known = False
        notes.add("nothing says how far apart values are: taken for 1 s")
        return 1.0
    return step_s


def _combination(table: Table, spacing: _Spacing, *, chosen: bool) -> Combination:
    if table.values_R is None:
        return "count"
    if not spacing.regular and table.others and not chosen:
        return "count"  # a log of requests, with facts about each
    known = table.values_R[~np.isnan(table.values_R)]
    return "sum" if len(known) and _are_counts(known) else "mean"


def _merged(times_R: Array, values_R: Array, combination: Combination, notes: _Notes) -> tuple[Array, Array]:
    """Lines of the same time made one."""
    first_R = np.concatenate(([True], np.diff(times_R) > 0))
    if first_R.all():
        return times_R, values_R
    group_R = np.cumsum(first_R) - 1
    total, count = _totals(group_R, values_R)
    with np.errstate(invalid="ignore"):
        merged = np.where(count > 0, total if combination == "sum" else total / count, np.nan)
    done = "summed" if combination == "sum" else "averaged"
    notes.add(f"{_lines(int((~first_R).sum()))} with the time of another: {done}")
    return times_R[first_R], merged


def _resampled(
    times_R: Array,
    values_R: Array,
    spacing: _Spacing,
    step_s: float | None,
    combination: Combination,
    notes: _Notes,
) -> tuple[Array, float, float]:
    """Values on a grid, the first one's time, and the step."""
    spacing_s = spacing.spacing_s
    step_s = spacing_s if step_s is None else step_s
    if step_s < (_GRIDDED if spacing.regular else _NEAR) * spacing_s:
        raise InvalidInput(
            f"steps of {step_s:g} s are shorter than its values are apart; use {spacing_s:g} s or more"
        )
    # Each stamp belongs to a cell of the grid around it, so that being off by less than half matters nothing.
    turn_R = 2j * np.pi * (times_R - times_R[0]) / spacing_s
    phase_s = float(np.angle(np.exp(turn_R).mean())) / (2 * np.pi) * spacing_s if spacing.regular else 0.0
    origin_s = times_R[0] + phase_s - spacing_s / 2 if spacing.regular else times_R[0]
    bin_R = np.maximum(_bins(times_R, origin_s, step_s), 0)
    total, count = _totals(bin_R, values_R)
    expected = max(1.0, step_s / spacing_s) if spacing.regular else 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        values_T = np.where(count >= expected / 2, total / count, np.nan)
    if combination == "sum":
        values_T *= expected
    off_s = np.abs(times_R - (origin_s + spacing_s / 2) - bin_R * step_s)
    if expected > 1.5:
        notes.add(f"{expected:.3g} values a step: {'summed' if combination == 'sum' else 'averaged'}")
        if np.bincount(bin_R)[-1] < np.floor(expected):
            notes.add("the last step is not over: left out")
            values_T = values_T[:-1]
    elif not spacing.regular:
        notes.add(
            f"irregular times, {spacing_s:.3g} s apart in the median: averaged in steps of {step_s:.3g} s"
        )
    elif (off_s > 0.01 * step_s).any():
        notes.add(f"times are off a grid of {step_s:.6g} s by up to {off_s.max():.3g} s: moved to it")
    return values_T, origin_s + spacing_s / 2 if spacing.regular else origin_s, step_s


def _binned(
    times_R: Array, values_R: Array, step_s: float | None, notes: _Notes
) -> tuple[Array, float, float]:
    """Events summed over steps, in which nothing may happen at all."""
    span_s = times_R[-1] - times_R[0]
    if step_s is None:
        wanted_s = _EVENTS_PER_STEP * span_s / len(times_R)
        step_s = float(next((s for s in _ROUND_S if s >= wanted_s), _ROUND_S[-1]))
    bin_R = _bins(times_R, times_R[0], step_s)
    total, _ = _totals(bin_R, values_R)
    notes.add(f"{_lines(len(times_R))}, added up in steps of {step_s:g} s; the last step, not over, left out")
    return total[:-1], float(times_R[0]), step_s


def _bins(times_R: Array, origin_s: float, step_s: float) -> np.ndarray:
    steps = (times_R[-1] - origin_s) / step_s
    if steps > min(_MOST, max(_LONG, _SPARSE * len(times_R))):
        raise InvalidInput(
            f"from its first time to its last are {steps:.3g} steps of {step_s:g} s; "
            "correct the times or use longer steps"
        )
    return np.floor((times_R - origin_s) / step_s).astype(np.int64)


def _totals(group_R: np.ndarray, values_R: Array) -> tuple[Array, Array]:
    """Sum and number of the known values of each group."""
    known_R = ~np.isnan(values_R)
    groups = int(group_R[-1]) + 1
    total = np.bincount(group_R, np.where(known_R, values_R, 0.0), groups).astype(np.float64)
    return total, np.bincount(group_R, known_R, groups).astype(np.float64)


# --- words ---------------------------------------------------------------------------------------------


def _note_missing(missing_T: np.ndarray, notes: _Notes) -> None:
    if not missing_T.any():
        return
    edges = np.flatnonzero(np.diff(np.concatenate(([False], missing_T, [False])).astype(np.int8)))
    longest = int((edges[1::2] - edges[::2]).max())
    notes.add(
        f"{int(missing_T.sum()):,} of {len(missing_T):,} values are missing, {longest:,} in a row at most: "
        "left open, nothing is filled in"
    )


def _are_counts(known: Array) -> bool:
    return bool((known >= 0).all() and (known % 1.0 == 0).all())


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count:,} lines"


def _places(count: int) -> str:
    return "1 place" if count == 1 else f"{count:,} places"
