"""``forescale forecast SERIES.csv``: what it prints and draws, and what it says of files it cannot read."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from forecast_command import error, forecast, run
from forescale.cli import console, forecast_learning
from forescale.cli.forecast_view import duration

START = datetime(2026, 3, 1, tzinfo=UTC)


def counts(length: int = 400, *, seed: int = 0) -> list[int]:
    """Requests with a season of 48 steps."""
    rate = 30 + 20 * np.sin(2 * np.pi * np.arange(length) / 48)
    return np.random.default_rng(seed).poisson(rate).tolist()


def write(path: Path, values: list[Any], *, every_s: float = 1800.0) -> Path:
    rows = (
        f"{(START + timedelta(seconds=k * every_s)).isoformat()},{value}" for k, value in enumerate(values)
    )
    path.write_text("\n".join(["time,requests", *rows]), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "requests.csv", counts())


# --- what it prints ------------------------------------------------------------------------------------


def test_json_holds_everything(file: Path) -> None:
    found = forecast(file)
    assert found["series"] == {
        "column": "requests",
        "values": 400,
        "missing": 0,
        "counts": True,
        "step_s": 1800.0,
        "season_s": 86400.0,
        "start": "2026-03-01T00:00:00Z",
        "end": "2026-03-09T07:30:00Z",
        "notes": [
            "counts: whole numbers from 0, and no forecast is below 0",
            "a season is taken to be a day",
        ],
    }
    assert [horizon["steps"] for horizon in found["horizons"]] == [1, 5, 15, 60]
    assert found["horizons"][1]["horizon_s"] == 9000.0
    assert found["horizons"][1]["time"] == "2026-03-09T10:00:00Z"
    for horizon in found["horizons"]:
        for kind in ("quantiles", "peak_quantiles"):
            assert len(horizon[kind]) == len(found["levels"]) == 7
            assert horizon[kind] == sorted(horizon[kind])
            assert min(horizon[kind]) >= 0.0
    for h in range(4):
        assert sum(weights[h] for weights in found["weights"].values()) == pytest.approx(1.0, abs=1e-3)
    assert found["plot"] is None
    assert "backtest" not in found


def test_forecasts_are_of_the_size_of_what_was_seen(file: Path) -> None:
    for horizon in forecast(file)["horizons"]:
        assert 0 < horizon["quantiles"][2] < 80
        assert 10 < horizon["quantiles"][5] < 120
        # The highest of many is above any one of them.
        assert horizon["peak_quantiles"][2] > horizon["quantiles"][2] - 3


def test_tables_say_it_in_words(file: Path) -> None:
    shown = run(file).stdout
    assert "requests.csv, requests: 400 values, 30 min apart (8 d 8 h, 2026-03-01 00:00Z to" in shown
    assert "- counts: whole numbers from 0" in shown
    first, second = shown.split("Highest value until then")
    for words in ("in 30 min", "in 2 h 30 min", "in 1 d 6 h", "2026-03-09 10:00Z", "median", "99%"):
        assert words in first
        assert words in second
    assert "What covers all of the next 1 d 6 h in 95 of 100 cases: " in shown
    assert "Whom the forecast trusts" in shown
    assert "Backtest" not in shown


def test_horizons_and_seasons_are_in_seconds(file: Path) -> None:
    found = forecast(file, "--horizon-s", "7200", "--horizon-s", "3600", "--season-s", "43200")
    assert [horizon["steps"] for horizon in found["horizons"]] == [2, 4]
    assert found["series"]["season_s"] == 43200.0
    assert "horizons are rounded to whole steps" in forecast(file, "--horizon-s", "2000")["series"]["notes"]


def test_step_and_column_are_chosen(file: Path, tmp_path: Path) -> None:
    assert forecast(file, "--step-s", "3600")["series"]["values"] == 200
    two = tmp_path / "two.csv"
    two.write_text("cpu,memory\n" + "\n".join(f"{0.5 + k % 3},{70.5 + k % 2}" for k in range(40)))
    found = forecast(two, "--column", "memory", "--step-s", "5")
    assert (found["series"]["column"], found["series"]["step_s"]) == ("memory", 5.0)
    assert 70 < found["horizons"][0]["quantiles"][2] < 72


def test_a_short_series_is_not_forecast_far(tmp_path: Path) -> None:
    found = forecast(write(tmp_path / "short.csv", counts(24)))
    assert [horizon["steps"] for horizon in found["horizons"]] == [1, 5]


def test_missing_values_are_said_and_change_nothing_else(tmp_path: Path) -> None:
    values: list[Any] = counts()
    values[100:110] = [""] * 10
    values[-1] = "NaN"
    found = forecast(write(tmp_path / "holes.csv", values))
    assert found["series"]["missing"] == 11
    assert all(np.isfinite(horizon["quantiles"]).all() for horizon in found["horizons"])


def test_of_a_long_series_the_last_values_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast_learning, "_MOST", 100)
    found = forecast(write(tmp_path / "long.csv", counts()))
    assert found["series"]["values"] == 100
    assert (found["series"]["start"], found["series"]["end"]) == (
        "2026-03-07T06:00:00Z",
        "2026-03-09T07:30:00Z",
    )
    assert "the last 100 of 400 values are learned from" in found["series"]["notes"]


def test_a_constant_series_is_forecast_to_stay(tmp_path: Path) -> None:
    found = forecast(write(tmp_path / "idle.csv", [7.0] * 200))
    assert any("constant" in note for note in found["series"]["notes"])
    for horizon in found["horizons"]:
        assert horizon["quantiles"] == pytest.approx([7.0] * 7, abs=0.1)


def test_a_value_that_does_not_belong_is_listed(tmp_path: Path) -> None:
    values = counts(700)
    values[650] = 900
    path = write(tmp_path / "spike.csv", values)
    assert {"step": 650, "time": "2026-03-14T13:00:00Z", "value": 900.0} in forecast(path)["anomalies"]
    assert "2026-03-14 13:00Z" in run(path).stdout.split("Anomalies")[1]


# --- backtest ------------------------------------------------------------------------------------------


def test_backtest_is_beside_seasonal_naive_and_the_members(file: Path) -> None:
    found = forecast(file, "--backtest", "--horizon-s", "1800", "--horizon-s", "9000")
    tested = found["backtest"]
    assert tested["horizon_s"] == [1800.0, 9000.0]
    assert tested["origins"] >= 50
    assert tested["relative_loss"]["seasonal naive"] == [1.0, 1.0]
    assert {"Forescale", "seasonal naive", *found["weights"]} < tested["loss"].keys()
    assert max(tested["relative_loss"]["Forescale"]) < 1.0
    for h in range(2):
        ratio = tested["loss"]["Forescale"][h] / tested["loss"]["seasonal naive"][h]
        assert tested["relative_loss"]["Forescale"][h] == pytest.approx(ratio)
        assert 0.85 < tested["coverage"]["Forescale"][h][5] <= 1.0


def test_backtest_changes_no_forecast(file: Path) -> None:
    assert forecast(file, "--backtest")["horizons"] == forecast(file)["horizons"]


def test_backtest_as_tables(file: Path) -> None:
    shown = run(file, "--backtest").stdout.split("Backtest: quantile loss, seasonal naive = 1")[1]
    losses, covered = shown.split("Share of values at or below each quantile")
    assert losses.index("Forescale") < losses.index("seasonal naive")
    assert covered.count("%") == 7 * 5


# --- pictures ------------------------------------------------------------------------------------------


def texts(path: Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter() if element.text]


def test_fan_chart_of_dates(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "fan.svg"
    assert "Fan chart: " in run(file, "--plot", out).stdout
    said = texts(out)
    for words in ("requests: the next 1 d 6 h", "median", "99%", "highest until then, 95%", "UTC"):
        assert words in said
    assert forecast(file, "--plot", out)["plot"] == str(out)


def test_fan_chart_without_dates(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.txt", tmp_path / "fan.svg"
    plain.write_text("\n".join(map(str, counts())))
    assert run(plain, "--step-s", "60", "--plot", out).exit_code == 0
    assert "minutes from now" in texts(out)


def test_labels_of_quantiles_do_not_cover_each_other(tmp_path: Path) -> None:
    out = tmp_path / "fan.svg"
    assert run(write(tmp_path / "idle.csv", [7.0] * 200), "--plot", out).exit_code == 0
    heights = [
        float(element.attrib["transform"].split()[1].removesuffix(")"))
        if "translate" in element.attrib.get("transform", "")
        else float(element.attrib["y"])
        for element in ElementTree.parse(out).iter()
        if "".join(element.itertext()).strip().endswith(("%", "median")) and element.tag.endswith("text")
    ]
    assert len(heights) == 8
    assert min(abs(a - b) for a, b in pairwise(sorted(heights))) > 8


def test_a_picture_changes_no_forecast(file: Path, tmp_path: Path) -> None:
    drawn = forecast(file, "--plot", tmp_path / "fan.svg", "--horizon-s", "90000")
    plain = forecast(file, "--horizon-s", "90000")
    assert drawn["horizons"][0]["quantiles"] == pytest.approx(plain["horizons"][0]["quantiles"])


def test_the_ending_says_the_kind_of_picture(file: Path, tmp_path: Path) -> None:
    run(file, "--plot", tmp_path / "fan.png")
    assert (tmp_path / "fan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", [["--plot", "requests.csv"], ["requests.csv", "--plot"], ["--plot", "--", "requests.csv"]]
)
def test_plot_alone_names_the_picture_after_the_series(file: Path, words: list[str]) -> None:
    before = file.read_bytes()
    assert run(*words).exit_code == 0
    assert texts(file.parent / "requests-forecast.svg")
    assert file.read_bytes() == before


# --- wrong input ---------------------------------------------------------------------------------------


def test_files_that_are_no_series(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    for content, said in (
        (b"", "it is empty"),
        (b"\x89PNG\r\n\0\0" * 100, "it is not text, but binary"),
        ("time,Größe\n1,2\n".encode("latin-1"), "not text in UTF-8"),
        (b"time,load\n1,2\n2,x\n" + b"3,4\n" * 9, "line 3: 'x' is not a number"),
        (b"1\n2\n3\n", "3 values are too few"),
    ):
        path.write_bytes(content)
        assert f"{path}" in (line := error(path))
        assert said in line
    assert "No such file" in error(tmp_path / "none.csv")
    assert "it is a folder" in error(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--column", "cpu"], "there is no column 'cpu'; it has time, requests"),
        (["--horizon-s", "60"], "less than a step of 1800 s"),
        (["--horizon-s", "1e6"], "400 values are enough for 200, or 360000 s"),
        (["--season-s", "1800"], "a season has at least 2"),
        (["--season-s", "604800"], "must hold two of them"),
        (["--step-s", "60"], "use 1800 s or more"),
        (["--plot", "fan.jpg"], "--plot writes .svg, .png, .pdf, not fan.jpg"),
        (["--plot", "no_such_folder/fan.svg"], "there is no folder no_such_folder"),
    ],
)
def test_options_that_do_not_suit_the_series(file: Path, words: list[str], said: str) -> None:
    assert said in error(file, *words)


@pytest.mark.parametrize(
    ("factor", "shown"),
    [(1e-3, " 0.03"), (1e4, r" 3\d\d,\d\d\d "), (1e20, r"e\+21"), (1e-20, "e-19"), (0.0, " 0.0 ")],
)
def test_figures_of_any_size_are_readable(tmp_path: Path, factor: float, shown: str) -> None:
    path = write(tmp_path / "size.csv", [factor * (30 + k % 2) for k in range(60)])
    rows = run(path).stdout.split("median")[1].splitlines()
    assert re.search(shown, rows[2])
    assert max(map(len, rows)) < 160


def test_steps_below_a_second_have_times_of_their_own(tmp_path: Path) -> None:
    found = forecast(write(tmp_path / "fast.csv", counts(), every_s=0.25), "--horizon-s", "0.25")
    assert found["horizons"][0]["time"] == "2026-03-01T00:01:40.000Z"


def test_a_backtest_of_nothing_but_zeros_has_no_ratios(tmp_path: Path) -> None:
    path = write(tmp_path / "idle.csv", [0] * 200)
    assert forecast(path, "--backtest")["backtest"]["relative_loss"]["seasonal naive"] == [None] * 4
    assert " - " in run(path, "--backtest").stdout.split("Backtest")[1]


# --- progress and words ----------------------------------------------------------------------------------


def test_work_that_takes_long_shows_how_far_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def monotonic() -> float:
        nonlocal now_s
        now_s += 0.1
        return now_s

    monkeypatch.setattr(console.time, "monotonic", monotonic)
    result = run(file, "--backtest")
    assert "forecast: testing Forescale\n" in result.stderr
    assert "forecast: testing seasonal naive\n" in result.stderr
    assert "forecast: learning\n" in result.stderr


@pytest.mark.parametrize(
    ("value_s", "words"),
    [
        (0.25, "0.25 s"),
        (59.0, "59 s"),
        (60.0, "1 min"),
        (90.0, "1 min 30 s"),
        (3600.0, "1 h"),
        (5400.0, "1 h 30 min"),
        (86400.0, "1 d"),
        (86460.0, "1 d"),
        (1382400.0, "16 d"),
    ],
)
def test_durations_in_words(value_s: float, words: str) -> None:
    assert duration(value_s) == words
