"""A connection of uvicorn's that sends an answer at once, counts what comes, and leaves nothing behind.

Uvicorn writes the head of an answer and its body apart, and uvloop makes a system call of each: dear, where a
request costs no more than ten of them, and the client wakes up twice.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_JOIN_BYTES = 1 << 16  # larger parts are not copied


class GatheringTransport:
    """A transport whose writes wait for those that follow in the same turn of the event loop."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._call_soon = asyncio.get_running_loop().call_soon
        self._parts: list[bytes | memoryview] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | memoryview) -> None:
        if not self._parts:
            self._call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if not parts or self._transport.is_closing():
            return
        if sum(map(len, parts)) <= _JOIN_BYTES:
            self._transport.write(b"".join(parts))
        else:
            self._transport.writelines(parts)


class Connection(HttpToolsProtocol):
    """One of a client's.

    Attributes:
        received_bytes: of bodies so far.
    """

    received_bytes = 0

    def on_body(self, body: bytes) -> None:
        self.received_bytes += len(body)
        super().on_body(body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gathering = GatheringTransport(cast(asyncio.Transport, transport))
        super().connection_made(cast(asyncio.Transport, gathering))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # Of a connection that was reset uvicorn leaves the timer, which would keep it until it runs.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
