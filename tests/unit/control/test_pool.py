"""The loop that acts, with the real gateway, crew and registry; processes and their channel are played."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_replicas import DOUBLING
from forescale.control.pool import Pool
from forescale.core.clock import SystemClock
from forescale.core.errors import NoRoom, NotServed
from forescale.engine.serve.gateway import Gateway
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec, Happening
from forescale.registry.registry import Registry
from played_plane import REQUEST, ROWS, Nearby, PlayedProcesses, played_plane


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

    def change(self, **queueing: float) -> None:
        """Deploy digits once more, with other rules for its queue."""
        self.registry.deploy(DeploymentSpec(model="digits", number=1, **queueing), by="ada")  # pyright: ignore[reportArgumentType]
        self.pool.look_again()

    def status(self, model: str = "digits") -> dict[str, Any]:
        found = next(d for d in self.registry.deployments() if d.spec.model == model)
        return self.pool.status(found)

    def state(self, model: str = "digits") -> str:
        return self.status(model)["state"]

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
        return sorted(f"{load.model}@{load.version}" for load in self.processes.held())


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
async def pool_of(registry: Registry, *, deaf: bool = False, memory_bytes: int = 0) -> AsyncGenerator[Served]:
    async with played_plane(deaf=deaf, memory_bytes=memory_bytes) as (plane, gateway, processes):
        pool = Pool(registry=registry, plane=plane, clock=SystemClock())
        running = asyncio.create_task(pool.run())
        try:
            yield Served(pool, running, plane, gateway, processes, registry)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            registry.close()


def test_rules_of_a_queue_hold_while_it_is_served(registry: Registry) -> None:
    async def scenario() -> None:
        async with pool_of(registry) as served:
            served.change(timeout_s=5.0)
            await served.until(lambda: served.state() == "serving")
            digits = served.gateway.find("digits")
            await served.until(lambda: digits.policy.timeout_s == 5.0)
            served.change(max_batch=128)
            await served.until(lambda: digits.policy.timeout_s == 30.0)
            assert digits.policy.max_rows == 128
            served.change(max_threads=2)
            await served.until(lambda: [each["threads"] for each in served.status()["replicas"]] == [2])
            assert set(served.processes.threads.values()) == {2}
            assert served.gateway.find("digits") is digits
            assert served.loads() == ["digits@1"]

    asyncio.run(scenario())


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
            (process,) = (name for name, held in served.processes.living.items() if held)
            served.processes.mute.add(process)
            answer = asyncio.create_task(served.answer())
            await asyncio.sleep(0)
            served.processes.end(process)
            async with asyncio.timeout(5):
                assert await answer == "1"
            hung.may_go_on.set()

    asyncio.run(scenario())


def test_a_deployment_that_can_never_fit_is_refused_and_one_that_must_wait_says_so(
    registry: Registry,
) -> None:
    async def scenario() -> None:
        # 250 MB each for processes, one of which is a spare, and 64 MB guessed for each model: room for two.
        async with pool_of(registry, memory_bytes=900_000_000) as served:
            served.deploy("digits", 1, replicas=2)
            await served.until(lambda: served.state() == "serving")
            with pytest.raises(NoRoom, match=r"broken@1 does not fit: .* are missing for 1 of 1"):
                await served.pool.check_room(DeploymentSpec(model="broken", number=1))
            more = DeploymentSpec(model="digits", number=1, min_replicas=3, max_replicas=3)
            with pytest.raises(NoRoom, match=r"292 MB are missing for 1 of 3"):
                await served.pool.check_room(more)
            next_one = DeploymentSpec(model="digits", number=2, min_replicas=2, max_replicas=2)
            line = (
                "no room for 2 more of digits@2: a replica takes 314 MB (guessed from its file), and "
                "606 MB are missing on the device that has most left"
            )
            assert await served.pool.check_room(next_one) == line
            served.deploy("digits", 2, replicas=2)
            await served.until(lambda: served.status()["short"] == line)
            assert served.state() == "starting"
            assert (served.loads(), await served.answer()) == (["digits@1"] * 2, "1")
            assert await served.pool.check_room(replace(more, min_replicas=1)) is None

    asyncio.run(scenario())
