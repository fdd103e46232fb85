"""The controller's hold on the data plane: one that lives is adopted, otherwise one is started.

``STATE/plane`` is locked by the data plane for as long as it lives, and says where it is. The controller
takes that lock to start one and hands it on, so there are never two, nor a moment in which it is not known.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from forescale import __version__
from forescale.core.errors import InvalidInput, PeerGone, ServerFailed
from forescale.engine.serve.exchange import Connection, connect
from forescale.engine.serve.logs import last_line
from forescale.engine.serve.middleware import Middleware
from forescale.engine.serve.orders import Command, End, Exchange, PlaneState
from forescale.engine.serve.plane_process import BEGINNING, Beginning
from forescale.engine.serve.run_folder import hold, make_folder
from forescale.engine.serve.server import listen, listen_at, reserve

_SOURCE_ROOT = str(Path(__file__).resolve().parents[3])
_PROGRAM = f"""\
import sys
sys.path.insert(0, {_SOURCE_ROOT!r})
from forescale.engine.serve.plane_process import main
main()
"""
_ANSWER_S = 30.0  # it has hung if it does not answer for so long
_END_S = 60.0  # it has hung if it does not end in so long
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneOptions:
    """What a data plane is started with and keeps.

    Attributes:
        host: address for requests.
        port: 0: any that is free.
        devices: how many; None: all.
        factories: names of Python functions that may make models.
        gateways: processes that read requests.
        names, access_log, traces: as ``Middleware`` has them.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    devices: int | None = None
    factories: tuple[str, ...] = ()
    gateways: int = 1
    names: tuple[str, ...] | None = None
    access_log: Path | None = None
    traces: str | None = None

    @property
    def middleware(self) -> Middleware:
        return Middleware(names=self.names, access_log=self.access_log, traces=self.traces)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Life:
    """What ``STATE/plane`` says of the data plane that has locked it; ``port`` is where it listens."""

    pid: int
    run: Path
    port: int
    version: str
    options: PlaneOptions


_LIFE = TypeAdapter(_Life)


