from __future__ import annotations

import json
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forescale.core.errors import InvalidInput, RunFailed
from forescale.engine.runlog import RunLog, read_run_log

RECORDS = [{"type": "A", "x": 0.1}, {"type": "B", "text": "ü" * 100_000}, {"type": "C"}]


def write(path: Path, records: list[dict]) -> None:
    with RunLog(path) as log:
        for record in records:
            log.append(record)


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.jsonl"
    write(path, RECORDS)
    assert list(read_run_log(path)) == RECORDS


def test_each_record_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run.jsonl") as log:
        for i, record in enumerate(RECORDS):
            log.append(record)
            assert list(read_run_log(log.path)) == RECORDS[: i + 1]


@pytest.mark.parametrize("cut", [1, 10, 150_000])
def test_torn_last_line_is_left_out_and_cut_off_by_the_next_run(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    write(path, RECORDS[:2])
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_run_log(path)) == RECORDS[:1]
    write(path, RECORDS[2:])
    assert list(read_run_log(path)) == [RECORDS[0], RECORDS[2]]


def test_file_with_a_torn_first_line_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"type"')
    assert list(read_run_log(path)) == []
    write(path, RECORDS[2:])
    assert list(read_run_log(path)) == RECORDS[2:]


@pytest.mark.parametrize(
    ("text", "what"), [("no json\n", "line 1 is not JSON"), ("[1]\n", "line 1 is not an object")]
)
def test_other_file_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(InvalidInput, match=what):
        list(read_run_log(path))


def test_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read the run log"):
        list(read_run_log(tmp_path / "run.jsonl"))


@contextmanager
def room_for_1000_bytes() -> Generator[None]:
    """Files cannot grow any further, as on a full disk. Also pytest's own output, if it goes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_ends_the_run_with_its_checkpoint_named(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run.jsonl") as log:
        log.append(RECORDS[0])
        log.checkpoint = "ckpt/step-40"
        with (
            pytest.raises(RunFailed, match=r"cannot write the run log .*resume from ckpt/step-40"),
            room_for_1000_bytes(),
        ):
            log.append(RECORDS[1])
        log.append(RECORDS[2])
    assert list(read_run_log(log.path)) == [RECORDS[0], RECORDS[2]]


def test_path_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="cannot write the run log"):
        RunLog(tmp_path)
