"""An ASGI application behind a port: uvicorn, stopped by whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Self

import uvicorn

from forescale.core.errors import InvalidInput
from forescale.engine.serve.app import AsgiApp

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


class Server:
    """Serves from ``async with Server(...)`` on until its end, which lets requests under way finish.

    Args:
        host: address to listen on.
        port: 0: any that is free.
        grace_s: how long requests under way may take at the end.

    Attributes:
        port: where it listens.

    Raises:
        InvalidInput: it cannot listen there.
    """

    def __init__(
        self, app: AsgiApp, *, host: str = "127.0.0.1", port: int = 8080, grace_s: float = 10
    ) -> None:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise InvalidInput(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
            ) from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType] - plain mappings instead of uvicorn's typed ones
            http="httptools",
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
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._uvicorn.serve([self._socket]))
        listening = asyncio.create_task(self._uvicorn.listening.wait())
        await asyncio.wait((self._task, listening), return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            listening.cancel()
            self._task.result()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._uvicorn.should_exit = True
        if self._task is not None:
            await self._task
