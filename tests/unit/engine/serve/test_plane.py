"""What a data plane tells of versions; its processes are played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from fake_replicas import DOUBLING, settle
from forescale.core.errors import TooBusy
from forescale.engine.serve.messages import Beat, Load
from forescale.engine.serve.orders import (
    Command,
    Serve,
    SetThreads,
    StartReplica,
    Steer,
    StopReplica,
    VersionState,
    Withdraw,
)
from forescale.engine.serve.policy import QueuePolicy
from played_plane import REQUEST, Nearby, played_plane

LOAD = Load(model="m", version="1", format="pt2", path="m.pt2", signature=DOUBLING)


class Watched:
    """A data plane, and what it told last of its one version."""

    def __init__(self, plane: Nearby) -> None:
        self._plane = plane
        self.state: VersionState | None = None

    async def look(self, *commands: Command) -> VersionState:
        self.state = (await self._plane.exchange(commands)).versions[0]
        return self.state

    async def is_told_anew(self, *commands: Command) -> bool:
        before = self.state
        return await self.look(*commands) is not before

    async def until(self, is_so: Callable[[VersionState], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_so(await self.look()):
                await asyncio.sleep(0.01)


def test_a_version_is_told_anew_whenever_something_has_happened_to_it() -> None:
    async def scenario() -> None:
        async with played_plane() as (plane, gateway, _):
            watched = Watched(plane)
            await watched.look(Serve(load=LOAD))
            assert not await watched.is_told_anew()
            asked = asyncio.create_task(gateway.infer("m", None, replace(REQUEST, timeout_s=0.05)))
            await settle()
            assert await watched.is_told_anew()
            assert watched.state is not None
            assert (watched.state.waiting, watched.state.arrived_rows) == (1, 2)
            assert not await watched.is_told_anew()
            with contextlib.suppress(TooBusy):
                await asked
            assert (await watched.look()).outcomes["refused"] == 1
            assert watched.state.waiting == 0
            assert not await watched.is_told_anew()
            steer = Steer(model="m", version="1", policy=QueuePolicy(max_rows=7))
            assert (await watched.look(steer)).policy.max_rows == 7
            assert (await watched.look(SetThreads(model="m", version="1", threads=3))).threads == 3
            assert not await watched.is_told_anew()

    asyncio.run(scenario())


def test_a_version_is_told_of_its_replicas_and_of_none_when_they_have_gone() -> None:
    async def scenario() -> None:
        async with played_plane() as (plane, gateway, processes):
            watched = Watched(plane)
            await watched.look(Serve(load=LOAD), StartReplica(model="m", version="1", device="cpu0"))
            await watched.until(lambda state: state.is_ready)
            await gateway.infer("m", None, REQUEST)
            seen = await watched.look()
            assert (seen.outcomes["ok"], seen.batch_times[1]) == (1, ((2.0, 0.001),))
            assert seen.load_s is not None
            (replica,) = (await plane.exchange()).replicas
            assert replica.process is not None
            processes._say(replica.process, Beat(model_bytes={replica.name: 7_000}))
            await watched.until(lambda state: state.model_bytes == 7_000)
            await watched.look(StopReplica(name=replica.name))
            await watched.until(lambda state: not state.is_ready)
            async with asyncio.timeout(10):
                while (await plane.exchange()).replicas:
                    await asyncio.sleep(0.01)
            await watched.look()
            assert not await watched.is_told_anew()

    asyncio.run(scenario())


def test_a_version_that_cannot_be_loaded_shares_no_process_any_more() -> None:
    async def scenario() -> None:
        async with played_plane() as (plane, _gateway, _):
            watched, broken = Watched(plane), replace(LOAD, model="broken")
            assert (await watched.look(Serve(load=broken))).may_share
            await watched.look(StartReplica(model="broken", version="1", device="cpu0", house="shared"))
            await watched.until(lambda state: not state.may_share)

    asyncio.run(scenario())


def test_a_version_that_is_withdrawn_is_told_no_more_and_served_anew_it_is_another() -> None:
    async def scenario() -> None:
        async with played_plane() as (plane, gateway, _):
            watched = Watched(plane)
            old = await watched.look(Serve(load=LOAD))
            seen = await plane.exchange((Withdraw(model="m", version="1"),))
            assert seen.versions == ()
            async with asyncio.timeout(10):
                while gateway.versions("m"):
                    await asyncio.sleep(0.01)
            policy = QueuePolicy(max_rows=7)
            new = await watched.look(Serve(load=LOAD, policy=policy))
            assert (old.policy, new.policy) == (QueuePolicy(), policy)

    asyncio.run(scenario())
