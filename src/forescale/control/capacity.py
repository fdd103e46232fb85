"""What a replica can do while its answers are in time. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

BatchTimes = Sequence[tuple[float, float]]
"""Rows of a batch and the seconds that it took, in ascending order of rows; as measured."""

ThreadTimes = Mapping[int, BatchTimes]
"""By the threads that batches ran with, each at least one."""

_SERIAL_SHARE = 0.2  # of a batch's time with one thread that more do not shorten, until it is measured


def rows_per_s(times: BatchTimes, most_rows: int, latency_s: float) -> float | None:
    """Rows that a replica answers in a second when it is never idle; None if nothing was measured.

    A request may wait for the batch before its own, so two batches fit in the latency. What larger batches
    take than were seen is continued in a straight line from those that were: if all were alike, as if they
    took no longer, which the next measurements put right. Where not even the smallest batch is answered in
    time, more replicas do not help; then it is the rate with batches of one row.
    """
    if not times:
        return None
    return rows_in_time_per_s(times, most_rows, latency_s) or 1.0 / seconds_of(_mended(times), 1.0)


def rows_in_time_per_s(times: BatchTimes, most_rows: int, latency_s: float) -> float:
    """The same, 0 where not even the smallest batch is answered in time."""
    return max((rows / taken_s for rows, taken_s in _in_time(times, most_rows, latency_s)), default=0.0)


def rows_in_time(times: BatchTimes, most_rows: int, latency_s: float) -> int | None:
    """Rows of the largest batch of which two fit in the latency, 1 at least; None if nothing was measured."""
    if not times:
        return None
    return max((rows for rows, _ in _in_time(times, most_rows, latency_s)), default=1)


def times_with(times: ThreadTimes, threads: int | None) -> BatchTimes:
    """What batches take with so many threads; None: with those of which most is known.

    With fewer than were measured it is at most in proportion longer, since the work is the same; with more it
    is what Amdahl's law (AFIPS 1967) says of those that were. Sizes of batches that were measured with others
    alone take as much more or less as those that were with these.
    """
    if not times:
        return ()
    reference = max(times, key=lambda each: len(times[each]))
    if threads is None or threads == reference:
        return times[reference]
    own = times.get(threads, ())
    above = [each for each in times if each > threads]
    if own:
        ratio = _ratio(own, times[reference])
    elif above:
        nearest = min(above)
        ratio = _ratio(times[nearest], times[reference]) * nearest / threads
    else:
        first = min(times)
        slow = _ratio(times[first], times[reference])
        ratio = slow * _amdahl(_serial_share(times), threads) / _amdahl(_serial_share(times), first)
    known = {round(rows).bit_length() for rows, _ in own}
    others = [(rows, s * ratio) for rows, s in times[reference] if round(rows).bit_length() not in known]
    return sorted([*own, *others])


def _ratio(times: BatchTimes, reference: BatchTimes) -> float:
    return fmean(seconds / seconds_of(reference, rows) for rows, seconds in times)


def _amdahl(serial_share: float, threads: int) -> float:
    """Time with so many threads, of that with one."""
    return serial_share + (1.0 - serial_share) / threads


def _serial_share(times: ThreadTimes) -> float:
    """As the least and the most threads show it that were measured."""
    few, many = min(times), max(times)
    if few == many:
        return _SERIAL_SHARE
    ratio = _ratio(times[many], times[few])
    if ratio >= 1.0:
        return 1.0
    # ratio = amdahl(share, many) / amdahl(share, few), solved for the share.
    share = (1.0 / many - ratio / few) / (ratio - ratio / few - 1.0 + 1.0 / many)
    return min(max(share, 0.0), 1.0)


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
        yield rows, seconds_of(times, rows)
        rows *= 2
    yield most_rows, seconds_of(times, most_rows)


def seconds_of(times: BatchTimes, rows: float) -> float:
    """What a batch takes: straight lines between what was measured, and beyond."""
    if len(times) == 1:
        return times[0][1]
    right = next((place for place, time in enumerate(times) if time[0] >= rows), len(times) - 1)
    (left_rows, left_s), (right_rows, right_s) = times[max(right, 1) - 1], times[max(right, 1)]
    slope = (right_s - left_s) / (right_rows - left_rows)
    # Never below zero for fewer rows than were measured: at least in proportion.
    return max(left_s + slope * (rows - left_rows), left_s * min(1.0, rows / left_rows))
