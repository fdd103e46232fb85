"""Processes of this machine, pinned to their cores or accelerator."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput, RunFailed
from forescale.engine.backend import ProcessExit, ProcessHandle, ProcessSpec
from forescale.engine.bootstrap import request
from forescale.engine.channel import Invitation

_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])
_PROGRAM = """\
import sys
sys.path.insert(0, sys.argv[1])
from forescale.engine.bootstrap import main
sys.exit(main())
"""
_TAIL_LINES = 20
_TAIL_BYTES = 1 << 13
_HINTS: dict[int, str] = {
    signal.SIGKILL: " (out of memory or by hand)",
    signal.SIGSEGV: " (a crash in native code)",
}


@dataclass(slots=True, kw_only=True)
class _Child:
    """A process and what became of it.

    Attributes:
        lifeline: our end of its standard input; it ends when this closes.
        log_start_bytes: where its output begins in the log file.
        stopped: whether we ended it.
    """

    handle: ProcessHandle
    popen: subprocess.Popen[bytes]
    lifeline: int
    log_path: Path
    log_start_bytes: int
    end: Future[ProcessExit] = field(default_factory=Future[ProcessExit])
    stopped: bool = False


class LocalBackend:
    """A ``ProcessBackend`` of subprocesses.

    Each leads its own session, so that Ctrl-C reaches the coordinator alone, and dies with this process
    however that ends. On Linux it also dies with the *thread* that called ``start``.

    Args:
        invitation: how processes reach the coordinator.
        log_dir: folder where ``NAME.log`` collects what each process prints.
    """

    def __init__(self, *, invitation: Invitation, log_dir: Path) -> None:
        self._invitation = invitation
        self._log_dir = log_dir
        self._children: dict[ProcessHandle, _Child] = {}
        self._ended: deque[_Child] = deque()
        self._news, self._wake = os.pipe()
        os.set_blocking(self._news, False)
        self._closed = False
        atexit.register(self.close)

    def start(self, spec: ProcessSpec) -> ProcessHandle:
        """Start a process and return at once.

        Raises:
            InvalidInput: the device's accelerator is not visible to this process.
            RunFailed: the operating system refused the process or its log file.
            ValueError: a process of that name is running.
        """
        name = spec.address
        if any(child.handle.name == name and not child.end.done() for child in self._children.values()):
            raise ValueError(f"a process named {name} is running")
        environment = _environment(spec)
        message = request(spec, self._invitation)
        log_path = self._log_dir / f"{name}.log"
        child_end, parent_end = os.pipe()
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as log:
                log_start_bytes = log.tell()
                popen = subprocess.Popen(
                    [sys.executable, "-u", "-P", "-c", _PROGRAM, _SOURCE_ROOT, name],
                    stdin=child_end,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            os.close(parent_end)
            raise RunFailed(f"cannot start a process for {name}: {error}") from error
        finally:
            os.close(child_end)
        handle = ProcessHandle(name=name, device=spec.device.name, pid=popen.pid)
        child = _Child(
            handle=handle,
            popen=popen,
            lifeline=parent_end,
            log_path=log_path,
            log_start_bytes=log_start_bytes,
        )
        self._children[handle] = child
        with contextlib.suppress(BrokenPipeError):  # it has ended already: ``exits`` tells why
            _write(parent_end, message)
        threading.Thread(target=self._watch, args=(child,), daemon=True).start()
        return handle

    def stop(self, handle: ProcessHandle, grace_s: float) -> ProcessExit:
        """End a process: SIGTERM, and after ``grace_s`` SIGKILL to it and all it started; how it ended.

        Harmless when it has ended.
        """
        child = self._children[handle]
        self._end((child,), grace_s)
        return child.end.result()

    def kill(self, handle: ProcessHandle) -> None:
        """End a process and all it started at once, without waiting: ``exits`` tells when it is gone."""
        if not self._children[handle].end.done():
            _signal_group(handle.pid, signal.SIGKILL)

    def exits(self) -> tuple[ProcessExit, ...]:
        """What ended since last asked, each once, without those ended by ``stop``. Does not wait."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._news, 1 << 12)
        ended: list[_Child] = []
        while self._ended:
            ended.append(self._ended.popleft())
        return tuple(child.end.result() for child in ended if not child.stopped)

    def fileno(self) -> int:
        """A descriptor that is readable when ``exits`` has something to tell."""
        return self._news

    def close(self, grace_s: float = 2.0) -> None:
        """Stop everything still running. Harmless the second time."""
        if self._closed:
            return
        self._end(tuple(self._children.values()), grace_s)
        self._closed = True
        os.close(self._news)
        os.close(self._wake)
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _end(self, children: Iterable[_Child], grace_s: float) -> None:
        running = [child for child in children if not child.end.done()]
        for child in running:
            child.stopped = True
            _signal_group(child.handle.pid, signal.SIGTERM)
        wait((child.end for child in running), timeout=grace_s)
        for child in running:
            if not child.end.done():
                _signal_group(child.handle.pid, signal.SIGKILL)
        wait(child.end for child in running)

    def _watch(self, child: _Child) -> None:
        """Wait for the end of a process, in a thread of its own."""
        status = child.popen.wait()
        _signal_group(child.handle.pid, signal.SIGKILL)  # what it started must not outlive it
        os.close(child.lifeline)
        self._ended.append(child)
        os.write(self._wake, b".")
        child.end.set_result(_describe(child, status))  # last: ``close`` may follow at once


def _environment(spec: ProcessSpec) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(len(spec.device.cores) or 1),
        "CUDA_VISIBLE_DEVICES": _visible_accelerator(spec.device),
        **spec.environment,
    }


def _visible_accelerator(device: Device) -> str:
    """A device's accelerator as ``CUDA_VISIBLE_DEVICES`` names it; the process knows it as ``cuda:0``."""
    if device.kind is not DeviceKind.CUDA:
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(device.index)
    ordinals = visible.split(",") if visible else []
    if device.index >= len(ordinals):
        raise InvalidInput(
            f"{device.name} is accelerator {device.index}, but CUDA_VISIBLE_DEVICES is {visible!r}"
        )
    return ordinals[device.index].strip()


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _signal_group(leader: int, number: signal.Signals) -> None:
    # Nobody left to tell is what we want; macOS says "not permitted" for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _describe(child: _Child, status: int) -> ProcessExit:
    tail = _tail(child)
    if status < 0:
        code, number = None, -status
        cause = f"killed by {_signal_name(number)}{_HINTS.get(number, '')}"
    else:
        code, number = status, None
        cause = f"exit code {status}"
    if tail:
        cause += f"; last output: {tail[-1][:300]}"
    return ProcessExit(handle=child.handle, code=code, signal=number, cause=cause, log_tail=tail)


def _signal_name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def _tail(child: _Child) -> tuple[str, ...]:
    """Last lines a process wrote; its log may hold older runs' before them."""
    try:
        with child.log_path.open("rb") as log:
            end_bytes = log.seek(0, os.SEEK_END)
            log.seek(max(child.log_start_bytes, end_bytes - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError as error:  # the run's folder may be gone; how the process ended is known nevertheless
        return (f"no log: {error}",)
    return tuple(line for line in lines if line.strip())[-_TAIL_LINES:]
