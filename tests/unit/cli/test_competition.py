from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from forescale.cli.competition import Competition
from forescale.profile.cores import allowed_cores

LIMIT_S = 60


def test_competitors_run_on_the_core_and_end_with_the_context() -> None:
    core = allowed_cores()[-1]
    with Competition(core) as competition:
        competition.add()
        competition.add()
        processes = [psutil.Process(pid) for pid in competition.pids]
        assert len(processes) == 2
        assert all(process.is_running() for process in processes)
    assert not competition.pids
    assert not any(process.is_running() for process in processes)


def test_competitors_end_when_the_run_fails() -> None:
    def fail() -> None:
        with Competition(allowed_cores()[-1]) as competition:
            competition.add()
            pids.extend(competition.pids)
            raise RuntimeError

    pids: list[int] = []
    with pytest.raises(RuntimeError):
        fail()
    assert len(pids) == 1
    assert not psutil.pid_exists(pids[0])


def test_competitors_do_not_outlive_their_parent() -> None:
    program = (
        "from forescale.cli.competition import Competition\n"
        f"with Competition({allowed_cores()[-1]}) as competition:\n"
        "    competition.add()\n"
        "    print(competition.pids[0], flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout
        competitor = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        competitor.wait(LIMIT_S)
