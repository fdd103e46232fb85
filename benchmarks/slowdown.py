"""Slows a running process down for real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PERIOD_US = 10_000
_V1 = Path("/sys/fs/cgroup/cpu")


@contextmanager
def slowed(pid: int, core: int, speed: float) -> Generator[str]:
    """Lets ``pid`` run for ``speed`` of the time; yields how.

    With a cgroup quota where that is allowed, otherwise by processes that compete for its core (then
    ``speed`` is rounded to 1/2, 1/3, ...).
    """
    group = _V1 / f"forescale-benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        rivals = max(1, round(1 / speed) - 1)
        program = (
            f"import os; os.sched_setaffinity(0, {{{core}}})\n"
            f"while os.getppid() == {os.getpid()}: sum(range(10**6))"
        )
        running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(rivals)]
        try:
            yield f"{rivals} competing process(es) on its core"
        finally:
            for rival in running:
                rival.kill()
                rival.wait()
        return
    try:
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(_PERIOD_US * speed)))
        (group / "cgroup.procs").write_text(str(pid))
        yield f"CPU quota of {speed:.0%}, period 10 ms"
    finally:
        if psutil.pid_exists(pid):
            (_V1 / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def worker_pid(device: str) -> int:
    """The worker of this process that runs on ``device``."""
    for child in psutil.Process().children(recursive=True):
        if child.cmdline()[-1:] == [device]:
            return child.pid
    raise LookupError(f"no worker on {device}")
