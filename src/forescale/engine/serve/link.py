"""The event loop's end of the channel to replica processes."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Sequence

import structlog

from forescale.engine.channel import ChannelServer, Frame, Message
from forescale.engine.serve.messages import FromReplica, Header, from_replica

Listener = Callable[[str, FromReplica, tuple[memoryview, ...]], None]
"""Told who said what, with which frames, in the order it came."""

_MESSAGES_PER_TURN = 64  # then other tasks of the loop have theirs


class ReplicaLink:
    """Sends without waiting, and tells listeners what replicas say. It is the only reader of its channel.

    Use it from the loop's thread, between ``open`` and ``close``.
    """

    def __init__(self, server: ChannelServer) -> None:
        self._server = server
        self._listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reading = False

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` of every message from now on."""
        self._listeners.append(listener)

    def open(self) -> None:
        """Begin to read, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._server.fileno(), self._read)
        self._read_soon()

    def send(self, replica: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        """Send to a replica by its address on the channel; everything sent over the channel goes this way.

        Frames above 64 KiB are not copied: leave their memory unchanged.

        Raises:
            PeerGone: no process of that name is connected.
        """
        self._server.send(replica, header, frames)
        self._read_soon()  # sending takes the signal that something came

    def close(self) -> None:
        """Stop reading. The channel stays open. Harmless the second time."""
        if self._loop is not None:
            self._loop.remove_reader(self._server.fileno())
            self._loop = None

    def _read_soon(self) -> None:
        if self._loop is not None and not self._reading:
            self._reading = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._reading = False
        if self._loop is None:
            return
        for _ in range(_MESSAGES_PER_TURN):
            message = self._server.receive(0)
            if message is None:
                return
            self._tell(message)
        self._read_soon()

    def _tell(self, message: Message) -> None:
        try:
            said = from_replica(message.header)
        except ValueError as error:
            structlog.get_logger().error("message_dropped", sender=message.sender, reason=str(error))
            return
        if said is None:
            return
        for listener in self._listeners:
            try:
                listener(message.sender, said, message.frames)
            except Exception:  # noqa: BLE001 - what one replica says must not keep others from being heard
                # As text: structlog's pictures of tracebacks take a tenth of a second each.
                text = traceback.format_exc()
                structlog.get_logger().error("message_failed", sender=message.sender, traceback=text)
