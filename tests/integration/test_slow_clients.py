"""Clients that hold connections open for nothing."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvicorn
import uvloop
from uvicorn.server import ServerState

from forescale.engine.serve.connection import Connection
from forescale.engine.serve.patience import Patience, Watch
from forescale.engine.serve.server import Server, listen

HEAD = b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 10\r\n"


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it got, or with nothing if the client has gone away."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            length = (b"content-length", b"%d" % len(body))
            await send({"type": "http.response.start", "status": 200, "headers": [length]})
            await send({"type": "http.response.body", "body": body})
            return


def test_who_says_nothing_or_stops_in_the_middle_is_told_so_and_let_go() -> None:
    async def test() -> None:
        quick = Patience(head_s=0.01, body_s=0.01, body_bytes_per_s=1e9, look_s=0.01)
        async with asyncio.timeout(30), Server(echo, listen("127.0.0.1", 0), patience=quick) as server:
            for begun in (b"", HEAD, HEAD + b"\r\n12345"):
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(begun)
                answer = await reader.read()  # until the server closes
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert answer.endswith(b'{"error":"the request came too slowly"}')
                writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_extra_info(self, _name: str) -> None: ...


def connected(app: Any = echo) -> tuple[Connection, Wire]:
    connection = Connection(uvicorn.Config(app, interface="asgi3", log_config=None), ServerState(), {})
    wire = Wire()
    connection.connection_made(cast(asyncio.Transport, wire))
    return connection, wire


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_limits() -> None:
    async def test() -> None:
        watch = Watch(Patience(head_s=10, body_s=20, body_bytes_per_s=1, look_s=1))
        silent, slow, steady, idle = (connected() for _ in range(4))
        everybody = [silent[0], slow[0], steady[0], idle[0]]
        watch.look(everybody, 0)
        for connection, _ in (slow, steady):
            connection.data_received(HEAD + b"\r\n")
        idle[0].data_received(HEAD + b"\r\n1234567890")
        await settle()
        watch.look(everybody, 10)
        assert not any(wire.closed for _, wire in (silent, slow, steady, idle))
        watch.look(everybody, 11)  # the head of a request has not come for that long; the bodies began at 10
        assert silent[1].closed
        steady[0].data_received(b"12345")  # five seconds more
        watch.look(everybody, 30)
        assert not slow[1].closed
        watch.look(everybody, 31)
        assert slow[1].closed
        assert slow[1].written.startswith(b"HTTP/1.1 408 ")
        watch.look(everybody, 35)
        assert not steady[1].closed
        steady[0].data_received(b"67890")
        await settle()
        watch.look(everybody, 1000)
        assert steady[1].written.startswith(b"HTTP/1.1 200 ")
        assert not steady[1].closed
        assert not idle[1].closed, "between requests it may be idle"
        idle[0].data_received(HEAD)  # the next request begins, and does not go on
        watch.look(everybody, 1001)
        watch.look(everybody, 1012)
        assert idle[1].closed
        assert not steady[1].closed

    asyncio.run(test())


def test_nobody_has_to_send_while_nobody_reads() -> None:
    async def test() -> None:
        reading = asyncio.Event()

        async def wait(scope: Any, receive: Any, send: Any) -> None:
            await reading.wait()
            await echo(scope, receive, send)

        watch = Watch(Patience(head_s=10, body_s=20, body_bytes_per_s=1e9, look_s=1))
        connection, wire = connected(wait)
        size = 1 << 20
        connection.data_received(HEAD.replace(b"10\r\n", b"%d\r\n\r\n" % size) + b"0" * (size // 2))
        assert wire.paused
        watch.look([connection], 0)
        watch.look([connection], 1000)
        assert not wire.closed
        reading.set()
        await settle()
        assert not wire.paused
        watch.look([connection], 1001)
        watch.look([connection], 1022)
        assert wire.closed

    asyncio.run(test())
