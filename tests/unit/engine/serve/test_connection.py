from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from forescale.engine.serve.connection import Connection, GatheringTransport


class Wire(asyncio.Transport):
    """Keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data) -> None:
        self.written.append(bytes(data))

    def writelines(self, list_of_data) -> None:
        self.written += map(bytes, list_of_data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str, default: object = None) -> object:
        return (name, default)


def test_what_is_written_in_one_turn_goes_out_as_one() -> None:
    async def talk() -> list[bytes]:
        wire = Wire()
        transport = GatheringTransport(wire)
        transport.write(b"head ")
        transport.write(b"body")
        assert wire.written == []
        await asyncio.sleep(0)
        transport.write(b"next")
        await asyncio.sleep(0)
        return wire.written

    assert asyncio.run(talk()) == [b"head body", b"next"]


def test_large_parts_are_not_joined() -> None:
    async def talk() -> list[bytes]:
        wire = Wire()
        transport = GatheringTransport(wire)
        transport.write(b"head")
        transport.write(memoryview(bytes(1 << 17)))
        await asyncio.sleep(0)
        return wire.written

    assert asyncio.run(talk()) == [b"head", bytes(1 << 17)]


def test_closing_writes_what_waits_and_nothing_after() -> None:
    async def talk() -> Wire:
        wire = Wire()
        transport = GatheringTransport(wire)
        transport.write(b"last words")
        transport.close()
        transport.write(b"too late")
        await asyncio.sleep(0)
        return wire

    wire = asyncio.run(talk())
    assert wire.closed
    assert wire.written == [b"last words"]


def test_all_else_is_the_transports() -> None:
    async def talk() -> object:
        return GatheringTransport(Wire()).get_extra_info("peername")

    assert asyncio.run(talk()) == ("peername", None)


class Anonymous(Wire):
    """Nobody says where it leads."""

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default


async def nothing(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("lost", [None, ConnectionResetError()])
def test_a_connection_that_ends_leaves_nothing_that_keeps_it(lost: Exception | None) -> None:
    async def end() -> weakref.ref[Connection]:
        config = uvicorn.Config(nothing, interface="asgi3", log_config=None)
        connection, wire = Connection(config, ServerState(), {}), Anonymous()
        connection.connection_made(wire)
        connection.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        while not wire.written:
            await asyncio.sleep(0)
        wire.closed = True
        connection.connection_lost(lost)
        return weakref.ref(connection)

    async def test() -> Connection | None:
        left = await end()
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()
        return left()

    assert asyncio.run(test()) is None
