"""How long a client may take to send a request: connections that are held open for nothing are ended.

Looked at from time to time and not per request, so that it costs requests nothing. Limits are like those of
Apache's mod_reqtimeout. Connections without a request under way are uvicorn's to end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from forescale.engine.serve.connection import Connection
from forescale.engine.serve.protocol import format_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Limits.

    Attributes:
        head_s: for all of a request before its body, from when the connection is there.
        body_s: for the body ...
        body_bytes_per_s: ... and in addition a second for so many bytes of it.
        look_s: how often it is looked after.
    """

    head_s: float = 20.0
    body_s: float = 20.0
    body_bytes_per_s: float = 500.0
    look_s: float = 1.0


@dataclass(frozen=True, slots=True)
class _Wait:
    """What a connection is waiting for: the body of a request, or (None) the head of one."""

    request: object | None
    since_s: float
    received_bytes: int


class Watch:
    """Knows since when each connection has been sending the same thing."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._waits: dict[Connection, _Wait] = {}

    def look(self, connections: Iterable[object], now_s: float) -> None:
        """End the connections that have taken too long."""
        waits: dict[Connection, _Wait] = {}
        for connection in tuple(connections):
            if not isinstance(connection, Connection) or not _is_sending(connection):
                continue
            request = None if _is_idle(connection) else connection.cycle
            wait = self._waits.get(connection)
            if wait is None or wait.request is not request:
                wait = _Wait(request, now_s, connection.received_bytes)
            waits[connection] = wait
            if now_s - wait.since_s > self._allowed_s(connection, wait):
                _end(connection)
        self._waits = waits

    def _allowed_s(self, connection: Connection, wait: _Wait) -> float:
        if wait.request is None:
            return self._patience.head_s
        came_bytes = connection.received_bytes - wait.received_bytes
        return self._patience.body_s + came_bytes / self._patience.body_bytes_per_s


def _is_idle(connection: Connection) -> bool:
    return not connection.cycle or connection.cycle.response_complete  # there is none before the first


def _is_sending(connection: Connection) -> bool:
    """Whether it is the client's turn."""
    if _is_idle(connection):
        return connection.timeout_keep_alive_task is None
    return connection.cycle.more_body and not connection.flow.read_paused


def _end(connection: Connection) -> None:
    if connection.transport.is_closing():
        return
    if _is_idle(connection) or not connection.cycle.response_started:
        body = format_error("the request came too slowly")
        head = (
            "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        connection.transport.write(head.encode() + body)
    connection.transport.close()
