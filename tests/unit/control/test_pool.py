"""The loop that acts, with the real gateway, crew and registry; processes and their channel are played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from fake_replicas import DOUBLING
from forescale.control.pool import Pool
from forescale.core.clock import SystemClock
from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import NotServed
from forescale.engine.backend import ProcessExit, ProcessHandle, ProcessSpec
from forescale.engine.channel import Frame
from forescale.engine.serve.arrays import pack, unpack
from forescale.engine.serve.crew import Crew, CrewRules
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.link import Listener
from forescale.engine.serve.messages import (
    Credit,
    Drain,
    Failed,
    FromReplica,
    Header,
    Hello,
    Load,
    Result,
    Run,
    Warm,
    to_replica,
)
from forescale.engine.serve.orders import Command, Exchange, PlaneState
from forescale.engine.serve.plane import Plane
from forescale.engine.serve.requests import InferRequest, WantedOutput
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec, Happening
from forescale.registry.registry import Registry

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
ROWS = np.ones((2, 2), np.float32)
REQUEST = InferRequest(
    id=None,
    inputs=(ROWS,),
    rows=2,
    size_bytes=ROWS.nbytes,
    free_lengths=(),
    outputs=(WantedOutput(name="y", binary=True),),
)


class PlayedProcesses:
    """Backend and link at once: a process is warm at once, loads at once and doubles its inputs.

    Attributes:
        mute: processes that answer no batch.
    """

    def __init__(self) -> None:
        self.living: dict[str, Load | None] = {}
        self.mute = set[str]()
        self._handles: dict[str, ProcessHandle] = {}
        self._exits: list[ProcessExit] = []
        self._listeners: list[Listener] = []
        self._news, self._wake = os.pipe()

    # what a backend does

    def start(self, spec: ProcessSpec) -> ProcessHandle:
        handle = ProcessHandle(name=spec.address, device=spec.device.name, pid=0)
        self._handles[spec.address] = handle
        self.living[spec.address] = None
        self._say(spec.address, Warm())
        return handle

    def end(self, name: str, cause: str = "killed by SIGKILL") -> None:
        if name in self.living:
            del self.living[name]
            handle = self._handles[name]
            self._exits.append(ProcessExit(handle=handle, code=None, signal=9, cause=cause, log_tail=()))
            os.write(self._wake, b".")

    def kill(self, handle: ProcessHandle) -> None:
        self.end(handle.name)

    def stop(self, handle: ProcessHandle, grace_s: float) -> ProcessExit:
        raise NotImplementedError

    def exits(self) -> tuple[ProcessExit, ...]:
        os.set_blocking(self._news, False)
        with contextlib.suppress(BlockingIOError):
            os.read(self._news, 100)
        exits, self._exits = tuple(self._exits), []
        return exits

    def fileno(self) -> int:
        return self._news

    def close(self) -> None:
        os.close(self._news)
        os.close(self._wake)

    def __enter__(self) -> PlayedProcesses:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # what a link does

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def send(self, replica: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        message = to_replica(header)
        match message:
            case Load(model=model, version=version) if model == "broken":
                self.living[replica] = message
                self._say(replica, Failed(error="no such operator", failure="load"))
                asyncio.get_running_loop().call_soon(self.end, replica)
            case Load(model=model, version=version):
                self.living[replica] = message
                ready = Hello(model=model, version=version, replica=replica, signature=DOUBLING, max_rows=8)
                self._say(replica, ready)
                self._say(replica, Credit(n=2))
            case Run() if replica not in self.mute:
                inputs = unpack(message.inputs, frames)
                tensors, outputs = pack({"y": inputs["x"] * np.float32(2)})
                self._say(replica, Result(batch=message.batch, seconds=0.001, outputs=tensors), *outputs)
            case Run():
                pass
            case Drain():
                asyncio.get_running_loop().call_soon(self.end, replica)

    def _say(self, process: str, message: FromReplica, *frames: memoryview) -> None:
        def tell() -> None:
            for listener in self._listeners:
                listener(process, message, frames)

        asyncio.get_running_loop().call_soon(tell)


class Nearby:
    """A data plane in this process.

    Attributes:
        acknowledged: what each exchange acknowledged.
        deaf: the data plane does not hear that.
    """

    def __init__(self, plane: Plane, *, deaf: bool) -> None:
        self.plane = plane
        self.acknowledged: list[int] = []
        self._deaf = deaf

    async def exchange(
        self, commands: Sequence[Command] = (), *, acknowledged: int = 0, wait_s: float = 0.0
    ) -> PlaneState:
        self.acknowledged.append(acknowledged)
        heard = 0 if self._deaf else acknowledged
        asked = Exchange(commands=tuple(commands), acknowledged=heard, wait_s=wait_s)
        return await self.plane.exchange(asked)

    def answer_now(self) -> None:
        self.plane.answer_now()


class Served:
    """A pool at work."""

    def __init__(
        self,
        pool: Pool,
        running: asyncio.Task[None],
        plane: Nearby,
        gateway: Gateway,
        processes: PlayedProcesses,
        registry: Registry,
    ) -> None:
        self.pool = pool
        self.running = running
        self.plane = plane
        self.gateway = gateway
        self.processes = processes
        self.registry = registry

    def deploy(self, model: str, number: int, replicas: int = 1) -> None:
        spec = DeploymentSpec(model=model, number=number, min_replicas=replicas, max_replicas=replicas)
        self.registry.deploy(spec, by="ada")
        self.pool.look_again()

    def state(self, model: str = "digits") -> str:
        found = next(d for d in self.registry.deployments() if d.spec.model == model)
        return self.pool.status(found)["state"]

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_so():
                await self.pool.wait_for_change(0.05)

    async def answer(self) -> str:
        """Which version answered, and rightly."""
        outputs = await self.gateway.infer("digits", None, REQUEST)
        np.testing.assert_array_equal(outputs["y"], 2 * ROWS)
        return self.gateway.find("digits").version

    def loads(self) -> list[str]:
        return sorted(f"{load.model}@{load.version}" for load in self.processes.living.values() if load)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(
        f"sqlite:///{tmp_path}/registry.db", ArtifactStore(str(tmp_path / "store")), SystemClock()
    )
    (tmp_path / "file").write_bytes(b"weights")
    for model in ("digits", "digits", "broken"):
        registry.add_version(model, tmp_path / "file", format="pt2", signature=DOUBLING, created_by="ada")
    return registry


@asynccontextmanager
async def pool_of(registry: Registry, *, deaf: bool = False) -> AsyncGenerator[Served]:
    with PlayedProcesses() as processes:
        clock = SystemClock()
        gateway = Gateway(processes, clock=clock)
        rules = CrewRules(spares=1, starts=2)
        crew = Crew(processes, lambda to, said: processes.send(to, said.to_header()), [CPU], rules)
        plane = Nearby(Plane(crew=crew, gateway=gateway, link=processes, clock=clock), deaf=deaf)
        pool = Pool(registry=registry, plane=plane, clock=clock)
        tasks = asyncio.create_task(plane.plane.run()), asyncio.create_task(pool.run())
        try:
            yield Served(pool, tasks[1], plane, gateway, processes, registry)
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            registry.close()


def test_a_deployment_is_served_replaced_and_ended(registry: Registry) -> None:
    async def scenario() -> None:
        async with pool_of(registry) as served:
            served.deploy("digits", 1, replicas=2)
            await served.until(lambda: served.state() == "serving")
            assert (served.loads(), await served.answer()) == (["digits@1"] * 2, "1")
            served.deploy("digits", 2)
            await served.until(lambda: served.state() == "serving" and served.loads() == ["digits@2"])
            assert await served.answer() == "2"
            registry.undeploy("digits", by="ada")
            served.pool.look_again()
            await served.until(lambda: served.loads() == [])
            with pytest.raises(NotServed):
                await served.answer()

    asyncio.run(scenario())


def test_a_model_that_cannot_be_loaded_is_said_to_fail_and_others_serve(registry: Registry) -> None:
    async def scenario() -> None:
        async with pool_of(registry) as served:
            served.deploy("digits", 1)
            served.deploy("broken", 1)
            await served.until(lambda: served.state("broken") == "failing")
            (broken,) = (d for d in registry.deployments() if d.spec.model == "broken")
            assert served.pool.status(broken)["error"] == "no such operator"
            await served.until(lambda: served.state() == "serving")
            assert await served.answer() == "1"

    asyncio.run(scenario())


def test_what_was_written_down_and_not_acknowledged_is_not_written_down_again(registry: Registry) -> None:
    async def scenario() -> None:
        async with pool_of(registry, deaf=True) as served:
            served.deploy("digits", 1)
            await served.until(lambda: served.state() == "serving")
            await served.until(lambda: 1 in served.plane.acknowledged)
            served.running.cancel()
            next_one = Pool(registry=registry, plane=served.plane, clock=SystemClock())
            served.plane.acknowledged.clear()
            running = asyncio.create_task(next_one.run())
            async with asyncio.timeout(10):
                while 1 not in served.plane.acknowledged:
                    await asyncio.sleep(0.01)
            running.cancel()
            kinds = [event.happening.kind for event in registry.events()]
            assert kinds.count("replica_ready") == 1
            assert served.loads() == ["digits@1"]

    asyncio.run(scenario())


class HungRegistry(Registry):
    """Its disk does not answer until it is let go on."""

    may_go_on = threading.Event()

    def record(self, happening: Happening, *, at_s: float | None = None) -> None:
        self.may_go_on.wait(10)


def test_a_lost_replica_is_noticed_while_the_registry_hangs(registry: Registry, tmp_path: Path) -> None:
    hung = HungRegistry(
        f"sqlite:///{tmp_path}/registry.db", ArtifactStore(str(tmp_path / "store")), SystemClock()
    )
    registry.close()

    async def scenario() -> None:
        async with pool_of(hung) as served:
            served.deploy("digits", 1)
            await served.until(lambda: served.state() == "serving")
            (replica,) = (name for name, load in served.processes.living.items() if load)
            served.processes.mute.add(replica)
            answer = asyncio.create_task(served.answer())
            await asyncio.sleep(0)
            served.processes.end(replica)
            async with asyncio.timeout(5):
                assert await answer == "1"
            hung.may_go_on.set()

    asyncio.run(scenario())
