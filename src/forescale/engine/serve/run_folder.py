"""Folders for the sockets of a data plane: each is there for as long as somebody holds it, and then swept.

Who holds one has locked the file ``lock`` in it, together with others. Whoever gets that lock alone knows
that they have all ended, however that was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from forescale.core.errors import InvalidInput

_PREFIX = "forescale-serve-"
_LOCK = "lock"
_LONGEST = 70  # bytes of a folder's name: sockets in it may have 103 on some systems


def make_folder() -> tuple[Path, int]:
    """A private folder with a short name, and the descriptor that holds it; what others left is removed.

    Raises:
        InvalidInput: there is no room for it.
    """
    parent = tempfile.gettempdir()
    parent = parent if len(parent) < _LONGEST else "/tmp"  # noqa: S108
    sweep(Path(parent))
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # A lock that is there is locked: what has none is about to get one.
        held = hold(folder, "new")
        (folder / "new").rename(folder / _LOCK)
    except OSError as error:
        raise InvalidInput(
            f"cannot make a folder in {parent}: {error.strerror}; set TMPDIR to another"
        ) from error
    return folder, held


def hold(folder: Path, name: str = _LOCK) -> int:
    """A descriptor that keeps the folder from being swept until it is closed, or its process ends."""
    lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def sweep(parent: Path) -> None:
    """Remove this user's folders that nobody holds any more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, held, or gone already
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
