"""The event loop's end of the channel to replica processes."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import structlog

from forescale.core.errors import ChannelFailed, PeerGone
from forescale.engine.serve.messages import (
    Failed,
    FromReplica,
    Header,
    Hello,
    Load,
    Result,
    Run,
    address,
    from_replica,
)
from forescale.engine.stream import ADDRESS, Decoder, encode
from forescale.engine.wire import Frame, Invitation

Listener = Callable[[str, FromReplica, tuple[memoryview, ...]], None]
"""Told who said what, by the address of a replica or a process, with which frames, in the order it came."""

_TASKS = {Load.kind, Run.kind}


class ReplicaLink:
    """Sends without waiting, and tells listeners what replicas say.

    A replica's address is ``PROCESS/NAME``, its process's ``PROCESS``. Use it from the loop's thread, between
    ``open`` and ``close``.

    Args:
        path: the Unix socket to listen on, in a folder that is private.

    Attributes:
        invitation: what processes need to connect.
    """

    def __init__(self, path: Path) -> None:
        self.invitation = Invitation(address=f"{ADDRESS}{path}")
        self._path = path
        self._listeners: list[Listener] = []
        self._peers: dict[str, asyncio.Transport] = {}
        self._server: asyncio.AbstractServer | None = None
        # What each process has been sent and not answered, in order: replica, and batch unless it is a load.
        self._tasks = defaultdict[str, deque[tuple[str, int | None]]](deque)

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` of every message from now on."""
        self._listeners.append(listener)

    async def open(self) -> None:
        """Let processes connect.

        Raises:
            ChannelFailed: it cannot.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(lambda: _Peer(self), str(self._path))
        except OSError as error:
            raise ChannelFailed(f"cannot listen at {self._path}: {error.strerror or error}") from error

    def send(self, to: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        """Send to an address; leave the frames' memory as it is.

        Raises:
            PeerGone: no process of that name is connected.
        """
        process, _, replica = to.partition("/")
        transport = self._peers.get(process)
        if transport is None or transport.is_closing():
            raise PeerGone(f"{process} is not connected")
        if replica:
            if header["type"] in _TASKS:
                self._tasks[process].append((replica, header.get("batch")))
            header = {**header, "to": replica}
        transport.writelines(encode(header, frames))

    def ended(self, process: str) -> str | None:
        """Forget a process that is gone; the replica that it was loading, or of which it ran a batch."""
        tasks = self._tasks.pop(process, None)
        return tasks[0][0] if tasks else None

    def close(self) -> None:
        """Stop listening, and end all connections. Harmless the second time."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
        for transport in tuple(self._peers.values()):
            transport.close()

    def hear(self, peer: _Peer, header: Header, frames: tuple[memoryview, ...]) -> None:
        """A process said something; first its name.

        Raises:
            ValueError: it did not say its name.
        """
        if not peer.name:
            name = header.get("name")
            if not isinstance(name, str) or not name:
                raise ValueError("it did not say its name")
            peer.name = name
            self._peers[name] = peer.transport  # one that was restarted takes over its name
            return
        try:
            said = from_replica(header)
        except ValueError as error:
            structlog.get_logger().error("message_dropped", sender=peer.name, reason=str(error))
            return
        if said is None:
            return
        sender = peer.name
        if replica := header.get("from"):
            if isinstance(said, Hello | Result | Failed):
                self._strike(peer.name, replica, said)
            sender = address(peer.name, replica)
        for listener in self._listeners:
            try:
                listener(sender, said, frames)
            except Exception:  # noqa: BLE001 - what one replica says must not keep others from being heard
                # As text: structlog's pictures of tracebacks take a tenth of a second each.
                text = traceback.format_exc()
                structlog.get_logger().error("message_failed", sender=peer.name, traceback=text)

    def _strike(self, process: str, replica: str, said: Hello | Result | Failed) -> None:
        """It has carried out the first of its tasks, if that is what this says."""
        tasks = self._tasks.get(process)
        if tasks and tasks[0] == (replica, None if isinstance(said, Hello) else said.batch):
            tasks.popleft()

    def lose(self, peer: _Peer) -> None:
        """A connection ended."""
        if self._peers.get(peer.name) is peer.transport:
            del self._peers[peer.name]


class _Peer(asyncio.BufferedProtocol):
    """A process's connection."""

    transport: asyncio.Transport

    def __init__(self, link: ReplicaLink) -> None:
        self.name = ""
        self._link = link
        self._decoder = Decoder()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - as asyncio calls it
        return self._decoder.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for header, frames in self._decoder.came(nbytes):
                self._link.hear(self, header, frames)
        except ValueError as error:
            structlog.get_logger().error("peer_dropped", sender=self.name, reason=str(error))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio calls it
        self._link.lose(self)
