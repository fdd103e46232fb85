"""Folders of data planes that were killed are removed, those of others are not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from forescale.core.errors import InvalidInput
from forescale.engine.serve.run_folder import hold, make_folder, sweep


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made, with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_a_folder_is_there_for_as_long_as_somebody_holds_it(parent: Path) -> None:
    folder, held = make_folder()
    (folder / "control").touch()
    other = hold(folder)
    os.close(held)
    sweep(parent)
    assert (folder / "control").exists()
    os.close(other)
    sweep(parent)
    assert list(parent.iterdir()) == []


def test_whoever_makes_one_removes_what_was_left_and_nothing_else(parent: Path) -> None:
    left, held = make_folder()
    mine, mine_held = make_folder()
    os.close(held)
    being_made = parent / "forescale-serve-new"
    being_made.mkdir()
    somebodys = parent / "notes"
    somebodys.mkdir()
    (somebodys / "lock").touch()
    another, another_held = make_folder()
    assert not left.exists()
    assert {*parent.iterdir()} == {mine, being_made, somebodys, another}
    for descriptor in (mine_held, another_held):
        os.close(descriptor)


def test_where_none_can_be_made_it_says_so(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(parent / "nowhere"))
    with pytest.raises(InvalidInput, match="nowhere: No such file or directory; set TMPDIR"):
        make_folder()
