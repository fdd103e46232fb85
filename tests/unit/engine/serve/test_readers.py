"""Readers and the data plane's end of them, in one process; what a replica would do is played."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from fake_replicas import DOUBLING, FakeLink, SteadyClock, request, settle
from forescale.core.errors import BadRequest, ModelFailed, NotServed, TooBusy
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.app import App
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.journey import Journey
from forescale.engine.serve.middleware import Middleware
from forescale.engine.serve.reader import ReaderGateway, reader_app
from forescale.engine.serve.readers import ReaderBeginning, Readers
from forescale.engine.serve.routing import Route
from forescale.engine.serve.server import Server, listen, listen_at
from forescale.engine.serve.turns import Item, Turns

OTHER = Signature(
    inputs=(TensorSpec(name="z", datatype="INT8", shape=(None,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, 2)),),
)


class Place:
    """A data plane with a reader."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.link = FakeLink(prompt=True)
        self.gateway = Gateway(self.link, clock=SteadyClock())
        self.reader = ReaderGateway(chance=lambda: 0.05)

    async def told(self) -> None:
        """The reader knows what is served."""
        for _ in range(100):
            await settle()
            await asyncio.sleep(0)

    async def infer(self, version: str | None = None) -> str:
        """The version that answered, and rightly."""
        asked = self.reader.find("m", version)
        if version is None:
            asked = self.reader.choose("m", {})
        outputs = await asked.infer(request(1.0, 3.0, rows=2))
        np.testing.assert_array_equal(outputs["y"], [[2.0, 6.0]] * 2)
        return asked.version


def run(test: Callable[[Place], Awaitable[None]]) -> None:
    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder))
            beginning = ReaderBeginning(
                run=place.run, log=place.run / "log", host="127.0.0.1", port=0, middleware=Middleware()
            )
            async with asyncio.timeout(20), Readers(place.gateway).serving(0, beginning):
                loop = asyncio.get_running_loop()
                _, place.reader.turns = await loop.create_unix_connection(
                    lambda: Turns(place.reader.hear, lambda _: place.reader.lose()),
                    str(place.run / "readers"),
                )
                await place.reader.is_told.wait()
                await test(place)
                place.reader.turns.close()
                await settle()
            place.gateway.close()

    asyncio.run(scenario())


def test_what_fronts_ask_shares_the_one_queue_and_is_answered() -> None:
    async def test(place: Place) -> None:
        place.gateway.serve("m", "1", DOUBLING)
        await place.told()
        answers = [asyncio.ensure_future(place.infer()) for _ in range(3)]
        while place.gateway.find("m").gauges().waiting < 3:
            await settle()
        place.link.join()
        assert await asyncio.gather(*answers) == ["1"] * 3
        assert place.link.batch_rows == [6]

    run(test)


def test_routes_and_refusals_are_the_gateways() -> None:
    async def test(place: Place) -> None:
        for version in "12":
            place.gateway.serve("m", version, DOUBLING)
            place.link.join(f"r{version}", version=version)
        place.gateway.set_route("m", Route(version="1", shares={"2": 0.1}))
        await place.told()
        assert (await place.infer(), await place.infer("1")) == ("2", "1")
        with pytest.raises(NotServed, match="no model 'x'"):
            place.reader.find("x")
        with pytest.raises(BadRequest, match="at most 32 rows"):
            await place.reader.find("m").infer(request(rows=33))

    run(test)


def test_a_request_that_is_traced_knows_afterwards_where_it_was() -> None:
    async def test(place: Place) -> None:
        place.gateway.serve("m", "1", DOUBLING)
        for name in ("r1", "r2"):
            place.link.join(name)
        await place.told()
        asked = place.reader.find("m")
        answered, failed = Journey(), Journey()
        await asked.infer(replace(request(rows=3), journey=answered))
        (leg,) = answered.legs
        assert (answered.arrived_s, leg.sent_s, leg.batch_rows) == (100.0, 100.0, 3)
        place.link.prompt = False
        asking = asyncio.ensure_future(asked.infer(replace(request(), journey=failed)))
        while not place.gateway.find("m").gauges().in_flight:
            await settle()
        place.gateway.lose(first := next(name for name, runs in place.link.runs.items() if runs))
        await settle()
        place.link.fail(second := "r1" if first == "r2" else "r2")
        with pytest.raises(ModelFailed):
            await asking
        assert [leg.replica for leg in failed.legs] == [first, second]

    run(test)


