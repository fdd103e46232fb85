"""Requests that name no version, while a model has several."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, repeat

import pytest

from fake_replicas import DOUBLING, FakeLink, SteadyClock, request, settle
from forescale.core.errors import NotServed
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.app import App
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.queues import QueuePolicy
from forescale.engine.serve.routing import ROUTE_HEADER, Route

BODY = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}'


class Bench:
    """Two versions of a model with a replica each, ``r1`` and ``r2``; chances come from the test."""

    def __init__(self, chances: Sequence[float] = (), signature: Signature = DOUBLING) -> None:
        draws = chain(chances, repeat(0.5))
        self.link = FakeLink(prompt=True)
        self.clock = SteadyClock()
        self.gateway = Gateway(self.link, clock=self.clock, chance=lambda: next(draws))
        self.gateway.serve("m", "1", DOUBLING)
        self.gateway.serve("m", "2", signature, QueuePolicy(max_requests=4))
        for version in "12":
            self.link.join(f"r{version}", version=version)

    async def ask(self, version: str | None = None, header: bytes | None = None) -> None:
        await self.gateway.infer("m", version, request(), headers={ROUTE_HEADER: header} if header else {})

    def outcomes(self, version: str) -> dict[str, int]:
        counted = self.gateway.find("m", version).metrics.outcomes
        return {outcome: count for outcome, count in counted.items() if count}


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def test_requests_are_shared_out_unless_they_name_a_version_or_say_which() -> None:
    async def test() -> None:
        bench = Bench(chances=[0.05, 0.15, 0.95])
        bench.gateway.set_route("m", Route(version="1", shares={"2": 0.1}, header={"canary": "2"}))
        for _ in range(3):
            await bench.ask()
        assert (bench.outcomes("1"), bench.outcomes("2")) == ({"ok": 2}, {"ok": 1})
        await bench.ask(header=b"canary")
        await bench.ask(version="2")
        assert (bench.outcomes("1"), bench.outcomes("2")) == ({"ok": 2}, {"ok": 3})

    run(test)


def test_a_shadow_gets_copies_that_nobody_waits_for_and_that_are_no_demand() -> None:
    async def test() -> None:
        bench = Bench(chances=[0.05, 0.95])
        bench.gateway.set_route("m", Route(version="1", shadows={"2": 0.1}))
        await bench.ask()
        await bench.ask()
        await settle()
        assert (bench.outcomes("1"), bench.outcomes("2")) == ({"ok": 2}, {"ok": 1})
        assert bench.gateway.find("m", "2").metrics.arrived_rows == 0
        await bench.ask(version="1")
        await settle()
        assert bench.outcomes("2") == {"ok": 1}

    run(test)


def test_a_shadow_that_hangs_fails_or_is_full_harms_no_request() -> None:
    async def test() -> None:
        bench = Bench(chances=[0.0] * 20)
        bench.gateway.set_route("m", Route(version="1", shadows={"2": 1.0}))
        bench.link.prompt = False
        asked = [asyncio.ensure_future(bench.ask()) for _ in range(20)]
        await settle()
        while bench.link.runs["r1"]:
            bench.link.answer("r1")
            await settle()
        await asyncio.gather(*asked)
        assert bench.outcomes("1") == {"ok": 20}
        assert bench.outcomes("2") == {"refused": 16}
        shadow = bench.gateway.find("m", "2")
        bench.gateway.close()
        await settle()
        assert shadow.metrics.outcomes["refused"] == 20

    run(test)


def test_a_shadow_that_takes_something_else_gets_nothing() -> None:
    other = Signature(
        inputs=(TensorSpec(name="z", datatype="FP32", shape=(None, 2)),), outputs=DOUBLING.outputs
    )

    async def test() -> None:
        bench = Bench(signature=other)
        bench.gateway.set_route("m", Route(version="1", shadows={"2": 1.0}))
        await bench.ask()
        await settle()
        assert bench.outcomes("2") == {}

    run(test)


def test_a_route_to_what_is_not_served_is_refused_and_one_that_leaves_is_taken_out() -> None:
    async def test() -> None:
        bench = Bench(chances=[0.0] * 5)
        with pytest.raises(NotServed):
            bench.gateway.set_route("m", Route(version="1", shares={"3": 0.1}))
        bench.gateway.set_route("m", Route(version="2", shares={"1": 0.2}, header={"canary": "2"}))
        await bench.gateway.retire("m", "2")
        assert bench.gateway.routes()["m"] == Route(version="1", shares={"1": 0.2})
        await bench.ask(header=b"canary")
        assert bench.outcomes("1") == {"ok": 1}

    run(test)


def test_a_version_that_leaves_while_a_body_comes_fails_no_request() -> None:
    async def test() -> None:
        bench = Bench()
        sent = []
        begun = asyncio.Event()
        retired = asyncio.Event()

        async def receive() -> dict:
            begun.set()
            await retired.wait()
            return {"type": "http.request", "body": BODY, "more_body": False}

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": []}
        asked = asyncio.ensure_future(App(bench.gateway)(scope, receive, send))
        await begun.wait()
        bench.gateway.set_route("m", Route(version="2"))
        await bench.gateway.retire("m", "1")
        retired.set()
        await asked
        assert sent[0]["status"] == 200
        assert b'"model_version":"2"' in sent[1]["body"]

    run(test)


def test_a_header_chooses_over_http() -> None:
    async def test() -> None:
        bench = Bench()
        bench.gateway.set_route("m", Route(version="1", header={"canary": "2"}))
        bodies = []

        async def receive() -> dict:
            return {"type": "http.request", "body": BODY, "more_body": False}

        async def send(message) -> None:
            bodies.append(message.get("body", b""))

        for headers in ([], [(b"x-forescale-route", b"canary")]):
            scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": headers}
            await App(bench.gateway)(scope, receive, send)
        assert [b'"model_version":"2"' in body for body in bodies if body] == [False, True]

    run(test)
