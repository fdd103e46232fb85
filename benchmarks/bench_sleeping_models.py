"""What deployed models cost that sleep: CPU time of the controller and of the data plane, beside none at all.

python benchmarks/bench_sleeping_models.py [--models 1000] [--seconds 10] [--out FILE.md]

Both run in one process, each in a thread of its own, with the real registry and the real socket between
them; there are no replicas, and nothing is asked. Only CPU time is measured: a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvloop
from table import environment, write_table

from forescale.control.knowledge import Knowledge
from forescale.control.pool import Pool
from forescale.core.clock import SystemClock
from forescale.core.cluster import Device, DeviceKind
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.local import LocalBackend
from forescale.engine.serve.crew import Crew, CrewRules
from forescale.engine.serve.exchange import Listener, connect
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.link import ReplicaLink
from forescale.engine.serve.orders import Command, Exchange, PlaneState
from forescale.engine.serve.plane import Plane
from forescale.engine.serve.server import listen_at
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=8 << 30, cores=(0,))
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 8)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, 2)),),
)
SETTLE_S = 3.0  # after the last model is served


class Counted(Plane):
    """It counts its exchanges."""

    exchanges = 0

    async def exchange(self, asked: Exchange) -> PlaneState:
        self.exchanges += 1
        return await super().exchange(asked)


class PlaneThread:
    """A data plane without replicas, in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun = Future[None]()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> PlaneThread:
        self._thread.start()
        self._begun.result()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self.plane.ending.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        clock, link = SystemClock(), ReplicaLink(self._folder / "replicas")
        self.gateway = Gateway(link, clock=clock)
        with LocalBackend(invitation=link.invitation, log_dir=self._folder) as backend:
            crew = Crew(backend, lambda *_: None, [CPU], CrewRules(spares=0))
            self.plane = Counted(crew=crew, gateway=self.gateway, link=link, clock=clock)
            away = asyncio.Event()
            listener = Listener(self.plane, on_away=away.set, on_back=away.clear)
            async with listener.listening(listen_at(self._folder / "control")):
                looking = asyncio.create_task(self.plane.run())
                self._loop = asyncio.get_running_loop()
                self._begun.set_result(None)
                await self.plane.ending.wait()
                await away.wait()
                looking.cancel()
        self.gateway.close()

    def cpu_s(self) -> float:
        async def told() -> float:
            return time.thread_time()

        return asyncio.run_coroutine_threadsafe(told(), self._loop).result()


class Connected:
    """The controller's end of a data plane."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def open(self) -> None:
        self._connection = await connect(self._path)

    async def exchange(
        self, commands: Sequence[Command] = (), *, acknowledged: int = 0, wait_s: float = 0.0
    ) -> PlaneState:
        asked = Exchange(commands=tuple(commands), acknowledged=acknowledged, wait_s=wait_s)
        return await self._connection.exchange(asked)

    def answer_now(self) -> None:
        self._connection.answer_now()

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU seconds of a look, and of one core in each second."""

    controller_s: float
    controller_share: float
    plane_s: float
    plane_share: float


@contextlib.contextmanager
def deployed(folder: Path, models: int) -> Generator[tuple[Registry, Knowledge]]:
    """So many models that may have no replicas, and were served before: so they sleep from the beginning."""
    store, knowledge = ArtifactStore(str(folder / "store")), Knowledge()
    registry = Registry(f"sqlite:///{folder}/registry.db", store, SystemClock())
    (folder / "file").write_bytes(b"weights")
    for number in range(models):
        model = f"m{number}"
        registry.add_version(
            model, folder / "file", format="pt2", signature=SIGNATURE, created_by="benchmark"
        )
        registry.deploy(DeploymentSpec(model=model, number=1, min_replicas=0, max_replicas=1), by="benchmark")
    knowledge.restore(
        {"model": f"m{number}", "version": 1, "load_s": 0.1, "model_bytes": 1_000_000, "batch_times": {}}
        for number in range(models)
    )
    yield registry, knowledge
    registry.close()


async def measure(pool: Pool, plane: PlaneThread, models: int, seconds: float) -> Cost:
    looking = asyncio.create_task(pool.run())
    while len(plane.gateway.routes()) < models:
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_S)
    before = plane.plane.exchanges, time.monotonic(), time.process_time(), plane.cpu_s()
    await asyncio.sleep(seconds)
    after = plane.plane.exchanges, time.monotonic(), time.process_time(), plane.cpu_s()
    looks, elapsed_s, both_s, plane_s = (now - then for now, then in zip(after, before, strict=True))
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    controller_s = both_s - plane_s
    return Cost(
        controller_s=controller_s / looks,
        controller_share=controller_s / elapsed_s,
        plane_s=plane_s / looks,
        plane_share=plane_s / elapsed_s,
    )


def cost_of(models: int, seconds: float) -> Cost:
    async def run(registry: Registry, knowledge: Knowledge, plane: PlaneThread) -> Cost:
        connected = Connected(folder / "control")
        await connected.open()
        pool = Pool(registry=registry, plane=connected, clock=SystemClock(), knowledge=knowledge)
        cost = await measure(pool, plane, models, seconds)
        connected.close()
        return cost

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            deployed(folder, models) as (registry, knowledge),
            PlaneThread(folder) as plane,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(run(registry, knowledge, plane))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "sleeping_models.md")
    asked = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    rows: list[tuple[str, ...]] = []
    for models in (0, asked.models):
        cost = cost_of(models, asked.seconds)
        rows.append(
            (
                f"{models:,}",
                f"{cost.controller_s * 1e3:.2f} ms",
                f"{cost.controller_share:.1%}",
                f"{cost.plane_s * 1e3:.2f} ms",
                f"{cost.plane_share:.2%}",
            )
        )
    header = (
        "models that sleep",
        "controller, CPU per look",
        "of a core",
        "data plane, CPU per exchange",
        "of a core",
    )
    measured_on = environment(seconds=asked.seconds)
    write_table(asked.out, "Models that sleep", measured_on, header, rows)


if __name__ == "__main__":
    main()
