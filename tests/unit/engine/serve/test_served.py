from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from fake_replicas import DOUBLING, FakeLink, SteadyClock, request, settle
from forescale.core.errors import BadRequest, ForescaleError, ModelFailed, NotServed, TooBusy
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.queues import QueuePolicy
from forescale.engine.serve.routing import Route
from forescale.engine.serve.served import LEAD_S, ServedModel


class Bench:
    """A gateway that serves one model, with replicas and a clock in the test's hands."""

    def __init__(self, signature: Signature = DOUBLING, **policy: Any) -> None:
        self.link = FakeLink()
        self.clock = SteadyClock()
        self.gateway = Gateway(self.link, clock=self.clock)
        self.served: ServedModel = self.gateway.serve("m", "1", signature, QueuePolicy(**policy))

    def ask(self, *values: float, **changed: Any) -> asyncio.Task[list]:
        async def answer() -> list:
            outputs = await self.gateway.infer("m", None, request(*values, **changed))
            return outputs["y"].tolist()

        return asyncio.ensure_future(answer())

    def learn(self, *, row_s: float = 1.0, replica: str = "r0") -> None:
        """Let the gateway know how long a replica takes."""
        for rows in (1, 2, 3) * 5:
            self.served.replicas[replica].service.observe(rows, rows * row_s)
        self.served.replicas[replica].observed_s = self.clock.now_s


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def error_of(task: asyncio.Task) -> Exception:
    with pytest.raises(ForescaleError) as raised:
        await task
    return raised.value


def test_a_request_is_answered() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join()
        answer = bench.ask(1, 5)
        await settle()
        bench.link.answer()
        assert await answer == [[2, 10]]
        assert bench.served.metrics.outcomes["ok"] == 1

    run(test)


def test_requests_that_come_together_share_a_batch_and_get_their_own_rows() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join()
        answers = [bench.ask(n, 0, rows=n) for n in (1, 2, 3)]
        await settle()
        assert bench.link.batch_rows == [6]
        bench.link.answer()
        assert await asyncio.gather(*answers) == [[[2 * n, 0]] * n for n in (1, 2, 3)]

    run(test)


def test_a_busy_replica_gets_the_next_batch_only_when_it_is_nearly_done() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join()
        bench.learn(row_s=1.0)
        first = bench.ask()
        await settle()
        later = [bench.ask(), bench.ask()]
        await settle()
        assert bench.link.batch_rows == [1]
        bench.clock.now_s += 1.0 - LEAD_S / 2
        later.append(bench.ask())
        await settle()
        assert bench.link.batch_rows == [1, 3]
        bench.link.answer()
        bench.link.answer()
        await asyncio.gather(first, *later)

    run(test)


def test_credits_are_never_exceeded() -> None:
    async def test() -> None:
        bench = Bench(max_rows=1)
        bench.link.join(room=2)
        answers = [bench.ask(n, n) for n in range(10)]
        for n in range(10):
            await settle()
            assert 1 <= len(bench.link.runs["r0"]) <= 2
            bench.link.answer()
            assert await answers[n] == [[2 * n, 2 * n]]

    run(test)


def test_requests_wait_for_the_first_replica() -> None:
    async def test() -> None:
        bench = Bench()
        assert not bench.served.is_ready
        answer = bench.ask()
        await settle()
        bench.link.join()
        assert bench.served.is_ready
        await settle()
        bench.link.answer()
        await answer

    run(test)


def test_what_a_lost_replica_had_is_answered_by_another() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join("r0")
        answers = [bench.ask(n, n) for n in range(3)]
        await settle()
        bench.link.vanish("r0")
        bench.gateway.lose("r0")
        bench.gateway.lose("r0")
        bench.link.join("r1")
        for _ in answers:  # alone, because one of them may have been the cause
            await settle()
            bench.link.answer("r1")
        assert await asyncio.gather(*answers) == [[[2 * n, 2 * n]] for n in range(3)]
        assert bench.link.batch_rows == [3, 1, 1, 1]

    run(test)


