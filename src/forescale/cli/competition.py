"""Real processes that compete for a core with whatever else runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Self

# It ends by itself when its parent is gone, however that ended.
_PROGRAM = """\
import os, sys
core, parent = map(int, sys.argv[1:])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {core})
while os.getppid() == parent:
    sum(range(100_000))
"""


class Competition:
    """Processes that take CPU time from one core; leaving the context ends them all."""

    def __init__(self, core: int) -> None:
        self._core = core
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> tuple[int, ...]:
        """Those that are running."""
        return tuple(process.pid for process in self._processes)

    def add(self) -> None:
        """Starts one more process; all that run on a core get about equal shares of it."""
        # A session of its own: Ctrl-C is for the run, and where the kernel shares CPU time between sessions
        # this one counts like the worker's.
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(self._core), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes.clear()
