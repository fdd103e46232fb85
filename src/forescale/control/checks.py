"""Runs the commands that decide whether a version is good enough: exit code 0 says yes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import Mapping

_KEPT_BYTES = 4096  # of what a command prints; its last line is shown
_LINE_LIMIT = 200


async def run_check(command: str, environment: Mapping[str, str], limit_s: float) -> tuple[bool, str]:
    """Whether a command succeeds in time, and the last line that it prints.

    It gets no shell, and a process group of its own that is killed when it is too late or nobody waits.

    Args:
        environment: added to this process's own.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *shlex.split(command),
            env={**os.environ, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return False, f"cannot run {command}: {error}"
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(limit_s):
            while chunk := await process.stdout.read(_KEPT_BYTES):
                said = (said + chunk)[-_KEPT_BYTES:]
            code = await process.wait()
    except TimeoutError:
        return False, f"no answer in {limit_s:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    lines = said.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
    return code == 0, last[:_LINE_LIMIT]