class DataPlane:
    """The one data plane of a state folder, which the caller has to itself.

    Args:
        lease_s: how long the data plane is to go on without a controller.

    Attributes:
        run: private folder for sockets.
        port: where requests are answered.
    """

    def __init__(self, state: Path, options: PlaneOptions, *, lease_s: float = 300.0) -> None:
        self._state = state
        self._options = options
        self._lease_s = lease_s
        self._connection: Connection | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._held = -1  # keeps the folder
        self.run = Path()
        self.port = options.port

    @property
    def url(self) -> str:
        host = self._options.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def open(self) -> None:
        """Adopt or start it, and see that it answers.

        Raises:
            InvalidInput: it cannot be adopted, or cannot listen where it should.
            ServerFailed: it does not get on.
        """
        try:
            await self.exchange()
        except PeerGone as error:
            if self._child is not None:
                await self.end()
            log = self._state / "plane.log"
            raise ServerFailed(f"{error}; {log} says: {last_line(log)}") from error

    async def exchange(
        self, commands: Sequence[Command] = (), *, acknowledged: int = 0, wait_s: float = 0.0
    ) -> PlaneState:
        """Give commands and learn how things are; connects first if need be. One at a time.

        Raises:
            PeerGone: the data plane is gone; the next call adopts or starts one.
            InvalidInput, ServerFailed: as ``open``.
        """
        if self._connection is None:
            self._connection = await self._reach()
        asked = Exchange(
            commands=tuple(commands), acknowledged=acknowledged, wait_s=wait_s, lease_s=self._lease_s
        )
        try:
            async with asyncio.timeout(wait_s + _ANSWER_S):
                return await self._connection.exchange(asked)
        except PeerGone as error:
            self._part()
            raise PeerGone(f"the data plane (process {self._pid}) is gone") from error
        except TimeoutError as error:
            self._part()
            self.kill()
            raise PeerGone(f"the data plane (process {self._pid}) did not answer and was killed") from error

    def answer_now(self) -> None:
        """Let the exchange under way, or else the next one, end at once."""
        if self._connection is not None:
            self._connection.answer_now()

    async def end(self) -> None:
        """Let it answer what is under way and end; nothing of it is left."""
        self._part()
        if not self._pid:
            return
        with contextlib.suppress(PeerGone, TimeoutError):
            async with asyncio.timeout(_END_S):
                connection = await connect(self.run / "control")
                await connection.exchange(Exchange(commands=(End(),)))
                await connection.closed()
        self.kill()
        shutil.rmtree(self.run, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def kill(self) -> None:
        """End it at once, if it lives."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        elif self._pid:
            lock = _locked(self._state / "plane")
            if lock is not None:  # it has ended
                os.close(lock)
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _part(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _reach(self) -> Connection:
        give_up_s = time.monotonic() + _END_S
        while True:
            lock = _locked(self._state / "plane")
            if lock is not None:
                try:
                    self._start(lock)
                finally:
                    os.close(lock)  # it has it
                return await connect(self.run / "control")
            life = self._life()
            self._check(life)
            self.port, self._pid = life.port, life.pid
            try:
                connection = await connect(life.run / "control")
                if self.run != life.run:
                    self.run, self._held = life.run, hold(life.run)
            except PeerGone as error:  # it is about to end
                if time.monotonic() > give_up_s:
                    raise ServerFailed(
                        f"the data plane of {self._state} neither answers nor ends: kill -9 {life.pid}"
                    ) from error
                await asyncio.sleep(_LOOK_S)
            else:
                structlog.get_logger().info("data_plane_adopted", process=life.pid)
                return connection

    def _life(self) -> _Life:
        try:
            return _LIFE.validate_json((self._state / "plane").read_bytes())
        except (OSError, ValidationError) as error:
            raise ServerFailed(
                f"another version of forescale serves {self._state}: end its data plane first"
            ) from error

    def _check(self, life: _Life) -> None:
        """Whether a data plane that lives can be this one's."""
        how = f"end it with: kill {life.pid} (requests under way are answered), then start again"
        if life.version != __version__:
            raise InvalidInput(
                f"the data plane of {self._state} is of forescale {life.version}, not {__version__}; {how}"
            )
        for field in fields(PlaneOptions):
            mine, its = getattr(self._options, field.name), getattr(life.options, field.name)
            if mine != its and not (field.name == "port" and mine in (0, life.port)):
                raise InvalidInput(
                    f"the data plane of {self._state} was started with {field.name} {its}, not {mine}; {how}"
                )

    def _start(self, lock: int) -> None:
        if self._child is not None:
            self._child.wait()
        with contextlib.ExitStack() as stack:
            bind = listen if self._options.gateways == 1 else reserve
            http = stack.enter_context(bind(self._options.host, self.port))
            if not self.run.name:  # otherwise it is where the controller listens already
                self.run, self._held = make_folder()
            control = stack.enter_context(listen_at(self.run / "control"))
            self.port = http.getsockname()[1]
            beginning = Beginning(
                run=self.run,
                log=self._state / "plane.log",
                replica_logs=self._state / "replicas",
                http=http.fileno(),
                control=control.fileno(),
                gateways=self._options.gateways,
                host=self._options.host,
                port=self.port,
                devices=self._options.devices,
                factories=self._options.factories,
                import_path=tuple(folder or os.getcwd() for folder in sys.path),
                middleware=self._options.middleware,
            )
            try:
                self._child = self._launch(beginning, lock)
                self._pid = self._child.pid
                life = _Life(
                    pid=self._pid,
                    run=self.run,
                    port=self.port,
                    version=__version__,
                    options=self._options,
                )
                os.ftruncate(lock, 0)
                os.pwrite(lock, _LIFE.dump_json(life), 0)
            except OSError as error:
                self.kill()
                raise ServerFailed(f"cannot start a data plane: {error.strerror}") from error

    def _launch(self, beginning: Beginning, lock: int) -> subprocess.Popen[bytes]:
        with beginning.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, BEGINNING.dump_json(beginning).decode()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(beginning.http, beginning.control, lock),
                process_group=0,  # Ctrl-C is for the controller
            )


def _locked(path: Path) -> int | None:
    """The file's lock, as an open descriptor; None: somebody else has it.

    Raises:
        InvalidInput: the file cannot be opened.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(f"cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
