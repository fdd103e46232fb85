"""A run's record on disk: one JSON object per line, appended as things happen."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from forescale.core.errors import InvalidInput, RunFailed


class RunLog:
    """Appends records to a file, each complete on disk (in the page cache) when :meth:`append` returns.

    A last line that a killed run left unfinished is cut off first. While the log is open, no other process
    can open it, so that two runs never share a folder.

    Attributes:
        checkpoint: named in the error when the log cannot be written; set by the owner.

    Raises:
        InvalidInput: another process has it open.
        RunFailed: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._failed(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(_complete_bytes(path))
        except BlockingIOError as error:
            self._file.close()
            raise InvalidInput(
                f"another run is going on in {path.parent}; wait until it ends, or choose another directory"
            ) from error
        except OSError as error:
            self._file.close()
            raise self._failed(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record.

        Raises:
            RunFailed: it could not be written, e.g. because the disk is full. What was written
                of the line is taken back.
        """
        line = memoryview((json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n").encode())
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(end)
            raise self._failed(error) from error

    @property
    def size_bytes(self) -> int:
        """Length of what was written, by earlier runs too."""
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failed(self, error: OSError) -> RunFailed:
        return RunFailed(
            f"cannot write the run log {self.path}: {error.strerror}; make room or choose another place",
            checkpoint=self.checkpoint,
        )


def read_run_log(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a run, in order; a last line that a killed run left unfinished is left out.

    Raises:
        InvalidInput: the file cannot be read, or a line in it is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _parsed(line, path, number)
    except OSError as error:
        raise InvalidInput(f"cannot read the run log {path}: {error.strerror}") from error


def _parsed(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"{path} is not a run log: line {number} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InvalidInput(f"{path} is not a run log: line {number} is not an object")
    return record


def _complete_bytes(path: Path) -> int:
    """Length of the file up to the end of its last complete line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
