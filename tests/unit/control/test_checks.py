"""Checks are commands that end with whoever runs them."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path

import psutil
import pytest

from forescale.control.checks import run_check

LIMIT_S = 60.0


def check(program: str, limit_s: float = LIMIT_S) -> tuple[bool, str]:
    return asyncio.run(run_check(f'{sys.executable} -c "{program}"', {"FLAVOUR": "plum"}, limit_s))


def test_the_exit_code_decides_and_the_last_line_tells_why() -> None:
    assert check("import os; print(1); print(os.environ['FLAVOUR'])") == (True, "plum")
    assert check("print('too slow'); raise SystemExit(3)") == (False, "too slow")
    assert check("raise SystemExit(3)") == (False, "exit code 3")


def test_what_cannot_be_run_or_takes_too_long_has_failed(tmp_path: Path) -> None:
    passed, says = asyncio.run(run_check(str(tmp_path / "nothing"), {}, LIMIT_S))
    assert (passed, says.partition(":")[0]) == (False, f"cannot run {tmp_path / 'nothing'}")
    assert check("import signal; signal.pause()", limit_s=0.01) == (False, "no answer in 0.01 s")


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
def test_a_check_that_is_cancelled_again_and_again_leaves_nothing(turns: int) -> None:
    async def scenario() -> None:
        checking = asyncio.create_task(run_check("sleep 1000", {}, LIMIT_S))
        for _ in range(turns):
            await asyncio.sleep(0)
        for _ in range(3):
            checking.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await checking

    before = psutil.Process().children()
    asyncio.run(scenario())
    assert psutil.Process().children() == before
    gc.collect()  # what was not waited for warns, which is an error here