def test_a_batch_that_had_not_begun_is_not_suspected() -> None:
    async def test() -> None:
        bench = Bench(max_rows=2)
        bench.link.join("r0")
        answers = [bench.ask(n, n) for n in range(4)]
        await settle()
        assert bench.link.batch_rows == [2, 2]
        bench.gateway.lose("r0")
        bench.link.join("r1", room=4)
        await settle()
        assert sorted(bench.link.batch_rows[2:]) == [1, 1, 2]
        for _ in range(3):
            bench.link.answer("r1")
        await asyncio.gather(*answers)

    run(test)


def test_a_request_that_kills_replicas_fails_alone() -> None:
    async def test() -> None:
        bench = Bench()
        poison, innocent = bench.ask(6, 6, priority=1), bench.ask(1, 1)
        for number in range(3):
            bench.link.join(f"r{number}", room=1)
            await settle()
            (_, inputs) = bench.link.runs[f"r{number}"][0]
            assert 6 in inputs["x"]
            bench.gateway.lose(f"r{number}")
        assert isinstance(await error_of(poison), ModelFailed)
        bench.link.join("r9")
        await settle()
        bench.link.answer("r9")
        assert await innocent == [[2, 2]]

    run(test)


def test_a_replica_that_is_not_connected_any_more_gets_nothing() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join("r0")
        bench.link.vanish("r0")
        answer = bench.ask()
        await settle()
        assert not bench.served.is_ready
        bench.gateway.lose("r0")
        bench.link.join("r1")
        await settle()
        bench.link.answer("r1")
        await answer

    run(test)


def test_one_request_the_model_cannot_take_does_not_fail_its_batch() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join()
        good, bad = bench.ask(1, 1), bench.ask(9, 9)
        await settle()
        bench.link.fail(error="index out of range")
        await settle()
        bench.link.answer()
        bench.link.fail(error="index out of range", failure="input")
        assert await good == [[2, 2]]
        error = await error_of(bad)
        assert isinstance(error, BadRequest)
        assert "index out of range" in str(error)

    run(test)


def test_a_model_that_raises_is_the_models_fault() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join()
        answer = bench.ask()
        await settle()
        bench.link.fail(error="ZeroDivisionError")
        error = await error_of(answer)
        assert isinstance(error, ModelFailed)
        assert bench.served.metrics.outcomes["failed"] == 1

    run(test)


@pytest.mark.parametrize(
    "outputs",
    [
        {"z": np.zeros((2, 2), np.float32)},
        {"y": np.zeros((3, 2), np.float32)},
        {"y": np.zeros((), np.float32)},
    ],
    ids=str,
)
def test_outputs_that_belong_to_no_request_are_not_handed_out(outputs: dict) -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join()
        answers = [bench.ask(), bench.ask()]
        await settle()
        bench.link.answer(outputs=outputs)
        for answer in answers:
            assert "returned what it should not" in str(await error_of(answer))
        again = bench.ask()
        await settle()
        bench.link.answer()
        await again

    run(test)


def test_a_request_that_waits_in_vain_is_refused_at_its_deadline() -> None:
    async def test() -> None:
        bench = Bench()
        answer = bench.ask(timeout_s=0.001)
        await settle()
        bench.clock.now_s += 0.002
        assert isinstance(await error_of(answer), TooBusy)
        assert bench.served.metrics.outcomes["refused"] == 1

    run(test)


def test_a_request_that_a_replica_keeps_too_long_is_refused() -> None:
    async def test() -> None:
        bench = Bench(timeout_s=5.0)
        bench.link.join()
        answer = bench.ask()
        await settle()
        bench.clock.now_s += 6
        assert isinstance(await error_of(answer), TooBusy)
        bench.link.answer()  # comes too late, and harms nobody
        await settle()
        assert bench.served.gauges().in_flight == 0

    run(test)


