"""Both ends of the Unix socket between controller and data plane.

Each message is four bytes that say how long it is, then JSON. An empty one from the controller asks for the
answer that it waits for at once. Of versions only those are told that have changed since the answer before,
and routes only if one has: of thousands most sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from pydantic import TypeAdapter

from forescale.core.errors import PeerGone
from forescale.engine.serve.orders import Exchange, PlaneState, VersionState
from forescale.engine.serve.plane import Plane
from forescale.engine.serve.routing import Route

_Version = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A state without versions and routes, and what has changed of these.

    Attributes:
        gone: names of versions.
        routes: all, if one has changed.
    """

    state: PlaneState
    changed: tuple[VersionState, ...]
    gone: tuple[_Version, ...]
    routes: Mapping[str, Route] | None


_EXCHANGE = TypeAdapter(Exchange)
_ANSWER = TypeAdapter(_Answer)


class Listener:
    """The data plane's end. A controller that comes takes the place of the one before.

    Attributes:
        lease_s: how long the data plane is to go on without a controller, as the last one said.
    """

    def __init__(self, plane: Plane, on_away: Callable[[], object], on_back: Callable[[], object]) -> None:
        self._plane = plane
        self._on_away = on_away
        self._on_back = on_back
        self._controller: asyncio.StreamWriter | None = None
        self.lease_s = Exchange().lease_s

    @contextlib.asynccontextmanager
    async def listening(self, listener: socket.socket) -> AsyncGenerator[None]:
        server = await asyncio.start_unix_server(self._converse, sock=listener)
        try:
            yield
        finally:
            server.close()  # the controller that there is stays connected until this process is gone

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._controller is not None:
            self._controller.close()
        self._controller = writer
        self._on_back()
        answers: set[asyncio.Task[None]] = set()
        told = _Told()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                said = await _receive(reader)
                if not said:
                    self._plane.answer_now()
                    continue
                answer = asyncio.create_task(self._answer(said, writer, told))
                answers.add(answer)
                answer.add_done_callback(answers.discard)
        for answer in answers:
            answer.cancel()
        writer.close()
        if self._controller is writer:
            self._controller = None
            self._on_away()

    async def _answer(self, said: bytes, writer: asyncio.StreamWriter, told: _Told) -> None:
        asked = _EXCHANGE.validate_json(said)
        self.lease_s = asked.lease_s
        state = await self._plane.exchange(asked)
        answer = told.answer(state)
        with contextlib.suppress(OSError):
            await _send(writer, _ANSWER.dump_json(answer))


class _Told:
    """What one controller has been told last."""

    def __init__(self) -> None:
        self._versions: Sequence[VersionState] = ()
        self._routes: Mapping[str, Route] = {}

    def answer(self, state: PlaneState) -> _Answer:
        """What it is to be told now."""
        pairs = zip_longest(state.versions, self._versions)
        others = [(now, before) for now, before in pairs if now is not before]
        there = {(now.model, now.version): now for now, _ in others if now}
        known = {(before.model, before.version): before for _, before in others if before}
        answer = _Answer(
            state=replace(state, versions=(), routes={}),
            changed=tuple(now for version, now in there.items() if known.get(version) is not now),
            gone=tuple(known.keys() - there.keys()),
            routes=None if state.routes == self._routes else state.routes,
        )
        self._versions, self._routes = state.versions, state.routes
        return answer


class Connection:
    """The controller's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._versions: dict[_Version, VersionState] = {}
        self._routes: Mapping[str, Route] = {}

    async def exchange(self, asked: Exchange) -> PlaneState:
        """One at a time.

        Raises:
            PeerGone: the data plane is no longer there.
        """
        try:
            await _send(self._writer, _EXCHANGE.dump_json(asked))
            answer = _ANSWER.validate_json(await _receive(self._reader))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise PeerGone("the data plane is gone") from error
        for version in answer.gone:
            del self._versions[version]
        self._versions |= {(each.model, each.version): each for each in answer.changed}
        if answer.routes is not None:
            self._routes = answer.routes
        return replace(answer.state, versions=tuple(self._versions.values()), routes=self._routes)

    def answer_now(self) -> None:
        """Let the exchange under way end at once."""
        if not self._writer.is_closing():
            self._writer.write(bytes(4))

    async def closed(self) -> None:
        """Until the data plane is gone; there must be no exchange."""
        with contextlib.suppress(OSError):
            while await self._reader.read(1 << 16):
                pass

    def close(self) -> None:
        self._writer.close()


async def connect(path: Path) -> Connection:
    """To the data plane that listens there.

    Raises:
        PeerGone: none does.
    """
    try:
        return Connection(*await asyncio.open_unix_connection(path))
    except OSError as error:
        raise PeerGone(f"no data plane listens at {path}") from error


async def _receive(reader: asyncio.StreamReader) -> bytes:
    length_bytes = int.from_bytes(await reader.readexactly(4))
    return await reader.readexactly(length_bytes)


async def _send(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(len(message).to_bytes(4) + message)
    await writer.drain()
