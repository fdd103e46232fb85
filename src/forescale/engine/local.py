"""Processes of this machine, pinned to their cores or accelerator."""

from __future__ import annotations

import atexit
import contextlib
import errno
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
from typing import BinaryIO, Self

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput, RunFailed
from forescale.engine.backend import ProcessExit, ProcessHandle, ProcessSpec
from forescale.engine.bootstrap import request
from forescale.engine.nursery import Forked, Nursery, adopt_orphans
from forescale.engine.wire import Invitation

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
    process: subprocess.Popen[bytes] | Forked
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
        self._nurseries: dict[object, Nursery] = {}
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
            with _open_log(log_path) as log:
                log_start_bytes = log.tell()
                process = self._begin(spec, environment, child_end, log.fileno())
        except OSError as error:
            os.close(parent_end)
            raise RunFailed(f"cannot start a process for {name}: {error}") from error
        finally:
            os.close(child_end)
        handle = ProcessHandle(name=name, device=spec.device.name, pid=process.pid)
        child = _Child(
            handle=handle,
            process=process,
            lifeline=parent_end,
            log_path=log_path,
            log_start_bytes=log_start_bytes,
        )
        self._children[handle] = child
        with contextlib.suppress(BrokenPipeError):  # it has ended already: ``exits`` tells why
            _write(parent_end, message)
        threading.Thread(target=self._watch, args=(child,), daemon=True).start()
        return handle

    def _begin(
        self, spec: ProcessSpec, environment: dict[str, str], stdin: int, stdout: int
    ) -> subprocess.Popen[bytes] | Forked:
        # A process that has touched CUDA cannot be forked, and some library may do so when it is imported.
        if spec.preload and sys.platform == "linux" and spec.device.kind is DeviceKind.CPU:
            return Forked(self._nursery(spec.preload, environment), spec.address, stdin, stdout)
        return subprocess.Popen(
            [sys.executable, "-u", "-P", "-c", _PROGRAM, _SOURCE_ROOT, spec.address],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def _nursery(self, modules: tuple[str, ...], environment: dict[str, str]) -> Nursery:
        kind = modules, tuple(sorted(environment.items()))
        known = self._nurseries.get(kind)
        if known is None or known.is_lost:
            if known is not None:
                known.close()
            with _open_log(self._log_dir / "nursery.log") as log:
                known = self._nurseries[kind] = Nursery(modules, environment, log)
        return known

    def stop(self, handle: ProcessHandle, grace_s: float) -> ProcessExit:
        """End a process: SIGTERM, and after ``grace_s`` SIGKILL to it and all it started; how it ended.

        Harmless when it has ended.
        """
        child = self._children[handle]
        self._end((child,), grace_s)
        return child.end.result()

    def kill(self, handle: ProcessHandle) -> None:
        """End a process and all it started at once, without waiting: ``exits`` tells when it is gone."""
        _signal(self._children[handle], signal.SIGKILL)

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
        for nursery in self._nurseries.values():
            nursery.close()
        self._end(tuple(self._children.values()), grace_s)
        if self._nurseries:
            adopt_orphans(False)
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
            _signal(child, signal.SIGTERM)
        wait((child.end for child in running), timeout=grace_s)
        for child in running:
            _signal(child, signal.SIGKILL)
        wait(child.end for child in running)

    def _watch(self, child: _Child) -> None:
        """Wait for the end of a process, in a thread of its own."""
        try:
            status, failed = child.process.wait(), ""
        except RunFailed as error:
            status, failed = 1, str(error)
        _signal(child, signal.SIGKILL)  # what it started must not outlive it
        os.close(child.lifeline)
        self._ended.append(child)
        os.write(self._wake, b".")
        child.end.set_result(_describe(child, status, failed))  # ``close`` may follow at once
        if child.process.pid:
            with contextlib.suppress(ChildProcessError):  # no more of what it had started is ours now
                while True:
                    os.waitpid(-child.process.pid, 0)


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


def _open_log(path: Path) -> BinaryIO:
    """A file to append to; without room for one on the disk, what is printed is lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return open(os.devnull, "ab")


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _signal(child: _Child, number: signal.Signals) -> None:
    """To a process and all it has started; one that is still to be forked ends as soon as it is."""
    process = child.process
    if isinstance(process, Forked):
        process.call_off()
    # Nobody left to tell is what we want; macOS says "not permitted" for a group of zombies.
    if process.pid and not child.end.done():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def _describe(child: _Child, status: int, failed: str) -> ProcessExit:
    tail = _tail(child)
    if failed:
        return ProcessExit(handle=child.handle, code=status, signal=None, cause=failed, log_tail=tail)
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