def test_a_request_that_cannot_make_it_is_refused_at_once() -> None:
    async def test() -> None:
        bench = Bench(max_rows=4)
        bench.link.join()
        bench.learn(row_s=1.0)
        running = bench.ask(rows=4)
        await settle()
        waiting = [bench.ask(rows=4) for _ in range(2)]
        await settle()
        error = await error_of(bench.ask(timeout_s=8.0))
        assert isinstance(error, TooBusy)
        assert 7 < error.retry_after_s < 9
        urgent = bench.ask(timeout_s=8.0, priority=1)
        await settle()
        assert not urgent.done()
        for number in range(4):
            bench.clock.now_s += 4 if number < 3 else 1
            await settle()
            bench.link.answer()
        await asyncio.gather(running, urgent, *waiting)

    run(test)


def test_a_prediction_that_refuses_everything_is_tried_again() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join()
        bench.learn(row_s=50.0)
        assert isinstance(await error_of(bench.ask(timeout_s=1.0)), TooBusy)
        bench.clock.now_s += 10
        answer = bench.ask(timeout_s=1.0)
        await settle()
        bench.link.answer()
        await answer

    run(test)


def test_a_full_queue_refuses() -> None:
    async def test() -> None:
        bench = Bench(max_requests=2)
        waiting = [bench.ask(), bench.ask()]
        await settle()
        assert "is full" in str(await error_of(bench.ask()))
        bench.link.join()
        await settle()
        bench.link.answer()
        await asyncio.gather(*waiting)

    run(test)


def test_rows_beyond_a_batch_are_refused() -> None:
    async def test() -> None:
        bench = Bench(max_rows=8)
        assert "at most 8 rows" in str(await error_of(bench.ask(rows=9)))
        bench.link.join(max_rows=4)
        assert "at most 4 rows" in str(await error_of(bench.ask(rows=5)))
        assert bench.served.metrics.outcomes["invalid"] == 2

    run(test)


def test_a_model_of_a_fixed_number_of_rows_takes_one_request_at_a_time() -> None:
    fixed = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(1, 2)),), outputs=DOUBLING.outputs)

    async def test() -> None:
        bench = Bench(fixed)
        bench.link.join()
        answers = [bench.ask(), bench.ask()]
        await settle()
        assert bench.link.batch_rows == [1, 1]
        bench.link.answer()
        bench.link.answer()
        await asyncio.gather(*answers)

    run(test)


def test_a_client_that_went_away_costs_no_replica() -> None:
    async def test() -> None:
        bench = Bench()
        answer = bench.ask()
        await settle()
        answer.cancel()
        await settle()
        bench.link.join()
        await settle()
        assert bench.link.batch_rows == []
        assert bench.served.metrics.outcomes["cancelled"] == 1

    run(test)


def test_a_batch_waits_for_company_when_told_to() -> None:
    async def test() -> None:
        bench = Bench(max_wait_s=0.01, max_rows=2)
        bench.link.join()
        first = bench.ask()
        await settle()
        assert bench.link.batch_rows == []
        second = bench.ask()
        await settle()
        assert bench.link.batch_rows == [2]
        bench.link.answer()
        alone = bench.ask()
        await settle()
        assert bench.link.batch_rows == [2]
        bench.clock.now_s += 0.02
        while len(bench.link.batch_rows) < 2:
            await asyncio.sleep(0)
        bench.link.answer()
        await asyncio.gather(first, second, alone)

    run(test)


def test_a_drained_replica_finishes_and_gets_nothing_more() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join("r0")
        first = bench.ask()
        await settle()
        bench.gateway.drain("r0")
        assert bench.link.drained == ["r0"]
        second = bench.ask()
        await settle()
        assert len(bench.link.runs["r0"]) == 1
        bench.link.answer("r0")
        await first
        bench.link.join("r1")
        await settle()
        bench.link.answer("r1")
        await second

    run(test)


