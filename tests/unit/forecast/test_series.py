"""Files to regular series: what is found, what is done, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from forescale.core.errors import InvalidInput
from forescale.forecast.series import Series, read_series

START = datetime(2026, 3, 1, tzinfo=UTC)


def read(text: str, **options: object) -> Series:
    return read_series(text.splitlines(keepends=True), **options)  # pyright: ignore[reportArgumentType]


def numbers(count: int = 20) -> list[float]:
    return [float(10 + k * k % 7) for k in range(count)]


def dated(values: Sequence[float | str], *, every_s: float = 60.0, head: str = "time,load") -> str:
    stamps = ((START + timedelta(seconds=k * every_s)).isoformat() for k in range(len(values)))
    return "\n".join([head, *(f"{stamp},{value}" for stamp, value in zip(stamps, values, strict=True))])


def said(series: Series) -> str:
    return "; ".join(series.notes)


# --- formats -------------------------------------------------------------------------------------------


def test_one_number_a_line() -> None:
    series = read("\n".join(map(str, numbers())))
    assert series.values_T.tolist() == numbers()
    assert (series.step_s, series.step_known, series.start_s) == (1.0, False, None)
    assert "taken for 1 s" in said(series)
    assert read("\n".join(map(str, numbers())), step_s=5.0).step_s == 5.0


def test_a_blank_line_amid_numbers_is_a_missing_one() -> None:
    lines = [*map(str, numbers(10)), "", *map(str, numbers(5)), "", ""]
    assert np.isnan(read("\n".join(lines)).values_T).tolist() == [False] * 10 + [True] + [False] * 5


@pytest.mark.parametrize(
    "stamp",
    [
        lambda at: at.isoformat(),
        lambda at: at.strftime("%Y-%m-%d %H:%M:%S.0000000Z"),
        lambda at: str(at.timestamp()),
        lambda at: str(int(at.timestamp() * 1000)),
        lambda at: str(int(at.timestamp()) * 10**9),
    ],
    ids=["ISO", "blank, seven decimals", "seconds", "milliseconds", "nanoseconds"],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_times_with_a_zone(stamp, delimiter: str) -> None:
    lines = [
        f"{stamp(START + timedelta(minutes=5 * k))}{delimiter}{value}" for k, value in enumerate(numbers())
    ]
    series = read("\n".join([f"when{delimiter}requests", *lines]))
    assert series.values_T.tolist() == numbers()
    assert (series.name, series.step_s, series.zoned) == ("requests", 300.0, True)
    assert series.start_s == START.timestamp()


def test_other_zones_are_the_same_points_in_time() -> None:
    text = dated(numbers()).replace("T00:00:00+00:00", "T01:00:00+01:00")
    assert read(text).start_s == START.timestamp()
    assert read(text).step_s == 60.0


def test_times_without_a_zone_stay_as_they_are() -> None:
    series = read(dated(numbers()).replace("+00:00", ""))
    assert (series.start_s, series.zoned) == (START.timestamp(), False)


def test_counted_steps_have_the_length_they_are_given() -> None:
    text = "t,y\n" + "\n".join(f"{k},{value}" for k, value in enumerate(numbers()))
    assert (read(text).step_s, read(text).step_known) == (1.0, False)
    told = read(text, step_s=300.0)
    assert (told.step_s, told.step_known, len(told.values_T)) == (300.0, True, 20)
    assert told.start_s is None


def test_the_name_of_a_column_of_times_says_its_unit() -> None:
    text = "minute,requests\n" + "\n".join(f"{k},{value}" for k, value in enumerate(numbers()))
    assert (read(text).step_s, read(text).step_known) == (60.0, True)
    assert read(text, step_s=120.0).values_T.tolist() == [sum(numbers()[k : k + 2]) for k in range(0, 20, 2)]


def test_plain_numbers_further_apart_are_seconds() -> None:
    series = read("t,y\n" + "\n".join(f"{10 * k},{value}" for k, value in enumerate(numbers())))
    assert series.step_s == 10.0
    assert "taken for seconds" in said(series)


def test_an_index_without_a_name_is_no_value() -> None:
    series = read(",cpu\n" + "\n".join(f"{k},{value}" for k, value in enumerate(numbers())))
    assert (series.name, series.values_T.tolist()) == ("cpu", numbers())


def test_blanks_comments_and_byte_order() -> None:
    lines = [
        "# from the scraper",
        "",
        *(f"{1.7e9 + 60 * k:.0f}   {value}" for k, value in enumerate(numbers())),
    ]
    series = read("\n".join([*lines[:9], "", *lines[9:]]))
    assert (series.values_T.tolist(), series.step_s) == (numbers(), 60.0)


def test_a_column_of_times_need_not_come_first_or_go_up_evenly() -> None:
    steps = [k for k in range(24) if k not in {3, 9, 10, 17}]
    series = read("cpu,t\n" + "\n".join(f"{value},{t}" for t, value in zip(steps, numbers(), strict=True)))
    assert (series.name, len(series.values_T), series.missing) == ("cpu", 24, 4)


def test_an_uneven_step_is_not_rounded_away() -> None:
    assert read(dated(numbers(200), every_s=61.0)).step_s == 61.0
    assert read(dated(numbers(200), every_s=60.5)).step_s == 60.5


# --- columns -------------------------------------------------------------------------------------------


def several(head: str = "time,host,cpu,memory") -> str:
    rows = (f"{(START + timedelta(minutes=k)).isoformat()},a,{k % 5 + 0.5},{k % 3 + 7.5}" for k in range(20))
    return "\n".join([head, *rows])


def test_the_first_column_of_numbers_unless_another_is_chosen() -> None:
    assert read(several()).name == "cpu"
    assert "others: memory" in said(read(several()))
    assert read(several(), column="memory").values_T[0] == 7.5
    assert read(several(), column="4").name == "memory"
    assert read(several("time,host,cpu,value")).name == "value"


@pytest.mark.parametrize(
    ("column", "message"),
    [("disk", "no column 'disk'; it has time, host, cpu, memory"), ("time", "holds the times")],
)
def test_a_column_that_cannot_be_forecast(column: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(several(), column=column)


# --- events --------------------------------------------------------------------------------------------


def events(count: int = 3000, *, per_s: float = 10.0, seed: int = 0) -> list[datetime]:
    gaps = np.random.default_rng(seed).exponential(1.0 / per_s, count)
    return [START + timedelta(seconds=float(at)) for at in np.cumsum(gaps)]


def test_times_alone_are_events() -> None:
    stamps = events()
    series = read("\n".join(["TIMESTAMP", *(at.isoformat() for at in stamps)]), step_s=10.0)
    span_s = (stamps[-1] - stamps[0]).total_seconds()
    assert (series.name, series.step_s, series.counts) == ("events", 10.0, True)
    assert len(series.values_T) == int(span_s / 10)  # the last step is not over
    first = sum((at - stamps[0]).total_seconds() < 10 for at in stamps)
    assert series.values_T[0] == first
    assert "added up in steps of 10 s" in said(series)


def test_seconds_since_1970_alone_are_events() -> None:
    series = read("\n".join(f"{at.timestamp():.3f}" for at in events(500)), step_s=5.0)
    assert (series.name, series.zoned) == ("events", True)


def test_steps_of_events_hold_some_of_them_by_default() -> None:
    series = read("\n".join(at.isoformat() for at in events(per_s=0.1)))
    assert series.step_s == 60.0
    assert series.values_T.mean() == pytest.approx(6.0, rel=0.2)


def test_a_quiet_step_of_events_counts_none() -> None:
    stamps = [*events(200), *(at + timedelta(seconds=300) for at in events(200))]
    series = read("\n".join(at.isoformat() for at in stamps), step_s=10.0)
    assert series.missing == 0
    assert series.values_T[10] == 0.0


def test_a_log_with_facts_about_each_request_is_counted_or_summed() -> None:
    stamps = events(1000)
    text = "\n".join(
        ["TIMESTAMP,Context,Generated", *(f"{at.isoformat()},{100},{k}" for k, at in enumerate(stamps))]
    )
    counted = read(text, step_s=5.0)
    assert counted.name == "events"
    assert "every line counts as one event" in said(counted)
    tokens = read(text, step_s=5.0, column="Context")
    assert tokens.values_T.tolist() == (100 * counted.values_T).tolist()
    mean = read(text, step_s=5.0, column="Context", combination="mean")
    assert set(mean.values_T[~np.isnan(mean.values_T)]) == {100.0}


# --- irregular, missing, repeated -------------------------------------------------------------------------


def test_stamps_a_little_off_are_moved_to_the_grid() -> None:
    rng = np.random.default_rng(1)
    values = numbers(500)
    rows = (
        f"{(START + timedelta(seconds=60 * k + rng.uniform(-20, 20))).isoformat()},{value}"
        for k, value in enumerate(values)
    )
    series = read("\n".join(["time,load", *rows]))
    assert series.step_s == 60.0
    assert series.values_T.tolist() == values
    assert "moved to it" in said(series)


def test_holes_are_missing_even_if_they_are_many() -> None:
    kept = np.random.default_rng(2).random(400) < 0.5
    kept[[0, 399]] = True
    text = dated(numbers(400)).splitlines()
    series = read("\n".join([text[0], *(line for line, keep in zip(text[1:], kept, strict=True) if keep)]))
    assert series.step_s == 60.0
    assert np.array_equal(~np.isnan(series.values_T), kept)
    assert np.array_equal(series.values_T[kept], np.array(numbers(400))[kept])
    assert f"{(~kept).sum()} of 400 values are missing" in said(series)


def test_a_long_gap_is_missing() -> None:
    lines = dated(numbers(100)).splitlines()
    series = read("\n".join([*lines[:41], *lines[61:]]))
    assert np.isnan(series.values_T[40:60]).all()
    assert series.missing == 20
    assert "20 in a row at most" in said(series)


def test_irregular_rates_are_averaged_over_steps() -> None:
    at_s = np.cumsum(np.random.default_rng(3).exponential(10.0, 600))
    text = "\n".join(["time,load", *(f"{1.7e9 + s:.3f},{0.5 + s}" for s in at_s)])
    series = read(text, step_s=60.0)
    known = ~np.isnan(series.values_T)
    centres = at_s[0] + 60.0 * np.arange(len(series.values_T)) + 30.5
    assert np.abs(series.values_T - centres)[known].max() < 30.0
    assert "irregular times" in said(series)
    assert read(text).step_s == pytest.approx(float(np.median(np.diff(at_s))), rel=1e-3)


def test_longer_steps_sum_counts_and_average_rates() -> None:
    counts = [float(k % 4) for k in range(63)]
    series = read(dated(counts), step_s=300.0)
    assert series.values_T.tolist() == [sum(counts[k : k + 5]) for k in range(0, 60, 5)]
    assert "5 values a step: summed" in said(series)
    assert "the last step is not over" in said(series)
    rates = [0.5 + k % 4 for k in range(60)]
    assert read(dated(rates), step_s=300.0).values_T[0] == pytest.approx(np.mean(rates[:5]))
    assert read(dated(counts), step_s=300.0, combination="mean").values_T[0] == np.mean(counts[:5])


def test_a_step_of_counts_of_which_some_are_missing_is_not_too_small() -> None:
    counts: list[float | str] = [8.0 + k % 2 for k in range(100)]
    counts[12] = counts[14] = ""  # two of the five of one step
    counts[20:24] = [""] * 4  # nearly all of another
    series = read(dated(counts), step_s=300.0)
    assert series.values_T[2] == pytest.approx(5 * np.mean([8.0, 9.0, 9.0]))
    assert np.isnan(series.values_T[4])


def test_lines_of_the_same_time() -> None:
    for values, expected, word in (([3.0] * 20, 6.0, "summed"), ([3.5] * 20, 3.5, "averaged")):
        lines = dated(values).splitlines()
        series = read("\n".join([*lines[:6], lines[5], *lines[6:]]))
        assert series.values_T[4] == expected
        assert series.values_T[5] == values[5]
        assert f"1 line with the time of another: {word}" in said(series)


def test_lines_out_of_order_are_sorted() -> None:
    head, *lines = dated(numbers(30)).splitlines()
    lines[3], lines[20] = lines[20], lines[3]
    series = read("\n".join([head, *lines]))
    assert series.values_T.tolist() == numbers(30)
    assert "go back in 2 places: sorted" in said(series)


@pytest.mark.parametrize("missing", ["", "NaN", "NA", "null", " ", "N/A"])
def test_missing_values_stay_open(missing: str) -> None:
    values: list[float | str] = [*numbers()]
    values[7] = missing
    series = read(dated(values))
    assert np.flatnonzero(np.isnan(series.values_T)).tolist() == [7]
    assert "1 of 20 values are missing" in said(series)


def test_a_line_without_a_time_is_left_out() -> None:
    lines = dated(numbers()).splitlines()
    series = read("\n".join([*lines[:5], ",7.5", *lines[5:]]))
    assert series.values_T.tolist() == numbers()
    assert "1 line without a time" in said(series)


# --- what it says of the values ----------------------------------------------------------------------------


def test_counts_rates_and_values_below_zero() -> None:
    assert read(dated([3.0, 0.0] * 10)).counts
    assert not read(dated([3.0, 0.5] * 10)).counts
    assert read(dated([3.0, 0.5] * 10)).lower == 0.0
    below = read(dated([3.0, 2.0, -1.0, 4.0] * 5))
    assert (below.counts, below.lower) == (False, None)
    assert "5 below 0, so not counts" in said(below)


def test_a_constant_series_is_said_to_be_one() -> None:
    assert "constant: every value is 4" in said(read(dated([4.0] * 20)))
    assert "constant" not in said(read(dated(numbers())))


# --- what cannot be read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("time,load\n", "no line of data"),
        ("1\n2\n3\n", "3 values are too few"),
        ("1\n", "1 value is too few"),
        (dated(["7 %"] * 20), r"column load \('7 %'\) holds no numbers; lines are counted if"),
        (dated([1e31] * 20), "holds no numbers"),
        ("\n".join(["1"] * 15 + ["many"] + ["1"] * 5), "line 16: 'many' is not a number"),
        ("\n".join(["1"] * 15 + ["inf"]), "line 16: 'inf' is not finite"),
        (dated([*numbers(), "7 %"]), "line 22: '7 %' is not a number"),
        (dated(numbers()) + "\n2026-03-09\n", "line 22 has 1 field; the first line of data has 2"),
        (dated(numbers()) + "\n3/1/2026 10:00,3\n", "line 22: '3/1/2026 10:00' is neither a number nor"),
        (dated(numbers()) + "\n2026-03-09T00:00:00,3\n", "not written as the times before it"),
        (dated(numbers()) + "\n9999-12-31T00:00:00+00:00,3\n", "line 22: '9999-12-31T00:00:00"),
        (dated(numbers(), every_s=0.0), "all lines have the same time"),
        (dated([*numbers(9), *[""] * 9]), "9 values are too few"),
        ("name,colour\n" + "a,red\n" * 12, "no column holds numbers"),
        (dated(numbers(30), every_s=0.001) + "\n2027-03-01T00:00:00+00:00,3", "correct the times"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_steps_shorter_than_the_values_are_apart() -> None:
    with pytest.raises(InvalidInput, match="use 60 s or more"):
        read(dated(numbers()), step_s=10.0)


def test_there_is_nothing_to_combine_without_times() -> None:
    with pytest.raises(InvalidInput, match="nothing to combine"):
        read("\n".join(map(str, numbers())), combination="mean")


def test_lines_are_not_kept() -> None:
    """A long file is read line by line: whoever gives the lines may forget each at once."""
    ahead = 0

    def lines() -> Iterator[str]:
        nonlocal ahead
        for k in range(50_000):
            ahead = k
            yield f"{k % 9}\n"

    read_from = lines()
    series = read_series(read_from)
    assert (len(series.values_T), ahead) == (50_000, 49_999)
