"""A served version is told how its requests are to be queued and put into batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fake_replicas import DOUBLING, FakeLink, SteadyClock, request, settle
from forescale.core.errors import BadRequest, TooBusy
from forescale.engine.serve.balancing import PredictedCompletion, ReplicaLoad
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.served import ServedModel

Test = Callable[[ServedModel, FakeLink], Awaitable[None]]


def run(test: Test, policy: QueuePolicy | None = None) -> None:
    async def bounded() -> None:
        link = FakeLink()
        served = Gateway(link, clock=SteadyClock()).serve("m", "1", DOUBLING, policy)
        async with asyncio.timeout(20):
            await test(served, link)

    asyncio.run(bounded())


def test_batches_are_as_large_as_is_in_time_and_larger_requests_go_alone() -> None:
    async def test(served: ServedModel, link: FakeLink) -> None:
        served.steer(QueuePolicy(batch_rows=4))
        link.join(room=9)
        for replica in served.replicas.values():
            replica.service.observe(1, 0.0)
        asked = [asyncio.ensure_future(served.infer(request(rows=rows))) for rows in (2, 2, 2, 7, 1)]
        await settle()
        while link.runs["r0"]:
            link.answer()
            await settle()
        assert link.batch_rows == [4, 2, 7, 1]
        assert [len((await each)["y"]) for each in asked] == [2, 2, 2, 7, 1]

    run(test)


def test_more_rows_than_a_batch_may_have_are_refused_from_then_on() -> None:
    async def test(served: ServedModel, link: FakeLink) -> None:
        link.join()
        served.steer(QueuePolicy(max_rows=2))
        assert served.max_rows == 2
        with pytest.raises(BadRequest, match="at most 2 rows"):
            await served.infer(request(rows=3))
        served.steer(QueuePolicy(max_rows=64, batch_rows=8))
        assert served.max_rows == 32  # which the replica takes

    run(test)


def test_a_full_queue_is_one_that_the_new_policy_calls_full() -> None:
    async def test(served: ServedModel, link: FakeLink) -> None:
        first = asyncio.ensure_future(served.infer(request()))
        await settle()
        served.steer(QueuePolicy(max_requests=1))
        with pytest.raises(TooBusy, match="is full"):
            await served.infer(request())
        link.join()
        await settle()
        link.answer()
        assert len((await first)["y"]) == 1

    run(test)


def test_a_batch_that_is_full_enough_waits_for_no_more() -> None:
    async def test(served: ServedModel, link: FakeLink) -> None:
        link.join()
        asked = [asyncio.ensure_future(served.infer(request(rows=2))) for _ in range(2)]
        await settle()
        assert link.batch_rows == []
        served.steer(QueuePolicy(max_wait_s=60.0, batch_rows=4))
        await settle()
        assert link.batch_rows == [4]
        link.answer()
        await asyncio.gather(*asked)

    run(test, QueuePolicy(max_wait_s=60.0))


def test_work_is_given_out_in_thought_in_batches_of_that_size() -> None:
    fast, slow = ReplicaLoad("fast", max_rows=32), ReplicaLoad("slow", max_rows=32)
    for replica, row_s in ((fast, 0.01), (slow, 0.03)):
        replica.credits = 1
        for rows in (1, 2, 4) * 5:
            replica.service.observe(rows, rows * row_s)
    fast.send(1, 4, 0.0)
    balancing = PredictedCompletion()
    assert balancing.choose([fast, slow], 16, 0.0, 0.0) is None  # the fast one is done with all of it first
    fast.batch_rows = slow.batch_rows = 4
    assert balancing.choose([fast, slow], 16, 0.0, 0.0) is slow
