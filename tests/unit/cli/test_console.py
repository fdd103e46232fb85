from __future__ import annotations

import pytest

from forescale.cli import console


def test_work_that_is_done_at_once_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.late_fraction_bar("replay:") as progress:
        progress("reading", 0.0)
    assert capsys.readouterr().err == ""


def test_work_that_takes_long_says_what_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now_s)
    with console.late_fraction_bar("replay:") as progress:
        progress("reading", 0.0)
        now_s = 2.5
        for number in range(3):
            progress("deciding", number / 3)
    said = capsys.readouterr()
    assert said.err == "replay: deciding\n"
    assert said.out == ""
