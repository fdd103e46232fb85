"""Whatever a file holds, it is read or refused in one line; what was a regular series is one again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.core.errors import InvalidInput
from forescale.forecast.series import read_series

START = datetime(2026, 3, 1, tzinfo=UTC)

NUMBERS = st.one_of(st.floats().map(str), st.integers(-5, 10**19).map(str))
DATES = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)).map(str)  # noqa: DTZ001 - files have such times
ODD = st.sampled_from(
    ["", "NA", "time", "y", '"', "#", "1e400", "0001-01-01", "9999-12-31T23:59:59-12:00", "x y"]
)


@st.composite
def files(draw: st.DrawFn) -> list[str]:
    """Columns that mostly hold one kind of thing."""
    delimiter = draw(st.sampled_from(",;\t "))
    kinds = draw(
        st.lists(st.sampled_from([NUMBERS, st.integers(0, 9).map(str), DATES, ODD]), min_size=1, max_size=3)
    )
    count = draw(st.integers(0, 30))
    columns = [draw(st.lists(kind, min_size=count, max_size=count)) for kind in kinds]
    if draw(st.booleans()):
        columns[0] = sorted(columns[0])
    rows = [list(row) for row in zip(*columns, strict=True)]
    for _ in range(draw(st.integers(0, 2)) if rows else 0):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = draw(st.one_of(ODD, st.text(max_size=5)))
    return [delimiter.join(row) + "\n" for row in rows]


@settings(max_examples=150, deadline=None)
@given(files(), st.one_of(st.none(), st.floats(1e-9, 1e9)))
def test_anything_is_read_or_refused_in_one_line(lines: list[str], step_s: float | None) -> None:
    try:
        series = read_series(lines, step_s=step_s)
    except InvalidInput:
        return
    known = series.values_T[~np.isnan(series.values_T)]
    assert len(known) >= 10
    assert np.isfinite(known).all()
    assert 0 < series.step_s < np.inf


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 1.0, 10.0, 60.0, 300.0, 86400.0]),
    st.floats(0.0, 0.3),
    st.floats(0.0, 0.3),
)
def test_a_regular_series_survives_what_collecting_does_to_it(
    seed: int, every_s: float, off: float, lost: float
) -> None:
    """Stamps off by a share of the step, or lines lost; all out of order."""
    rng = np.random.default_rng(seed)
    values_T = rng.normal(50.0, 5.0, 300)
    kept_T = rng.random(300) >= (lost if off < 0.02 else 0.0)
    kept_T[[0, -1]] = True
    at_s = every_s * (np.arange(300) + off * rng.uniform(-1, 1, 300))
    rows = [
        f"{(START + timedelta(seconds=float(at_s[t]))).isoformat()},{float(values_T[t])!r}"
        for t in rng.permutation(np.flatnonzero(kept_T))
    ]
    series = read_series(["time,load", *rows])
    assert abs(series.step_s / every_s - 1.0) < 1e-3
    assert np.array_equal(~np.isnan(series.values_T), kept_T)
    assert np.array_equal(series.values_T[kept_T], values_T[kept_T])
