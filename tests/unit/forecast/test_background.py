from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest

from forescale.forecast.background import background_processes

ENDED_IN_THE_MIDST_OF_A_FIT = """
import os, signal
from forescale.forecast.background import background_processes
if __name__ == "__main__":
    with background_processes(1) as pool:
        pool.submit(print, "at work", flush=True).result()
        pool.submit(signal.pause)
        os.kill(os.getpid(), signal.{signal})
        signal.pause()
"""


def test_they_work_and_are_gone_afterwards() -> None:
    with background_processes(1) as pool:
        assert pool.submit(pow, 2, 10).result() == 1024
        assert pool.submit(os.getpgrp).result() != os.getpgrp()  # Ctrl-C does not reach it
        assert pool.submit(os.nice, 0).result() >= 10
        pid = pool.submit(os.getpid).result()
        running, waiting = pool.submit(signal.pause), pool.submit(pow, 2, 11)
    assert not psutil.pid_exists(pid)
    for future in (running, waiting):
        assert isinstance(future.exception(), BrokenProcessPool)
    with pytest.raises(RuntimeError):
        pool.submit(pow, 2, 12)


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_they_end_with_the_process_that_uses_them_whatever_ends_it(ending: str) -> None:
    script = ENDED_IN_THE_MIDST_OF_A_FIT.format(signal=ending)
    # This returns when the last one has ended that could write to the pipe.
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "at work\n"
    assert done.returncode == -signal.Signals[ending]
