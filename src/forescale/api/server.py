"""``forescale serve``: management and controller of one machine, and the data plane beside them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import uvloop

from forescale.api.auth import TokenCheck
from forescale.api.deployment_requests import NewDeployment
from forescale.api.knowledge_file import kept
from forescale.api.management import management
from forescale.api.pool_file import deploy_wanted
from forescale.control.knowledge import Knowledge
from forescale.control.pool import Pool
from forescale.control.scale import ScalingRules
from forescale.core.clock import SystemClock
from forescale.core.errors import InvalidInput
from forescale.engine.serve.adoption import DataPlane, PlaneOptions
from forescale.engine.serve.server import Server, listen_at
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """What to serve where.

    Attributes:
        state: folder that holds everything that must survive a restart, and logs.
        plane: what the data plane is started with.
        lease_s: how long that goes on by itself if this process is lost and nobody takes its place.
        is_forecast: whether models are scaled ahead of demand, or by what is seen of it alone.
        trust: whether code in models' files may run.
        database: URL; None: SQLite in ``state``.
        artifacts: URL of the artifact store; None: a folder in ``state``.
        checks: commands that rollouts may ask for, by name.
        deployments: what is to be deployed, by model.
        tokens: one of which requests to the management need; none: nobody has to prove anything.
    """

    state: Path
    plane: PlaneOptions = field(default_factory=PlaneOptions)
    lease_s: float = 300.0
    is_forecast: bool = True
    trust: bool = False
    database: str | None = None
    artifacts: str | None = None
    checks: Mapping[str, str] = field(default_factory=dict[str, str])
    deployments: Mapping[str, NewDeployment] = field(default_factory=dict[str, NewDeployment])
    tokens: tuple[str, ...] = ()


def serve(plan: ServerPlan, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests under way; a second signal ends them.

    The data plane is a process of its own. One that an earlier server left, because it was killed, goes on
    as it is and is taken over.

    Args:
        on_ready: called with the server's URL when it takes requests.

    Raises:
        InvalidInput: the folder or the port is taken or cannot be used.
        RegistryFailed: the registry cannot be opened.
        ServerFailed: the data plane does not get on.
    """
    with _own(plan.state), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(plan, on_ready))


async def _serve(plan: ServerPlan, on_ready: Callable[[str], None]) -> None:
    clock = SystemClock()
    plan.plane.middleware.check()
    async with contextlib.AsyncExitStack() as stack:
        store = ArtifactStore(plan.artifacts or str(plan.state / "artifacts"), cache=plan.state / "artifacts")
        store.sweep()
        registry = Registry(plan.database or f"sqlite:///{plan.state / 'registry.db'}", store, clock)
        stack.callback(registry.close)
        for sha256 in registry.collect_artifacts() if plan.artifacts is None else ():
            structlog.get_logger().info("artifact_collected", sha256=sha256)
        deploy_wanted(registry, plan.deployments, plan.state / "deployed.json")
        plane = DataPlane(plan.state, plan.plane, lease_s=plan.lease_s)
        ending = stack.enter_context(_signals(plane))
        knowledge = Knowledge(clock.monotonic_s() - clock.wall_s())
        await stack.enter_async_context(kept(knowledge, plan.state / "knowledge", clock))
        await plane.open()
        pool = Pool(
            registry=registry,
            plane=plane,
            clock=clock,
            trust=plan.trust,
            scaling=ScalingRules() if plan.is_forecast else ScalingRules(level=None),
            checks=plan.checks,
            knowledge=knowledge,
        )
        pool.rollouts.url = plane.url
        routes = management(registry, pool, _incoming(plan.state))
        api = TokenCheck(routes, plan.tokens) if plan.tokens else routes
        async with Server(api, listen_at(plane.run / "api")):
            running = asyncio.create_task(pool.run())
            on_ready(plane.url)
            await asyncio.wait((running, ending), return_when=asyncio.FIRST_COMPLETED)
            pool.stop_waiting()
            if running.done():
                running.result()
            await _cancel(running)
            await pool.finish()
            await plane.end()  # it may still hand requests to the management


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


@contextlib.contextmanager
def _signals(plane: DataPlane) -> Generator[asyncio.Future[None]]:
    """Done at the first SIGINT or SIGTERM; the second one ends everything at once."""
    loop = asyncio.get_running_loop()
    ending = loop.create_future()

    def end(number: int) -> None:
        if ending.done():
            plane.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            ending.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    try:
        yield ending
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)  # uvloop leaves them to others that this process may run


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
