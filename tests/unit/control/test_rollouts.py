"""Rollouts under load, with controllers that are killed wherever they could be; processes are played."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fake_replicas import DOUBLING
from forescale.control.pool import Pool
from forescale.core.clock import SystemClock
from forescale.core.errors import RequestFailed
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.messages import Load
from forescale.engine.serve.orders import Serve, StartReplica, Withdraw
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry
from forescale.registry.rollout import Rollout, RolloutSpec, State, Strategy
from forescale.registry.rollouts import Rollouts as Kept
from played_plane import REQUEST, Nearby, PlayedProcesses, played_plane


class Killed(Exception):
    """The controller is gone."""


class Deadly(Kept):
    """Kills who writes a rollout for the first time, before or after; kills counts how often it did."""

    def __init__(self, kept: Kept, moment: str) -> None:
        super().__init__(kept._database, kept._clock)
        self.moment = moment
        self.kills = 0
        self._seen = set[tuple[State, int, int, bool, bool]]()

    def write(self, rollout: Rollout, *, by: str = "forescale") -> Rollout | None:
        progress = rollout.progress
        is_open = progress.opened_s is not None
        place = (rollout.state, progress.stage, progress.routed, is_open, progress.is_checked)
        first = place not in self._seen
        self._seen.add(place)
        if first and self.moment == "before":
            self.kills += 1
            raise Killed
        kept = super().write(rollout, by=by)
        if first and self.moment == "after":
            self.kills += 1
            raise Killed
        return kept


class World:
    """A data plane that lives on, and a controller that is started again whenever it is killed."""

    def __init__(
        self, registry: Registry, plane: Nearby, gateway: Gateway, processes: PlayedProcesses
    ) -> None:
        self.registry = registry
        self.plane = plane
        self.gateway = gateway
        self.processes = processes
        self.checks: dict[str, str] = {}
        self.pool: Pool | None = None
        self.answers = Counter[str]()

    async def control(self) -> None:
        while True:
            self.pool = Pool(
                registry=self.registry, plane=self.plane, clock=SystemClock(), checks=self.checks
            )
            try:
                await self.pool.run()
            except* Killed:
                pass

    async def ask(self) -> None:
        while True:
            try:
                await self.gateway.infer("digits", None, REQUEST)
            except RequestFailed as error:
                self.answers[str(error)] += 1
            else:
                self.answers["ok"] += 1
            await asyncio.sleep(0)

    def spec(self, strategy: Strategy, *shares: float, **more: Any) -> RolloutSpec:
        quick: dict[str, Any] = {"stage_s": 0.0, "proof_s": 0.0, "min_requests": 20, "patience_s": 20.0}
        quick |= {"max_slowdown": 1000.0}  # this machine's pauses are not the model's
        return RolloutSpec(
            model="digits", number=2, stable=1, strategy=strategy, shares=shares, **{**quick, **more}
        )

    def start(self, spec: RolloutSpec) -> None:
        self.registry.rollouts.start(spec, by="ada")
        self.look_again()

    def look_again(self) -> None:
        assert self.pool is not None
        self.pool.look_again()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not is_so():
                assert self.pool is not None
                await self.pool.wait_for_change(0.02)

    async def ended(self) -> Rollout:
        await self.until(lambda: self.latest().state is not State.RUNNING)
        deployed = self.deployed()
        await self.until(lambda: self.loads() == [f"digits@{deployed}"])
        return self.latest()

    def latest(self) -> Rollout:
        found = self.registry.rollouts.latest("digits")
        assert found is not None
        return found

    def deployed(self) -> int:
        (deployment,) = self.registry.deployments()
        return deployment.spec.number

    def loads(self) -> list[str]:
        return sorted(f"{load.model}@{load.version}" for load in self.processes.held())


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(
        f"sqlite:///{tmp_path}/registry.db", ArtifactStore(str(tmp_path / "store")), SystemClock()
    )
    (tmp_path / "file").write_bytes(b"weights")
    for _ in range(2):
        registry.add_version("digits", tmp_path / "file", format="pt2", signature=DOUBLING, created_by="ada")
    registry.deploy(DeploymentSpec(model="digits", number=1), by="ada")
    return registry


@asynccontextmanager
async def world_of(registry: Registry, checks: dict[str, str] | None = None) -> AsyncGenerator[World]:
    async with played_plane() as (plane, gateway, processes):
        world = World(registry, plane, gateway, processes)
        world.checks = checks or {}
        tasks = [asyncio.create_task(world.control())]
        await asyncio.sleep(0)
        await world.until(lambda: world.loads() == ["digits@1"])
        tasks.append(asyncio.create_task(world.ask()))
        try:
            yield world
        finally:
            for task in reversed(tasks):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            registry.close()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("strategy", "shares", "kills"),
    [(Strategy.CANARY, (0.2, 0.5), 9), (Strategy.SHADOW, (0.5,), 6), (Strategy.BLUE_GREEN, (0.0,), 6)],
)
def test_a_good_version_is_promoted_though_the_controller_is_killed_at_every_step(
    registry: Registry, strategy: Strategy, shares: tuple[float, ...], kills: int, moment: str
) -> None:
    async def scenario() -> None:
        deadly = registry.rollouts = Deadly(registry.rollouts, moment)
        async with world_of(registry, {"quality": f"{sys.executable} -c 0"}) as world:
            world.start(world.spec(strategy, *shares, check="quality"))
            rollout = await world.ended()
            assert (rollout.state, rollout.progress.stage) == (State.PROMOTED, len(shares))
            assert world.deployed() == 2
            assert set(world.answers) == {"ok"}
            assert deadly.kills == kills

    asyncio.run(scenario())


def test_a_rollout_goes_on_though_everything_is_killed_at_every_step(registry: Registry) -> None:
    async def scenario() -> None:
        deadly = registry.rollouts = Deadly(registry.rollouts, "after")
        lives = 0
        while (found := registry.rollouts.latest("digits")) is None or found.state is State.RUNNING:
            lives += 1
            async with played_plane() as life:
                world = World(registry, *life)
                asking = asyncio.create_task(world.ask())
                world.pool = Pool(registry=registry, plane=world.plane, clock=SystemClock())
                if found is None:
                    world.start(world.spec(Strategy.CANARY, 0.2, 0.5))
                with contextlib.suppress(ExceptionGroup):
                    async with asyncio.timeout(20):
                        await world.pool.run()
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
        assert found.state is State.PROMOTED
        assert lives == deadly.kills
        registry.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_bad_version_is_taken_back_though_the_controller_is_killed_at_every_step(
    registry: Registry, moment: str
) -> None:
    async def scenario() -> None:
        deadly = registry.rollouts = Deadly(registry.rollouts, moment)
        async with world_of(registry) as world:
            world.processes.faulty.add("2")
            world.start(world.spec(Strategy.CANARY, 0.2, 0.5))
            rollout = await world.ended()
            assert (rollout.state, rollout.progress.stage) == (State.ROLLED_BACK, 0)
            assert "requests to the new version got no answer" in rollout.progress.reason
            assert world.deployed() == 1
            assert deadly.kills == 2

    asyncio.run(scenario())


def test_a_bad_shadow_is_taken_back_and_nobody_has_noticed(registry: Registry) -> None:
    async def scenario() -> None:
        async with world_of(registry) as world:
            world.processes.faulty.add("2")
            world.start(world.spec(Strategy.SHADOW, 1.0))
            rollout = await world.ended()
            assert (rollout.state, rollout.progress.stage) == (State.ROLLED_BACK, 0)
            assert set(world.answers) == {"ok"}

    asyncio.run(scenario())


def test_a_version_whose_check_fails_is_taken_back_before_it_got_a_request(registry: Registry) -> None:
    async def scenario() -> None:
        says = "import os; print(os.environ['FORESCALE_VERSION'], 'is wrong'); exit(3)"
        async with world_of(registry, {"quality": f'{sys.executable} -c "{says}"'}) as world:
            world.start(world.spec(Strategy.BLUE_GREEN, 0.0, check="quality"))
            rollout = await world.ended()
            assert rollout.state is State.ROLLED_BACK
            assert rollout.progress.reason == "check quality failed: 2 is wrong"
            assert rollout.progress.stage == 0
            assert set(world.answers) == {"ok"}

    asyncio.run(scenario())


def test_a_check_that_takes_long_is_run_once(registry: Registry, tmp_path: Path) -> None:
    async def scenario() -> None:
        runs, may_end = tmp_path / "runs", tmp_path / "may_end"
        check = tmp_path / "check.py"
        check.write_text(
            "import pathlib, sys, time\n"
            "with open(sys.argv[1], 'a') as file:\n"
            "    file.write('x')\n"
            "while not pathlib.Path(sys.argv[2]).exists():\n"
            "    time.sleep(0.01)\n",
            encoding="utf-8",
        )
        command = f"{sys.executable} {check} {runs} {may_end}"
        async with world_of(registry, {"quality": command}) as world:
            world.start(world.spec(Strategy.BLUE_GREEN, 0.0, check="quality"))
            await world.until(runs.exists)
            looked = len(world.plane.acknowledged)
            await world.until(lambda: len(world.plane.acknowledged) > looked + 2)
            assert runs.read_text() == "x"
            may_end.touch()
            assert (await world.ended()).state is State.PROMOTED
            assert runs.read_text() == "xx"

    asyncio.run(scenario())


def test_a_check_that_the_server_has_forgotten_lets_no_version_pass(registry: Registry) -> None:
    async def scenario() -> None:
        async with world_of(registry) as world:
            world.start(world.spec(Strategy.CANARY, 0.5, check="quality"))
            rollout = await world.ended()
            assert rollout.state is State.ROLLED_BACK
            assert "does not know it" in rollout.progress.reason

    asyncio.run(scenario())


def test_rolling_back_loses_no_request_while_a_rollout_runs_and_after_it(registry: Registry) -> None:
    async def scenario() -> None:
        async with world_of(registry) as world:
            for _ in range(2):
                world.start(world.spec(Strategy.CANARY, 0.5, proof_s=19.0))
                await world.until(lambda: world.latest().progress.routed == 1)
                assert world.registry.rollouts.roll_back("digits", by="bob") == 1
                world.look_again()
                assert (await world.ended()).state is State.ROLLED_BACK
            world.start(world.spec(Strategy.BLUE_GREEN, 0.0))
            assert (await world.ended()).state is State.PROMOTED
            assert world.registry.rollouts.roll_back("digits", by="bob") == 1
            world.look_again()
            await world.until(lambda: world.loads() == ["digits@1"])
            assert set(world.answers) == {"ok"}

    asyncio.run(scenario())


def test_what_was_asked_of_a_version_that_sleeps_is_answered_though_another_takes_over() -> None:
    async def scenario() -> None:
        async with played_plane() as (plane, gateway, processes), asyncio.timeout(10):
            loads = [
                Load(model="digits", version=number, format="pt2", path="", signature=DOUBLING)
                for number in "12"
            ]
            await plane.exchange([Serve(load=loads[0])])
            asked = asyncio.create_task(gateway.infer("digits", None, REQUEST))
            named = asyncio.create_task(gateway.infer("digits", "1", REQUEST))
            await asyncio.sleep(0)
            start = StartReplica(model="digits", version="2", device="cpu0")
            await plane.exchange([Serve(load=loads[1]), start, Withdraw(model="digits", version="1")])
            await asyncio.gather(asked, named)
            while processes.living and gateway.versions("digits") != ("2",):
                await asyncio.sleep(0)
            assert await gateway.infer("digits", None, REQUEST)

    asyncio.run(scenario())
