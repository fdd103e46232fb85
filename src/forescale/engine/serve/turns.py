"""A local connection on which all that is said in one turn of the event loop travels as one message.

A message is eight bytes that say how long it is, then msgpack: a list of items.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import msgpack

from forescale.core.errors import PeerGone

Item = list[Any]


class Turns(asyncio.Protocol):
    """One end.

    Args:
        on_item: called with each item of the other end, in the order in which they were said.
        on_gone: called when the other end is no longer there.
    """

    def __init__(
        self, on_item: Callable[[Turns, Item], object], on_gone: Callable[[Turns], object] = lambda _: None
    ) -> None:
        self._on_item = on_item
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._is_gone = False
        self._said: list[Item] = []
        self._came = bytearray()

    def say(self, item: Item) -> None:
        """Send an item with all others of this turn.

        Raises:
            PeerGone: there is nobody to tell.
        """
        if self._is_gone:
            raise PeerGone("the other end is gone")
        if not self._said:
            self._loop.call_soon(self._send)
        self._said.append(item)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._said:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio calls it
        self._is_gone, self._transport = True, None
        self._on_gone(self)

    def data_received(self, data: bytes) -> None:
        self._came += data
        while len(self._came) >= 8:
            end = 8 + int.from_bytes(self._came[:8])
            if len(self._came) < end:
                return
            with memoryview(self._came) as came:
                items = cast(list[Item], msgpack.unpackb(came[8:end]))
            del self._came[:end]
            for item in items:
                self._on_item(self, item)

    def _send(self) -> None:
        if self._transport is None or not self._said:
            return
        message = cast(bytes, msgpack.packb(self._said))
        self._said = []
        self._transport.writelines((len(message).to_bytes(8), message))
