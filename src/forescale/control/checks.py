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
    unwanted = asyncio.Event()
    running = asyncio.create_task(_run(command, environment, limit_s, unwanted))
    # However often this is cancelled, the process is started, killed and waited for without being disturbed.
    while not running.done():
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            unwanted.set()
    if unwanted.is_set():
        raise asyncio.CancelledError
    return running.result()


async def _run(
    command: str, environment: Mapping[str, str], limit_s: float, unwanted: asyncio.Event
) -> tuple[bool, str]:
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
    saying = asyncio.create_task(_last_said(process))
    leaving = asyncio.create_task(unwanted.wait())
    try:
        await asyncio.wait((saying, leaving), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        saying.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = await process.wait()
    if not saying.done() or saying.cancelled():
        return False, f"no answer in {limit_s:g} s"
    return code == 0, saying.result() or f"exit code {code}"


async def _last_said(process: asyncio.subprocess.Process) -> str:
    """The last line that a process has printed when it has ended."""
    assert process.stdout is not None
    said = b""
    while chunk := await process.stdout.read(_KEPT_BYTES):
        said = (said + chunk)[-_KEPT_BYTES:]
    await process.wait()
    lines = said.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_LINE_LIMIT]
