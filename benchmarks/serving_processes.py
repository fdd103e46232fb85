"""Processes that a benchmark starts, all of which end with it, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

import forescale
from forescale.api.client import Client
from forescale.core.errors import ForescaleError

_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
_GRACE_S = 15.0
_SOURCE = str(Path(forescale.__file__).parents[1])


class Processes:
    """What was started in a ``with`` block; at its end nothing of it is left, grandchildren included.

    Processes whose parents end become this process's children, so that none can get lost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return self

    def __exit__(self, *exc_info: object) -> None:
        end(psutil.Process().children(recursive=True))

    def start(
        self, command: Sequence[str], *, log: str, environment: Mapping[str, str], cwd: Path | None = None
    ) -> psutil.Popen:
        """Start a command; what it prints goes to the file ``log``."""
        with (self.folder / log).open("ab") as out:
            return psutil.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def stop(self, process: psutil.Process) -> None:
        """Ask a process to end, and see to it that all it has started ends with it."""
        end([process, *descendants(process)], first=process)

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(processes: Sequence[psutil.Process], *, first: psutil.Process | None = None) -> None:
    """Ask processes to end (only ``first`` if given), kill those that do not, and collect them."""
    for process in processes if first is None else [first]:
        _signal(process, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=_GRACE_S)
    for process in left:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(left, timeout=_GRACE_S)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


class NotStarted(RuntimeError):
    """A server did not do in time what was waited for."""


def wait_until(
    is_so: Callable[[], bool],
    what: str,
    timeout_s: float,
    process: psutil.Process,
    *,
    every_s: float = 0.02,
) -> None:
    """Ask again and again.

    Raises:
        NotStarted: it is not so after that time, or the process that it depends on has ended.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise NotStarted(f"the process ended before {what}")
        if time.monotonic() > deadline_s:
            raise NotStarted(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)


class Site:
    """A running ``forescale serve`` with a state folder of its own."""

    def __init__(
        self, processes: Processes, name: str, *options: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._processes = processes
        self._log = f"{name}.log"
        self.state = processes.folder / name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = options
        self._environment: Mapping[str, str] = {"PYTHONPATH": _SOURCE, **(environment or {})}
        self.client = Client(self.url, timeout_s=120)
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.client.close()
        self._processes.stop(self.controller)

    def start(self) -> None:
        """Start the command (again)."""
        options = ("--state", str(self.state), "--port", str(self.port), *self._options)
        self.controller = self._processes.start(
            command("serve", *options), log=self._log, environment=self._environment
        )
        wait_until(self.is_there, "forescale serve answers", 60, self.controller)

    def is_there(self) -> bool:
        try:
            self.client.deployments()
        except ForescaleError:
            return False
        return True

    def run(self, *words: str) -> str:
        """What a command of the CLI prints.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            command(*words),
            env={**os.environ, **self._environment, "FORESCALE_URL": self.url},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"forescale {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def add(self, model: str, file: Path) -> int:
        return int(self.client.add_model(model, file)["version"])

    def deploy(self, model: str, version: int = 1, **options: Any) -> None:
        """Deploy with options of ``Client.deploy``, and wait until it serves."""
        self.client.deploy(model, version, **options)
        for _ in self.client.wait(model, 120):
            pass

    def infer_url(self, model: str) -> str:
        return f"{self.url}/v2/models/{model}/infer"

    def gateway(self) -> psutil.Process:
        """The process that listens on the port."""
        for process in [self.controller, *psutil.Process().children(recursive=True)]:
            try:
                found = process.net_connections("inet")
            except psutil.Error:
                continue
            if any(one.status == psutil.CONN_LISTEN and one.laddr[1] == self.port for one in found):
                return process
        raise RuntimeError(f"no process listens on port {self.port}")

    def family(self) -> list[psutil.Process]:
        """All processes of this server."""
        found = [self.controller, *descendants(self.controller), self.gateway()]
        found += descendants(self.gateway())
        return list(dict.fromkeys(found))

    def ask(self, model: str, body: bytes) -> Mapping[str, Any]:
        """A model's answer to a request, as JSON.

        Raises:
            urllib.error.URLError: it was refused or failed.
        """
        request = urllib.request.Request(
            self.infer_url(model), data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def replicas(self, model: str, *, state: str = "serving") -> list[psutil.Process]:
        """Processes of a model's replicas."""
        named = {
            replica["process"]
            for deployment in self.client.deployments()
            if deployment["model"] == model
            for replica in deployment["replicas"]
            if replica["state"] == state
        }
        return [process for process in self.crew() if _name(process) in named]

    def settle(self) -> None:
        """Wait until nothing starts any more: the crew's processes, warm spares included, are idle."""
        wait_until(self._is_idle, "the warm spares are there", 60, self.controller)

    def _is_idle(self) -> bool:
        before = {process.pid: sum(process.cpu_times()[:2]) for process in self.crew()}
        time.sleep(0.5)
        after = {process.pid: sum(process.cpu_times()[:2]) for process in self.crew()}
        return before.keys() == after.keys() and all(after[pid] - before[pid] < 0.1 for pid in after)

    def crew(self) -> list[psutil.Process]:
        """Replica processes, spares included."""
        return [
            process
            for process in psutil.Process().children(recursive=True)
            if _name(process).startswith("replica-")
        ]


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from forescale.cli.main import app; app()", *words]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
