"""A process that has imported what many need, and becomes each of them by forking (Linux alone).

Importing torch takes seconds and 250 MB. A fork takes 10 ms, and memory that nobody writes to is there once.

``Nursery`` is used by whoever wants processes. Those are its own children, not the nursery's, so that they
outlive that and it learns how they end: the nursery forks twice, its grandchildren are orphans at once, and
Linux gives them to the nearest ancestor that has asked for such (``PR_SET_CHILD_SUBREAPER``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from forescale.core.errors import RunFailed
from forescale.engine import bootstrap

_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])
_PROGRAM = """\
import sys
sys.path.insert(0, sys.argv[1])
from forescale.engine.nursery import main
sys.exit(main())
"""
_PR_SET_NAME = 15  # of linux/prctl.h, like the next
_PR_SET_CHILD_SUBREAPER = 36
_MESSAGE_BYTES = 1 << 16


class Nursery:
    """Forks processes, from any thread.

    Args:
        modules: what it imports before the first one.
        environment: all variables.
        log: file for what it has to say.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> None:
        adopt_orphans(True)
        self._lock = threading.Lock()
        self._log_path = log.name
        self._control, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-c", _PROGRAM, _SOURCE_ROOT, str(its_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=(its_end.fileno(),),
                start_new_session=True,
            )
        said = {"modules": modules, "import_path": [folder or os.getcwd() for folder in sys.path]}
        with contextlib.suppress(BrokenPipeError):  # it has ended already, as ``fork`` will find
            self._control.send(json.dumps(said).encode())

    @property
    def is_lost(self) -> bool:
        return self._process.poll() is not None

    def fork(self, name: str, stdin: int, stdout: int) -> int:
        """A new process; waits until all is imported.

        Args:
            stdin, stdout: descriptors for the process; errors go to the latter, too.

        Returns:
            Its number; it is a child of this process.

        Raises:
            RunFailed: there is none.
        """
        with self._lock:
            try:
                socket.send_fds(self._control, [name.encode()], [stdin, stdout])
                answer = self._control.recv(_MESSAGE_BYTES)
            except OSError:
                answer = b""
        if not answer:
            raise RunFailed(f"the process that {name} is to be forked from has ended; see {self._log_path}")
        told: dict[str, Any] = json.loads(answer)
        if "error" in told:
            raise RunFailed(f"cannot fork a process for {name}: {told['error']}")
        return told["pid"]

    def close(self) -> None:
        """End it; those that it has become go on."""
        self._process.kill()
        self._process.wait()
        with self._lock:
            self._control.close()


class Forked:
    """A process that is to be forked; used like ``subprocess.Popen``.

    Args:
        stdin, stdout: as ``Nursery.fork`` has them; copied, so that the caller may close them.

    Attributes:
        pid: its number; 0: it has none yet.
    """

    def __init__(self, nursery: Nursery, name: str, stdin: int, stdout: int) -> None:
        self._nursery = nursery
        self._name = name
        self._descriptors = os.dup(stdin), os.dup(stdout)
        self._is_called_off = False
        self.pid = 0

    def call_off(self) -> None:
        """It is to end as soon as it has begun."""
        self._is_called_off = True

    def wait(self) -> int:
        """Begin, and wait until it ends: its exit code, or less than 0 for a signal. Once, from any thread.

        Raises:
            RunFailed: it could not begin.
        """
        try:
            self.pid = self._nursery.fork(self._name, *self._descriptors)
        finally:
            for descriptor in self._descriptors:
                os.close(descriptor)
        if self._is_called_off:
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def main() -> int:
    """Import what is asked for, then fork whenever asked to; the exit code of what this becomes."""
    bootstrap.die_with_parent()
    bootstrap.print_what_fits()
    control = socket.socket(fileno=int(sys.argv[2]))
    asked = json.loads(control.recv(_MESSAGE_BYTES))
    sys.path[:] = asked["import_path"]
    for module in asked["modules"]:
        import_module(module)
    gc.collect()
    gc.freeze()  # what is there stays, and is not written to by looking through it
    while True:
        name, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 2)
        if not name:
            return 0
        try:
            pid = _fork()
        except OSError as error:
            control.send(json.dumps({"error": error.strerror}).encode())
        else:
            if pid == 0:
                control.close()
                return _begin(name, *descriptors)
            control.send(json.dumps({"pid": pid}).encode())
        for descriptor in descriptors:
            os.close(descriptor)


def _fork() -> int:
    """Like ``os.fork``, of a process that leads a session and has found its new parent when this returns."""
    mine, its = socket.socketpair()
    between = os.fork()
    if between == 0:
        mine.close()
        try:
            if os.fork():
                os._exit(0)
            os.setsid()
            its.send(f"{os.getpid()} 0".encode())
        except OSError as error:
            its.send(f"0 {error.errno}".encode())
            os._exit(1)
        with its:
            its.recv(1)  # nothing comes, but it ends
        return 0
    its.close()
    with mine:
        os.waitpid(between, 0)
        said = mine.recv(_MESSAGE_BYTES)
    pid, number = map(int, said.split()) if said else (0, errno.ECHILD)
    if number:
        raise OSError(number, os.strerror(number))
    return pid


def _begin(name: bytes, stdin: int, stdout: int) -> int:
    for descriptor, number in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(descriptor, number)
    os.close(stdin)
    os.close(stdout)
    _prctl(_PR_SET_NAME, name)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(random.getrandbits(32))  # or all would draw the same; ``random`` sees to itself
    return bootstrap.main()


def adopt_orphans(is_wanted: bool) -> None:
    """Whether this process becomes the parent of descendants whose parents have ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(is_wanted))


def _prctl(option: int, argument: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)
