"""Requests that the controller answers, handed on to it over its Unix socket as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpx
import orjson

from forescale.engine.serve.app import Receive, Scope, Send

_OF_THE_CONNECTION = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"expect")
)
_AWAY = orjson.dumps({"error": "the controller is away; models are served, but nothing can be changed"})


class _ClientGone(Exception):
    """It sends no more."""


class Proxy:
    """An ASGI application.

    Args:
        path: the controller's socket; while nobody listens there, requests are answered with 503.
    """

    def __init__(self, path: Path) -> None:
        # A connection for each request: one that was kept might lead to a controller that is gone.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._transport = httpx.AsyncHTTPTransport(uds=str(path), limits=limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = list(_end_to_end(scope["headers"]))
        sends_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in headers)
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        request = httpx.Request(
            scope["method"],
            httpx.URL(scheme="http", host="controller", raw_path=target),
            headers=headers,
            content=_body(receive) if sends_body else None,
        )
        begun = False
        try:
            answer = await self._transport.handle_async_request(request)
            try:
                begun = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": answer.status_code,
                        "headers": list(_end_to_end(answer.headers.raw)),
                    }
                )
                async for chunk in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            finally:
                await answer.aclose()
        except _ClientGone:
            return
        except httpx.TransportError:
            if begun:
                raise  # the answer ends where it broke off
            await _say_away(send)


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise _ClientGone
        more = message.get("more_body", False)
        yield message["body"]


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    return ((name.lower(), value) for name, value in headers if name.lower() not in _OF_THE_CONNECTION)


async def _say_away(send: Send) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(_AWAY)),
        (b"retry-after", b"1"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _AWAY})
