"""Logs that stay small, and a disk that is full is no reason to stop."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Container
from pathlib import Path

import structlog

_LIMIT_BYTES = 8 << 20  # of a file; as much again is kept of what was before
_KEPT = 32  # logs of processes that have ended


class BoundedLog:
    """A text file to print to, whose older half is given up when it is full."""

    def __init__(self, path: Path, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            with self._path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(text)
                size_bytes = file.tell()
            if size_bytes > self._limit_bytes:
                self._path.replace(older(self._path))

    def flush(self) -> None:
        """Nothing is held back."""


def log_to(path: Path) -> None:
    """Let all that this process logs go to a file."""
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(BoundedLog(path)),  # pyright: ignore[reportArgumentType] - it is asked for no more than this
    )


def trim(folder: Path, living: Container[str], limit_bytes: int = _LIMIT_BYTES, kept: int = _KEPT) -> None:
    """Bound the logs ``NAME.log`` of processes that write to them directly, ``living`` or not."""
    with contextlib.suppress(OSError):
        ended: list[tuple[float, Path]] = []
        for path in folder.glob("*.log"):
            found = path.stat()
            if path.stem not in living:
                ended.append((found.st_mtime, path))
            elif found.st_size > limit_bytes:
                # Its process has it open to append: what it writes next is at the new end.
                shutil.copyfile(path, older(path))
                os.truncate(path, 0)
        for _, path in sorted(ended)[:-kept]:
            path.unlink()
            older(path).unlink(missing_ok=True)


def last_line(path: Path) -> str:
    """What was said last, at most 300 characters of it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return str(error)
    return lines[-1].removeprefix("error: ")[:300] if lines else ""


def older(path: Path) -> Path:
    """Where the part of a log goes that was before."""
    return path.with_name(f"{path.name}.1")
