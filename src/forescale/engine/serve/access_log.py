"""A line of JSON for each request, written beside the requests."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import structlog

from forescale.core.clock import Clock
from forescale.engine.serve.app import AsgiApp, Message, Receive, Scope, Send

_DELAY_S = 0.5  # lines are written together
_LINES = 100_000  # more wait only if the disk hangs; they are given up then
_CLIENT_GONE = 499  # nginx's number for it


class AccessLog:
    """An application that notes what another one answers.

    The file is opened anew for each write: whoever rotates logs may rename it at any time.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, app: AsgiApp, path: Path, clock: Clock) -> None:
        self._app = app
        self._path = path
        self._clock = clock
        self._lines: list[bytes] = []
        self._writing: asyncio.Task[None] | None = None
        path.open("ab").close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun_s = self._clock.monotonic_s()
        status, sent_bytes = _CLIENT_GONE, 0

        async def note(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            self._note(scope, status, sent_bytes, self._clock.monotonic_s() - begun_s)

    async def close(self) -> None:
        """Write what is not written yet."""
        if self._writing is not None:
            await self._writing
        await self._write(self._taken())

    def _note(self, scope: Scope, status: int, sent_bytes: int, seconds: float) -> None:
        if len(self._lines) >= _LINES:
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(self._clock.wall_s(), UTC),
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 6),
            "received_bytes": _number(headers.get(b"content-length")),
            "sent_bytes": sent_bytes,
        }
        for name, header in (
            ("flow", b"x-forescale-client"),
            ("request_id", b"x-request-id"),
            ("traceparent", b"traceparent"),
            ("user_agent", b"user-agent"),
        ):
            if header in headers:
                line[name] = headers[header].decode("latin-1")
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_soon())

    async def _write_soon(self) -> None:
        while self._lines:
            await asyncio.sleep(_DELAY_S)
            await self._write(self._taken())
        self._writing = None

    def _taken(self) -> bytes:
        lines, self._lines = self._lines, []
        return b"".join(lines)

    async def _write(self, text: bytes) -> None:
        try:
            await asyncio.to_thread(_append, self._path, text)
        except OSError as error:
            structlog.get_logger().error("access_log_lost", path=str(self._path), error=error.strerror)


def _append(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)


def _number(text: bytes | None) -> int | None:
    return int(text) if text and text.isdigit() and len(text) < 16 else None
