"""Where a command may write: asked before work whose result would otherwise be lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from itertools import count
from pathlib import Path

from forescale.core.errors import InvalidInput


def check_writable(path: Path, *, made: Path | None = None) -> None:
    """Whether a file could be written there.

    Args:
        made: a folder that will exist by then.

    Raises:
        InvalidInput: it could not.
    """
    if path.is_dir():
        raise InvalidInput(f"cannot write {path}: it is a folder")
    if not path.exists() and path.parent == made:
        return
    if not path.parent.is_dir():
        raise InvalidInput(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidInput(f"cannot write {path}: permission denied")


def write_text(path: Path, text: str) -> None:
    """Writes a file.

    Raises:
        InvalidInput: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error


def fresh_folder(parent: Path, now: datetime) -> Path:
    """Makes a folder in ``parent`` that is named after the time; what is there already stays.

    Raises:
        InvalidInput: it cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return next(folder for folder in _names(parent / f"{now:%Y-%m-%d_%H-%M-%S}") if _made(folder))
    except OSError as error:
        raise InvalidInput(f"cannot make a folder in {parent}: {error.strerror}") from error


def _names(wanted: Path) -> Iterator[Path]:
    yield wanted
    yield from (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))


def _made(folder: Path) -> bool:
    """False if it was there already."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
