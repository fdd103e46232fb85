"""What a replica can do while its answers are in time. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BatchTimes = Sequence[tuple[float, float]]
"""Rows of a batch and the seconds that it took, in ascending order of rows; as measured."""


def rows_per_s(times: BatchTimes, most_rows: int, latency_s: float) -> float | None:
    """Rows that a replica answers in a second when it is never idle; None if nothing was measured.

    A request may wait for the batch before its own, so two batches fit in the latency. What larger batches
    take than were seen is continued in a straight line from those that were: if all were alike, as if they
    took no longer, which the next measurements put right. Where not even the smallest batch is answered in
    time, more replicas do not help; then it is the rate with batches of one row.
    """
    if not times:
        return None
    in_time = [rows / taken_s for rows, taken_s in _in_time(times, most_rows, latency_s)]
    return max(in_time, default=1.0 / _seconds(_mended(times), 1.0))


def rows_in_time(times: BatchTimes, most_rows: int, latency_s: float) -> int | None:
    """Rows of the largest batch of which two fit in the latency, 1 at least; None if nothing was measured."""
    if not times:
        return None
    return max((rows for rows, _ in _in_time(times, most_rows, latency_s)), default=1)


def _in_time(times: BatchTimes, most_rows: int, latency_s: float) -> Iterator[tuple[int, float]]:
    for rows, taken_s in _curve(_mended(times), most_rows):
        if 2.0 * taken_s <= latency_s:
            yield rows, taken_s


def _mended(times: BatchTimes) -> BatchTimes:
    # A larger batch takes no less: what says so was measured when something else was in the way.
    return [(rows, min(each_s for _, each_s in times[place:])) for place, (rows, _) in enumerate(times)]


def _curve(times: BatchTimes, most_rows: int) -> Iterator[tuple[int, float]]:
    rows = 1
    while rows < most_rows:
        yield rows, _seconds(times, rows)
        rows *= 2
    yield most_rows, _seconds(times, most_rows)


def _seconds(times: BatchTimes, rows: float) -> float:
    """Straight lines between what was measured, and beyond."""
    if len(times) == 1:
        return times[0][1]
    right = next((place for place, time in enumerate(times) if time[0] >= rows), len(times) - 1)
    (left_rows, left_s), (right_rows, right_s) = times[max(right, 1) - 1], times[max(right, 1)]
    slope = (right_s - left_s) / (right_rows - left_rows)
    # Never below zero for fewer rows than were measured: at least in proportion.
    return max(left_s + slope * (rows - left_rows), left_s * min(1.0, rows / left_rows))