def test_a_retired_version_answers_what_it_has_and_is_unknown_then() -> None:
    async def test() -> None:
        bench = Bench(max_rows=1)
        bench.link.join(room=1)
        answers = [bench.ask(), bench.ask()]
        await settle()
        retirement = asyncio.ensure_future(bench.gateway.retire("m", "1"))
        await settle()
        assert isinstance(await error_of(bench.ask()), NotServed)
        bench.link.answer()
        await settle()
        assert not retirement.done()
        bench.link.answer()
        await asyncio.gather(*answers)
        await retirement
        with pytest.raises(NotServed):
            bench.gateway.find("m")

    run(test)


def test_what_waits_at_a_retired_version_without_replicas_waits_for_one() -> None:
    async def test() -> None:
        bench = Bench()
        answer = bench.ask(1, 5)
        await settle()
        retirement = asyncio.ensure_future(bench.gateway.retire("m", "1"))
        await settle()
        assert not answer.done()
        assert not retirement.done()
        bench.link.join()
        await settle()
        bench.link.answer()
        assert await answer == [[2, 10]]
        await retirement

    run(test)


def test_what_waits_at_a_retired_version_does_not_wait_for_ever() -> None:
    async def test() -> None:
        bench = Bench(timeout_s=0.02)
        answer = bench.ask()
        await settle()
        retirement = asyncio.ensure_future(bench.gateway.retire("m", "1"))
        await settle()
        bench.clock.now_s += 0.03
        assert isinstance(await error_of(answer), TooBusy)
        await retirement

    run(test)


def test_a_closed_gateway_refuses_everything() -> None:
    async def test() -> None:
        bench = Bench(max_rows=1)
        bench.link.join(room=1)
        answers = [bench.ask(), bench.ask()]
        await settle()
        bench.gateway.close()
        for answer in answers:
            assert isinstance(await error_of(answer), NotServed)

    run(test)


def test_versions_are_found_by_name_and_by_default() -> None:
    async def test() -> None:
        gateway = Gateway(FakeLink(), clock=SteadyClock())
        first, second = (gateway.serve("m", version, DOUBLING) for version in "12")
        assert gateway.find("m") is first
        assert gateway.find("m", "2") is second
        gateway.set_route("m", Route(version="2"))
        assert gateway.find("m") is second
        assert gateway.versions("m") == ("1", "2")
        with pytest.raises(NotServed, match="version 1, 2, not '3'"):
            gateway.find("m", "3")
        with pytest.raises(NotServed, match="no model 'x'"):
            gateway.find("x")
        with pytest.raises(ValueError, match="already"):
            gateway.serve("m", "1", DOUBLING)
        await gateway.retire("m", "2")
        assert gateway.find("m") is first

    run(test)


def test_a_replica_of_a_version_that_is_not_served_is_left_alone() -> None:
    async def test() -> None:
        bench = Bench()
        bench.link.join("r0", version="7")
        bench.link.join("r1", model="x")
        assert not bench.served.is_ready

    run(test)


def test_every_request_is_answered_once_whatever_replicas_do() -> None:
    async def test() -> None:
        bench = Bench(max_rows=4)
        rng = np.random.default_rng(7)
        replicas, alive = 0, list[str]()
        answers = [bench.ask(n, n) for n in range(300)]
        while not all(answer.done() for answer in answers):
            await settle()
            if len(alive) < 3:
                alive.append(f"r{(replicas := replicas + 1)}")
                bench.link.join(alive[-1], room=int(rng.integers(1, 3)))
            at = alive[int(rng.integers(len(alive)))]
            waiting = bench.link.runs[at]
            match int(rng.integers(8)):
                case 0 if not waiting or len(waiting[0][1]["x"]) > 1:
                    bench.gateway.lose(at)
                    alive.remove(at)
                case 1 if waiting and len(waiting[0][1]["x"]) > 1:
                    bench.link.fail(at)
                case _ if waiting:
                    bench.link.answer(at)
                case _:
                    pass
            bench.clock.now_s += 0.001
        assert [await answer for answer in answers] == [[[2 * n, 2 * n]] for n in range(300)]
        assert max(bench.link.batch_rows) == 4
        assert bench.served.gauges().in_flight == bench.served.gauges().waiting == 0

    run(test)
