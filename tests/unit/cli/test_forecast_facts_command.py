"""``forescale forecast`` with what is known beforehand and with slow models as members."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from forecast_command import error, forecast, run
from forescale.forecast import refit

START = datetime(2026, 3, 1, tzinfo=UTC)
LENGTH = 420
CAMPAIGNS = (60, 117, 190, 236, 301, 350, 391, LENGTH + 3)
"""Steps at which campaigns of ten steps begin, the last one to come."""

needs_lightgbm = pytest.mark.skipif(find_spec("lightgbm") is None, reason="forescale[forecast]")


def at(step: float) -> str:
    return (START + timedelta(minutes=10 * step)).isoformat()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rate = np.full(LENGTH, 50.0)
    for begin in CAMPAIGNS:
        rate[begin : begin + 10] = 150.0
    values = np.random.default_rng(0).poisson(rate).tolist()
    path = tmp_path / "requests.csv"
    path.write_text("\n".join(["time,requests", *(f"{at(k)},{value}" for k, value in enumerate(values))]))
    return path


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events.csv"
    path.write_text(
        "\n".join(["start,end,name", *(f"{at(begin)},{at(begin + 10)},campaign" for begin in CAMPAIGNS)])
    )
    return path


def test_a_forecast_rises_ahead_of_a_known_event_and_loses_less(file: Path, events: Path) -> None:
    words = (file, "--horizon-s", "600", "--horizon-s", "4800", "--backtest")
    with_plan, without = forecast(*words, "--events", events), forecast(*words)
    soon, later = with_plan["horizons"]
    assert soon["quantiles"][2] < 70  # not yet
    assert later["quantiles"][2] > 100
    assert later["peak_quantiles"][2] > 110
    assert without["horizons"][1]["quantiles"][2] < 70
    loss, loss_without = (found["backtest"]["loss"]["Forescale"] for found in (with_plan, without))
    assert loss[0] < 0.9 * loss_without[0]
    assert loss[1] < 0.8 * loss_without[1]
    assert "of 8 events 7 fall into the series, 1 into the time forecast" in with_plan["series"]["notes"]


def test_a_picture_shows_events(file: Path, events: Path, tmp_path: Path) -> None:
    picture = tmp_path / "fan.svg"
    assert run(file, "--events", events, "--horizon-s", "6000", "--plot", picture).exit_code == 0
    assert picture.read_text().count(">campaign<") == 2  # of sixty steps and ten to come


def test_an_event_of_a_kind_that_never_was_is_said(file: Path, events: Path) -> None:
    events.write_text(f"start,end,name\n{at(LENGTH + 1)},{at(LENGTH + 9)},launch\n")
    notes = forecast(file, "--events", events, "--horizon-s", "6000")["series"]["notes"]
    assert "'launch' never was in the series: nothing is known of what it does" in notes


def test_events_need_dates_written_alike(file: Path, events: Path, tmp_path: Path) -> None:
    events.write_text("start,end,name\n2026-03-01 10:00,2026-03-01 11:00,sale\n")
    assert "times of the series have a zone, those of the events do not" in error(file, "--events", events)
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(map(str, range(40))))
    assert "--events needs a series whose times are dates" in error(plain, "--events", events)
    assert "--calendar needs a series whose times are dates" in error(plain, "--calendar")
    events.write_text("start,end\n1,2\n")
    assert f"{events}: its columns are start, end; give start, end, name" in error(file, "--events", events)
    assert "none.csv: No such file" in error(file, "--events", tmp_path / "none.csv")


def test_the_calendar_is_a_member(file: Path) -> None:
    words = (file, "--horizon-s", "600")
    assert "ridge_covariates" in forecast(*words, "--calendar")["weights"]
    assert "ridge_covariates" not in forecast(*words)["weights"]


@needs_lightgbm
def test_slow_members_are_weighed_tested_and_named(file: Path) -> None:
    shown = run(file, "--members", "lightgbm", "--horizon-s", "600", "--backtest").stdout
    trusted, tested = shown.split("Whom the forecast trusts")[1].split("Backtest")
    assert "LightGBM" in trusted
    (row,) = [line for line in tested.splitlines() if line.startswith(" LightGBM")]
    assert float(row.split()[1]) < 1.5  # times the loss of seasonal naive


def test_members_that_are_not_there_are_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--members knows no 'gru'; there are lightgbm, prophet, ets" in error(file, "--members", "ets,gru")
    assert "--members names none of lightgbm" in error(file, "--members", ",")
    monkeypatch.setattr(refit, "find_spec", lambda name: None)
    said = "this forecaster needs statsforecast: pip install 'forescale[forecast]'"
    assert said in error(file, "--members", "theta")


def test_compressed_files_and_those_in_utf_16_are_read(file: Path) -> None:
    packed = file.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(file.read_text().encode("utf-16")))
    words = ("--horizon-s", "600")
    assert forecast(packed, *words)["horizons"] == forecast(file, *words)["horizons"]
    packed.write_bytes(packed.read_bytes()[:-200])
    assert "it is compressed by gzip, but damaged" in error(packed)
