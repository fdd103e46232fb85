from __future__ import annotations

import os
from pathlib import Path

from forescale.engine.serve.logs import BoundedLog, older, trim


def test_a_log_keeps_what_was_said_last(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = BoundedLog(path, limit_bytes=100)
    for number in range(100):
        log.write(f"line {number}\n")
    assert path.stat().st_size + older(path).stat().st_size <= 220
    assert (older(path).read_text() + path.read_text()).endswith("line 98\nline 99\n")


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    BoundedLog(tmp_path / "missing" / "a.log").write("said\n")
    trim(tmp_path / "missing", living=())


def test_living_processes_write_on_and_the_oldest_of_the_others_go(tmp_path: Path) -> None:
    with (tmp_path / "living.log").open("a") as log:
        log.write("x" * 200)
        log.flush()
        for age, name in enumerate(("new", "old", "oldest")):
            (tmp_path / f"{name}.log").touch()
            os.utime(tmp_path / f"{name}.log", (1000 - age, 1000 - age))
        trim(tmp_path, living={"living"}, limit_bytes=100, kept=2)
        log.write("more")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "living.log",
        "living.log.1",
        "new.log",
        "old.log",
    ]
    assert (tmp_path / "living.log").read_text() == "more"
