"""The gateway over real sockets: HTTP on one side, the encrypted channel to replicas on the other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvloop

from fake_replicas import DOUBLING
from forescale.core.clock import SystemClock
from forescale.core.errors import InvalidInput, PeerGone
from forescale.engine.serve.app import App
from forescale.engine.serve.arrays import pack, unpack
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.link import ReplicaLink
from forescale.engine.serve.messages import Beat, Credit, Hello, Result, Run, to_replica
from forescale.engine.serve.queues import QueuePolicy
from forescale.engine.serve.server import Server, listen
from forescale.engine.stream import StreamChannel

INFER = "/v2/models/m/infer"


class Replica:
    """Doubles what it gets, in a thread, until it is told to stop or has answered ``batches``.

    Attributes:
        hold: it begins no batch while this is cleared.
    """

    def __init__(self, link: ReplicaLink, name: str, *, batches: int = 1 << 30) -> None:
        self.name = name
        self.hold = threading.Event()
        self.hold.set()
        self._left = batches
        self._link = link
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self.hold.set()
        self._thread.join()

    def _work(self) -> None:
        with StreamChannel(self._link.invitation, self.name) as channel, contextlib.suppress(PeerGone):
            hello = Hello(model="m", version="1", replica=self.name, signature=DOUBLING, max_rows=64)
            channel.send(hello.to_header())
            channel.send({"type": "nonsense"})
            channel.send(Credit(n=2).to_header())
            while self._left and not self._stopped.is_set():
                message = channel.receive(0.02)
                if message is None:
                    channel.send(Beat().to_header())
                    continue
                run = to_replica(message.header)
                assert isinstance(run, Run)
                self.hold.wait()
                tensors, frames = pack({"y": unpack(run.inputs, message.frames)["x"] * np.float32(2)})
                channel.send(Result(batch=run.batch, seconds=0.0, outputs=tensors).to_header(), frames)
                self._left -= 1


class Place:
    """A running gateway."""

    def __init__(self, gateway: Gateway, link: ReplicaLink, server: Server, client: httpx.AsyncClient):
        self.gateway = gateway
        self.client = client
        self.server = server
        self._link = link
        self._replicas: list[Replica] = []

    def replica(self, name: str, **options: int) -> Replica:
        self._replicas.append(Replica(self._link, name, **options))
        return self._replicas[-1]

    async def ask(self, *values: float) -> list[float]:
        entry = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": values}
        answer = await self.client.post(INFER, json={"inputs": [entry]})
        assert answer.status_code == 200, answer.text
        return answer.json()["outputs"][0]["data"]

    async def ready(self) -> None:
        while (await self.client.get("/v2/models/m/ready")).status_code != 200:
            await asyncio.sleep(0.01)

    async def stop_replicas(self) -> None:
        for replica in self._replicas:
            await asyncio.to_thread(replica.stop)


@contextlib.asynccontextmanager
async def place(*, body_limit_bytes: int = 1 << 20) -> AsyncGenerator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        link = ReplicaLink(Path(folder) / "replicas")
        link.listen(complain)
        gateway = Gateway(link, clock=SystemClock())
        gateway.serve("m", "1", DOUBLING, QueuePolicy(timeout_s=60))
        await link.open()
        async with (
            Server(App(gateway, body_limit_bytes=body_limit_bytes), listen("127.0.0.1", 0)) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client,
        ):
            made = Place(gateway, link, server, client)
            try:
                yield made
            finally:
                await made.stop_replicas()
        link.close()
        link.close()


def complain(_replica: str, said: object, _frames: object) -> None:
    """A listener with a fault, which must not keep others from listening."""
    if isinstance(said, Credit):
        raise RuntimeError("a fault")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await test()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


def test_many_clients_get_their_own_answers_from_shared_batches() -> None:
    async def test() -> None:
        async with place() as here:
            answers = [asyncio.ensure_future(here.ask(n, -n)) for n in range(60)]
            while here.gateway.find("m").gauges().waiting < 60:
                await asyncio.sleep(0.01)
            here.replica("r0")
            assert await asyncio.gather(*answers) == [[2 * n, -2 * n] for n in range(60)]
            metrics = here.gateway.find("m").metrics
            assert metrics.outcomes["ok"] == 60
            assert metrics.batch_rows.count < 10

    run(test)


def test_large_tensors_travel_as_bytes() -> None:
    async def test() -> None:
        async with place() as here:
            here.replica("r0")
            values = np.random.default_rng(0).random((32, 2)).astype(np.float32)
            entry = (
                '{"name": "x", "datatype": "FP32", "shape": [32, 2], "parameters": {"binary_data_size": 256}}'
            )
            head = f'{{"inputs": [{entry}], "parameters": {{"binary_data_output": true}}}}'.encode()
            answer = await here.client.post(
                INFER,
                content=head + values.tobytes(),
                headers={"Inference-Header-Content-Length": str(len(head))},
            )
            at = int(answer.headers["inference-header-content-length"])
            np.testing.assert_array_equal(
                np.frombuffer(answer.content[at:], np.float32).reshape(32, 2), values * 2
            )

    run(test)


def test_replicas_that_are_lost_fail_no_request() -> None:
    async def test() -> None:
        async with place() as here:
            first = here.replica("r0")
            await here.ready()
            first.hold.clear()
            answers = [asyncio.ensure_future(here.ask(n, n)) for n in range(20)]
            while not here.gateway.find("m").gauges().in_flight:
                await asyncio.sleep(0.01)
            here.replica("r1")
            here.gateway.lose("r0")
            assert await asyncio.gather(*answers) == [[2 * n, 2 * n] for n in range(20)]
            # What the first one says now is of no interest to anybody.
            first.hold.set()
            assert await here.ask(1, 2) == [2, 4]

    run(test)


def test_requests_under_way_are_finished_when_the_server_ends() -> None:
    async def test() -> None:
        async with place() as here:
            replica = here.replica("r0")
            await here.ready()
            replica.hold.clear()
            answer = asyncio.ensure_future(here.ask(1, 1))
            while not here.gateway.find("m").gauges().in_flight:
                await asyncio.sleep(0.01)
            ending = asyncio.ensure_future(here.server.__aexit__())
            while True:  # until nobody can come any more
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
                except OSError:
                    break
                writer.close()
                await asyncio.sleep(0.01)
            assert not answer.done()
            replica.hold.set()
            assert await answer == [2, 2]
            await ending

    run(test)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01nonsense\r\n\r\n",
        b"POST /v2/models/m/infer HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 500\r\n\r\n{",
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_broken_http_ends_its_own_connection_only(raw: bytes) -> None:
    async def test() -> None:
        async with place() as here:
            here.replica("r0")
            reader, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
            writer.write(raw)
            writer.write_eof()
            said = await reader.read()
            assert b"200" not in said.partition(b"\r\n")[0]
            writer.close()
            assert await here.ask(1, 2) == [2, 4]

    run(test)


def test_a_body_over_the_limit_is_refused() -> None:
    async def test() -> None:
        async with place(body_limit_bytes=300_000) as here:
            here.replica("r0")
            answer = await here.client.post(INFER, content=b" " * 1_000_000)
            assert answer.status_code == 413

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(100):
                    yield b" " * 10_000

            assert (await here.client.post(INFER, content=chunks())).status_code == 413
            assert await here.ask(1, 2) == [2, 4]

    run(test)


def test_a_port_that_is_taken_is_named() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(InvalidInput, match=f"127.0.0.1:{port}"):
                listen("127.0.0.1", port)

    run(test)


class NoLink:
    def listen(self, listener: object) -> None:
        pass

    def send(self, replica: str, header: object, frames: object = ()) -> None:
        raise PeerGone(replica)
