"""An ASGI application behind a port: uvicorn, stopped by whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Self

import uvicorn

from forescale.core.errors import InvalidInput
from forescale.engine.serve.app import AsgiApp
from forescale.engine.serve.connection import Connection
from forescale.engine.serve.patience import Patience, Watch

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that none is closed under a request


class _Uvicorn(uvicorn.Server):
    """Uvicorn that leaves signals to its process and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free.

    Raises:
        InvalidInput: it cannot.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InvalidInput(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
        ) from error


def listen_at(path: Path) -> socket.socket:
    """A Unix socket that listens there, in place of one that nobody listens on any more.

    Raises:
        InvalidInput: it cannot.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidInput(f"cannot listen at {path}: {error.strerror or error}") from error
    return listener


class Server:
    """Serves from ``async with Server(...)`` on until its end, which lets requests under way finish.

    Args:
        listener: what it listens on, see ``listen``.
        grace_s: how long requests under way may take at the end.
        patience: how long clients may take to send.

    Attributes:
        port: where it listens; 0 for a Unix socket.
    """

    def __init__(
        self, app: AsgiApp, listener: socket.socket, *, grace_s: float = 10, patience: Patience | None = None
    ) -> None:
        self._socket = listener
        self._socket.setblocking(False)
        self.port: int = 0 if listener.family == socket.AF_UNIX else listener.getsockname()[1]
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType] - plain mappings instead of uvicorn's typed ones
            http=Connection,
            interface="asgi3",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="error",
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(grace_s),
        )
        self._uvicorn = _Uvicorn(config)
        self._patience = patience or Patience()
        self._task: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._uvicorn.serve([self._socket]))
        listening = asyncio.create_task(self._uvicorn.listening.wait())
        await asyncio.wait((self._task, listening), return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            listening.cancel()
            self._task.result()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._uvicorn.should_exit = True
        if self._task is not None:
            await self._task
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        watch, clock_s = Watch(self._patience), asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._patience.look_s)
            watch.look(self._uvicorn.server_state.connections, clock_s())
