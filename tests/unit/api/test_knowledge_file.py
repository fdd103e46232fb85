"""The file that keeps what was learned: whole or not at all, and never in the way."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest

from clocks import Ticks
from forescale.api.knowledge_file import kept
from forescale.control.knowledge import Knowledge, Measured

DIGITS = {
    "model": "digits",
    "version": 1,
    "load_s": 0.5,
    "model_bytes": 7,
    "batch_times": {"1": [[1.0, 0.1]]},
}


def learned() -> Knowledge:
    knowledge = Knowledge()
    knowledge.restore([DIGITS])
    for second in range(30):
        knowledge.forecast = knowledge.forecast.taken_in({"digits": 20.0, "array": 2.0}, float(second))
    return knowledge


def go_on(knowledge: Knowledge, path: Path) -> None:
    """A server runs, if only for a moment."""

    async def run() -> None:
        async with kept(knowledge, path, Ticks()):
            pass

    asyncio.run(run())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "knowledge"
    go_on(learned(), path)
    return path


def test_a_server_goes_on_from_what_the_one_before_knew(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(written, tmp_path))
    for _ in range(2):
        later = Knowledge()
        go_on(later, path)
        assert later.measured(("digits", 1)) == Measured(
            load_s=0.5, model_bytes=7, batch_times={1: ((1.0, 0.1),)}
        )
        (expected_per_s,) = later.forecast.peaks_per_s({"digits": 1.0}, (0.5,))["digits"]
        assert 15.0 < expected_per_s < 25.0
    assert [file.name for file in tmp_path.iterdir()] == ["knowledge"]
    assert capsys.readouterr().out == ""


def foreign(path: Path, kind: str) -> None:
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "damaged":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 255
            path.write_bytes(content)
        case "text":
            path.write_text("what?")
        case "array":
            with path.open("wb") as file:
                np.save(file, np.zeros(3))
        case "pickle":
            with path.open("wb") as file:
                np.savez(file, json=np.array([{}], dtype=object))
        case "version":
            with path.open("wb") as file:
                np.savez(file, json=np.frombuffer(b'{"format": "forescale knowledge 99"}', np.uint8))
        case "zip":
            with path.open("wb") as file:
                np.savez(file, other=np.zeros(3))
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind", ["empty", "truncated", "damaged", "text", "array", "pickle", "version", "zip"]
)
def test_a_damaged_or_foreign_file_is_said_in_a_line_and_replaced(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = Path(shutil.copy(written, tmp_path))
    foreign(path, kind)
    later = Knowledge()
    go_on(later, path)
    assert later.versions() == []
    (line,) = capsys.readouterr().out.splitlines()
    assert "knowledge_begins_anew" in line
    go_on(Knowledge(), path)
    assert capsys.readouterr().out == "", "it is whole again"


def test_where_nothing_can_be_written_it_is_said_and_serving_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "knowledge"
    path.mkdir()
    go_on(learned(), path)
    begun, kept_not = capsys.readouterr().out.splitlines()
    assert "knowledge_begins_anew" in begun
    assert "knowledge_not_kept" in kept_not
    assert list(tmp_path.iterdir()) == [path]
