"""Management requests on their way to a controller that may not be there."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx

from forescale.engine.serve.app import Receive, Scope, Send
from forescale.engine.serve.proxy import Proxy
from forescale.engine.serve.server import Server, listen, listen_at


class Controller:
    """Says what it was asked for, and what of the body it has seen."""

    def __init__(self) -> None:
        self.seen = asyncio.Queue[bytes]()
        self.asked: Scope = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked = scope
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.put_nowait(b"gone")
                return
            self.seen.put_nowait(message["body"])
            more = message.get("more_body", False)
        headers = [(b"x-said", b"yes"), (b"transfer-encoding", b"chunked")]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        for part in (b"on", b"e"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def has_seen(self, wanted: bytes) -> None:
        seen = b""
        async with asyncio.timeout(10):
            while seen != wanted:
                seen += await self.seen.get()


Test = Callable[[httpx.AsyncClient, Controller, Path], Awaitable[None]]


def run(test: Test) -> None:
    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "api")
            async with (
                Server(Proxy(path), listen("127.0.0.1", 0)) as front,
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{front.port}", timeout=10) as client,
            ):
                await test(client, Controller(), path)

    asyncio.run(scenario())


def test_a_body_is_handed_on_while_it_comes_and_so_is_the_answer() -> None:
    async def test(client: httpx.AsyncClient, controller: Controller, path: Path) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await controller.has_seen(b"first")
            yield b"last"

        async with Server(controller, listen_at(path)):
            answer = await client.post("/api/a%2Fb?c=d%20e", content=body(), headers={"x-mine": "1"})
        await controller.has_seen(b"last")
        assert (answer.status_code, answer.text, answer.headers["x-said"]) == (201, "one", "yes")
        assert (controller.asked["raw_path"], controller.asked["query_string"]) == (b"/api/a%2Fb", b"c=d%20e")
        headers = dict(controller.asked["headers"])
        assert headers[b"x-mine"] == b"1"
        assert headers[b"host"] == client.base_url.netloc

    run(test)


def test_an_upload_that_breaks_off_ends_at_the_controller_too() -> None:
    async def test(client: httpx.AsyncClient, controller: Controller, path: Path) -> None:
        async with Server(controller, listen_at(path)):
            _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            writer.write(b"POST /api HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nfirst")
            await controller.has_seen(b"first")
            writer.close()
            await controller.has_seen(b"gone")

    run(test)


def test_without_a_controller_the_client_is_told_to_come_back() -> None:
    async def test(client: httpx.AsyncClient, controller: Controller, path: Path) -> None:
        for _ in range(2):
            away = await client.post("/api", content=b"x" * 100_000)
            assert (away.status_code, away.headers["retry-after"]) == (503, "1")
            async with Server(controller, listen_at(path)):
                assert (await client.get("/api")).status_code == 201

    run(test)
