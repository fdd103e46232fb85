"""The data plane as a process of its own.

It is started with its sockets and with the lock of the state folder, all open, by ``adoption.py``. Neither
Ctrl-C nor the end of a terminal reaches it: it outlives who started it. It leads a process group, but no
session, because Linux shares a busy machine out among sessions, and who asks is often in the same one.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import structlog
import uvloop
from pydantic import TypeAdapter

from forescale.core.clock import SystemClock
from forescale.core.cluster import Device
from forescale.core.errors import ForescaleError
from forescale.engine.local import LocalBackend
from forescale.engine.serve.app import App
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.exchange import Listener
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.link import ReplicaLink
from forescale.engine.serve.logs import log_to, trim
from forescale.engine.serve.middleware import Middleware, wrapped
from forescale.engine.serve.plane import Plane
from forescale.engine.serve.proxy import Proxy
from forescale.engine.serve.readers import ReaderBeginning, Readers
from forescale.engine.serve.roster import CrewRules
from forescale.engine.serve.run_folder import hold
from forescale.engine.serve.server import Server, listen_at
from forescale.profile.cores import cpu_shares

_NVIDIA_DRIVER = Path("/proc/driver/nvidia")
_TRIM_S = 10.0
_KEPT_BYTES = (
    300_000_000  # controller, gateway, and what is in memory once for all replicas: measured, 250 MB
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What a data plane is started with.

    Attributes:
        run: folder of the sockets ``control``, ``replicas`` and ``api``, which is the controller's.
        log: file for what it has to say.
        replica_logs: folder for what replicas have to say.
        http, control: descriptors that listen; with more than one gateway, ``http`` keeps the port for them.
        gateways: processes that read requests; 1: this one does.
        host, port: where requests are answered.
        devices: how many; None: all.
        factories: names of Python functions that may make models.
        import_path: where their modules are found.
        middleware: what stands before the gateway.
    """

    run: Path
    log: Path
    replica_logs: Path
    http: int
    control: int
    gateways: int
    host: str
    port: int
    devices: int | None
    factories: tuple[str, ...]
    import_path: tuple[str, ...]
    middleware: Middleware


BEGINNING = TypeAdapter(Beginning)


def main() -> None:
    """Serve until asked to end, or until there was no controller for too long."""
    beginning = BEGINNING.validate_json(sys.argv[1])
    sys.path[:] = beginning.import_path
    log_to(beginning.log)
    hold(beginning.run)  # to the end
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(beginning))
    except ForescaleError as error:
        raise SystemExit(f"error: {error}") from error


async def _serve(beginning: Beginning) -> None:
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        link = ReplicaLink(beginning.run / "replicas")
        gateway = Gateway(link, clock=clock)
        backend = LocalBackend(invitation=link.invitation, log_dir=beginning.replica_logs)
        stack.enter_context(backend)
        rules = CrewRules(factories=beginning.factories)
        devices = await _devices(beginning.devices)
        crew = Crew(backend, lambda to, said: link.send(to, said.to_header()), devices, rules, link.ended)
        plane = Plane(crew=crew, gateway=gateway, link=link, clock=clock)
        lease = _Lease(plane)
        listener = Listener(plane, on_away=lambda: lease.run(listener.lease_s), on_back=lease.stop)
        lease.run(listener.lease_s)
        app = App(gateway, api=Proxy(beginning.run / "api"))
        http = socket.socket(fileno=beginning.http)
        alone = beginning.gateways == 1
        if alone:
            app = await stack.enter_async_context(wrapped(app, beginning.middleware, clock))
        server = Server(app, http if alone else listen_at(beginning.run / "http"))
        await link.open()
        stack.callback(link.close)
        stack.callback(gateway.close)
        tasks = asyncio.create_task(plane.run()), asyncio.create_task(_trim(beginning.replica_logs, crew))
        for task in tasks:
            stack.push_async_callback(_cancel, task)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, plane.ending.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, plane.ending.set)
        async with (
            server,
            contextlib.nullcontext() if alone else _readers(gateway, beginning),
            listener.listening(socket.socket(fileno=beginning.control)),
        ):
            ending = asyncio.create_task(plane.ending.wait())
            await asyncio.wait((*tasks, ending), return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    if lease.running:  # nobody else will
        shutil.rmtree(beginning.run, ignore_errors=True)


def _readers(gateway: Gateway, beginning: Beginning) -> AbstractAsyncContextManager[None]:
    told = ReaderBeginning(
        run=beginning.run,
        log=beginning.log,
        host=beginning.host,
        port=beginning.port,
        middleware=beginning.middleware,
    )
    return Readers(gateway).serving(beginning.gateways, told)


class _Lease:
    """How long the data plane goes on without a controller."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._timer is not None

    def run(self, lease_s: float) -> None:
        structlog.get_logger().info("controller_away", lease_s=lease_s)
        self.stop()
        self._timer = self._loop.call_later(lease_s, self._plane.ending.set)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _trim(folder: Path, crew: Crew) -> None:
    while True:
        await asyncio.to_thread(trim, folder, crew.processes())
        await asyncio.sleep(_TRIM_S)


async def _devices(number: int | None) -> tuple[Device, ...]:
    """This machine's devices. If there may be GPUs, a process of its own imports torch to find them."""
    if not _NVIDIA_DRIVER.exists():
        return cpu_shares(number, _KEPT_BYTES)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        return await asyncio.get_running_loop().run_in_executor(other, _find_devices, number)


def _find_devices(number: int | None) -> tuple[Device, ...]:
    from forescale.profile.devices import find_cluster  # noqa: PLC0415 - it imports torch

    return find_cluster(number).devices


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