def test_a_version_that_left_meanwhile_is_answered_for_by_its_heir() -> None:
    async def test(place: Place) -> None:
        place.gateway.serve("m", "1", DOUBLING)
        await place.told()
        by_route, by_name = place.reader.find("m"), place.reader.find("m", "1")
        place.gateway.serve("m", "2", DOUBLING)
        place.link.join(version="2")
        place.gateway.set_route("m", Route(version="2"))
        await place.gateway.retire("m", "1")
        outputs = await by_route.infer(request(1.0, 3.0))
        np.testing.assert_array_equal(outputs["y"], [[2.0, 6.0]])
        assert by_route.version == "2"
        with pytest.raises(NotServed):
            await by_name.infer(request())
        by_route = place.reader.find("m")
        place.gateway.serve("m", "3", OTHER)
        await place.gateway.retire("m", "2")
        with pytest.raises(NotServed):  # what was read for the one does not fit the other
            await by_route.infer(request())

    run(test)


def test_requests_are_told_when_the_data_plane_is_lost() -> None:
    async def test(place: Place) -> None:
        place.gateway.serve("m", "1", DOUBLING)
        await place.told()
        answer = asyncio.ensure_future(place.infer())
        while not place.gateway.find("m").gauges().waiting:
            await settle()
        assert place.reader.turns is not None
        place.reader.turns.close()
        with pytest.raises(TooBusy, match="lost"):
            await answer
        with pytest.raises(TooBusy, match="lost"):
            await place.infer()
        _, place.reader.turns = await asyncio.get_running_loop().create_unix_connection(
            lambda: Turns(place.reader.hear), str(place.run / "readers")
        )

    run(test)


def test_all_but_inference_is_handed_on_and_so_are_models_that_the_front_does_not_know() -> None:
    async def test(place: Place) -> None:
        app = reader_app(place.reader, place.run)
        async with (
            Server(App(place.gateway), listen_at(place.run / "http")),
            Server(app, listen("127.0.0.1", 0)) as reader,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{reader.port}", timeout=10) as client,
        ):
            place.gateway.serve("m", "1", DOUBLING)
            place.link.join()
            entry = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
            for _ in range(2):
                answer = (await client.post("/v2/models/m/infer", json={"inputs": [entry]})).json()
                assert (answer["model_version"], answer["outputs"][0]["data"]) == ("1", [2.0, 4.0])
                await place.told()
            assert (await client.get("/v2/models/m/ready")).json()["ready"]
            assert 'outcome="ok"} 2' in (await client.get("/metrics")).text
            assert (await client.post("/v2/models/x/infer", content=b"{}")).status_code == 404
            away = await client.get("/api/v1/models")
            assert (away.status_code, away.headers["retry-after"]) == (503, "1")

    run(test)


def test_what_is_said_in_a_turn_arrives_in_order_however_it_is_cut() -> None:
    async def test() -> None:
        heard: list[Item] = []
        near, far = Turns(lambda _, item: heard.append(item)), Turns(lambda _, item: None)
        sent = bytearray()

        class Wire(asyncio.Transport):
            def writelines(self, list_of_data: object) -> None:
                sent.extend(b"".join(list_of_data))  # type: ignore[arg-type]

        far.connection_made(Wire())
        for number in range(3):
            far.say([number, b"x" * number])
        await settle()
        far.say([3])
        await settle()
        for octet in sent:
            near.data_received(bytes([octet]))
        assert heard == [[0, b""], [1, b"x"], [2, b"xx"], [3]]

    asyncio.run(test())
