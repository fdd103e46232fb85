from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from forescale.cli.output import check_writable, fresh_folder, write_text
from forescale.core.errors import InvalidInput

NOW = datetime(2026, 11, 21, 7, 15, 3, tzinfo=UTC)


def test_a_folder_is_named_after_the_time_and_never_given_twice(tmp_path: Path) -> None:
    folders = [fresh_folder(tmp_path / "new" / "runs", NOW) for _ in range(3)]
    assert [folder.name for folder in folders] == [
        "2026-11-21_07-15-03",
        "2026-11-21_07-15-03-2",
        "2026-11-21_07-15-03-3",
    ]
    assert all(folder.is_dir() for folder in folders)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(InvalidInput, match="cannot make a folder in"):
        fresh_folder(tmp_path / "runs", NOW)


def test_what_can_be_written_is_left_alone(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.html")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.html").write_text("old", encoding="utf-8")
    check_writable(tmp_path / "old.html")
    assert (tmp_path / "old.html").read_text(encoding="utf-8") == "old"


def test_a_folder_that_the_run_will_make(tmp_path: Path) -> None:
    check_writable(tmp_path / "run" / "report.html", made=tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"there is no folder .*other"):
        check_writable(tmp_path / "other" / "report.html", made=tmp_path / "run")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(InvalidInput, match=r"cannot write .*: Is a directory"):
        write_text(tmp_path, "x")


@pytest.mark.parametrize("name", ["new.html", "old.html"])
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "old.html").touch()
    asked: list[Path] = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr("os.access", refuse)  # root is refused nothing
    with pytest.raises(InvalidInput, match="permission denied"):
        check_writable(tmp_path / name)
    assert asked == [tmp_path / name if name == "old.html" else tmp_path]
