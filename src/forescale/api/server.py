"""``forescale serve``: gateway, management, controller and replicas of one machine, in one call."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import uvloop

from forescale.api.management import management
from forescale.control.pool import Pool
from forescale.core.clock import SystemClock
from forescale.core.cluster import Device
from forescale.core.errors import InvalidInput
from forescale.engine.channel import ChannelServer
from forescale.engine.local import LocalBackend
from forescale.engine.serve.app import App
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.link import ReplicaLink
from forescale.engine.serve.roster import CrewRules
from forescale.engine.serve.server import Server
from forescale.profile.cores import cpu_shares
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.registry import Registry

_NVIDIA_DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """What to serve where.

    Attributes:
        state: folder that holds everything that must survive a restart, and the replicas' logs.
        devices: how many; None: all.
        trust: whether code in models' files may run.
        factories: names of Python functions, ``package.module:function``, that may make models.
        database: URL; None: SQLite in ``state``.
        artifacts: URL of the artifact store; None: a folder in ``state``.
    """

    state: Path
    host: str = "127.0.0.1"
    port: int = 8080
    devices: int | None = None
    trust: bool = False
    factories: tuple[str, ...] = ()
    database: str | None = None
    artifacts: str | None = None


def serve(plan: ServerPlan, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests under way; a second signal ends them.

    Args:
        on_ready: called with the server's URL when it takes requests.

    Raises:
        InvalidInput: the folder or the port is taken or cannot be used.
        RegistryFailed: the registry cannot be opened.
    """
    with _own(plan.state), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(plan, on_ready))


async def _serve(plan: ServerPlan, on_ready: Callable[[str], None]) -> None:
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        store = ArtifactStore(plan.artifacts or str(plan.state / "artifacts"), cache=plan.state / "artifacts")
        store.sweep()
        registry = Registry(plan.database or f"sqlite:///{plan.state / 'registry.db'}", store, clock)
        stack.callback(registry.close)
        channel = stack.enter_context(ChannelServer())
        link = ReplicaLink(channel)
        gateway = Gateway(link, clock=clock)
        log_dir = plan.state / "replicas"
        backend = stack.enter_context(LocalBackend(invitation=channel.invitation, log_dir=log_dir))
        devices = await _devices(plan.devices)
        rules = CrewRules(factories=plan.factories)
        crew = Crew(backend, lambda process, message: link.send(process, message.to_header()), devices, rules)
        pool = Pool(registry=registry, crew=crew, gateway=gateway, link=link, clock=clock, trust=plan.trust)
        api = management(registry, pool, _incoming(plan.state))
        server = Server(App(gateway, api=api), host=plan.host, port=plan.port)
        link.open()
        stack.callback(link.close)
        stack.callback(gateway.close)
        running = asyncio.create_task(pool.run())
        stack.push_async_callback(_cancel, running)
        ending = _signals()
        async with server:
            host = f"[{plan.host}]" if ":" in plan.host else plan.host
            on_ready(f"http://{host}:{server.port}")
            await asyncio.wait((running, ending), return_when=asyncio.FIRST_COMPLETED)
            pool.stop_waiting()
        if running.done():
            running.result()


@contextlib.contextmanager
def _own(state: Path) -> Generator[None]:
    """The folder is this process's alone, until the end of the block or of the process."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(
            f"cannot keep state in {state}: {error.strerror}; name another folder with --state"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 20, 0).decode(errors="replace") or "?"
            raise InvalidInput(
                f"{state} is in use by another server (process {owner}); name another folder with --state"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def _incoming(state: Path) -> Path:
    """A folder for uploads, without what a crash left there."""
    incoming = state / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    return incoming


async def _devices(number: int | None) -> tuple[Device, ...]:
    """This machine's devices. If there may be GPUs, a process of its own imports torch to find them."""
    if not _NVIDIA_DRIVER.exists():
        return cpu_shares(number)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        return await asyncio.get_running_loop().run_in_executor(other, _find_devices, number)


def _find_devices(number: int | None) -> tuple[Device, ...]:
    from forescale.profile.devices import find_cluster  # noqa: PLC0415 - it imports torch

    return find_cluster(number).devices


def _signals() -> asyncio.Future[None]:
    """Done at the first SIGINT or SIGTERM; the second one ends the process at once."""
    loop = asyncio.get_running_loop()
    ending = loop.create_future()

    def end(number: int) -> None:
        if ending.done():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            ending.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    return ending


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
