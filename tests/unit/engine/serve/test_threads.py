"""Threads of replicas: what the data plane is told reaches processes that are there and that come."""

from __future__ import annotations

import asyncio

import pytest

from fake_replicas import DOUBLING
from forescale.engine.serve.balancing import ReplicaLoad
from forescale.engine.serve.messages import Load
from forescale.engine.serve.metrics import ModelMetrics
from forescale.engine.serve.orders import PlaneState, Serve, SetThreads, StartReplica
from forescale.engine.serve.roster import State
from played_plane import played_plane

DIGITS = Load(model="digits", version="1", format="pt2", path="m.pt2", signature=DOUBLING)
START = StartReplica(model="digits", version="1", device="cpu0")


def set_threads(threads: int | None) -> SetThreads:
    return SetThreads(model="digits", version="1", threads=threads)


def test_replicas_that_are_there_and_that_come_have_the_threads_that_were_set() -> None:
    async def scenario() -> None:
        async with played_plane(cores=4) as (plane, _, processes):

            async def after(*commands: StartReplica | SetThreads) -> PlaneState:
                state = await plane.exchange(commands)
                async with asyncio.timeout(10):
                    while any(each.state is not State.SERVING for each in state.replicas):
                        state = await plane.exchange(wait_s=1.0)
                return state

            await plane.exchange([Serve(load=DIGITS)])
            state = await after(START)
            assert (state.cores, state.versions[0].threads) == ({"cpu0": 4}, None)
            assert [each.threads for each in state.replicas] == [4]
            state = await after(set_threads(2))
            assert state.versions[0].threads == 2
            assert list(processes.threads.values()) == [2]
            state = await after(START, set_threads(3), START)
            assert [each.threads for each in state.replicas] == [3, 3, 3]
            assert {load.threads for load in processes.held()} >= {3}
            state = await after(set_threads(9))
            assert [each.threads for each in state.replicas] == [4, 4, 4]
            assert list(processes.threads.values()) == [4, 4, 4]
            state = await after(set_threads(None))
            assert state.versions[0].threads is None
            # It knows no such version, and says nothing.
            await plane.exchange([SetThreads(model="other", version="1", threads=2)])

    asyncio.run(scenario())


@pytest.mark.parametrize(("form", "is_resizable"), [("pt2", True), ("onnx", False)])
def test_formats_say_whether_threads_can_be_changed(form: str, is_resizable: bool) -> None:
    async def scenario() -> None:
        async with played_plane() as (plane, _, _):
            load = Load(model="m", version="1", format=form, path="m", signature=DOUBLING, threads=2)
            state = await plane.exchange([Serve(load=load)])
            assert (state.versions[0].is_resizable, state.versions[0].threads) == (is_resizable, 2)

    asyncio.run(scenario())


def test_what_batches_take_is_kept_by_threads() -> None:
    metrics = ModelMetrics()
    metrics.note_batch(1, 0.2)
    metrics.note_batch(8, 0.8, 1)
    metrics.note_batch(8, 0.5, 2)
    assert metrics.batch_times() == {1: ((1, 0.2), (8, 0.8)), 2: ((8, 0.5),)}


def test_a_replica_with_other_threads_is_soon_known_anew() -> None:
    load = ReplicaLoad("r", max_rows=8)
    load.credits = 1

    def answer(times: int, seconds: float, threads: int) -> None:
        for number in range(times):
            load.send(number, 4, 0.0)
            load.finish(number, seconds, threads=threads)

    answer(50, 1.0, 1)
    answer(3, 0.25, 4)
    assert load.service.predict_s(4) == pytest.approx(0.25, rel=0.7)
    answer(5, 0.25, 4)
    assert load.service.predict_s(4) == pytest.approx(0.25, rel=0.3)
