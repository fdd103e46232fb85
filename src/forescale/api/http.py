"""What the management interface needs of HTTP: routes, JSON in and out, errors as answers."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import orjson
import structlog
from pydantic import BaseModel, ValidationError

from forescale.core.errors import ForescaleError, InvalidInput, NotFound

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_LIMIT_BYTES = 1 << 20

M = TypeVar("M", bound=BaseModel)


class Refused(Exception):
    """The request is answered with an error; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.headers = headers or {}
        super().__init__(message)


class Disconnected(Exception):
    """The client went away before it had sent all; nobody waits for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """``body`` is anything that JSON can say."""

    body: Any
    status: int = 200


class Request:
    """One request.

    Attributes:
        path: what the route's pattern found, decoded.
        query: the query's parameters.
    """

    def __init__(self, scope: Scope, receive: Receive, path: Mapping[str, str]) -> None:
        self._receive = receive
        self.path = path
        text = scope.get("query_string", b"").decode("latin-1")
        self.query = dict(parse_qsl(text, keep_blank_values=True))
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            Disconnected: before its end.
        """
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def body(self, kind: type[M]) -> M:
        """The body, read as JSON of that shape.

        Raises:
            Refused: it is something else, or too long.
        """
        body = b""
        async for chunk in self.chunks():
            body += chunk
            if len(body) > _BODY_LIMIT_BYTES:
                raise Refused(413, f"the body is longer than {_BODY_LIMIT_BYTES:,} bytes")
        return read(kind, body or b"{}")

    def asked(self, kind: type[M]) -> M:
        """The query, read as that shape.

        Raises:
            Refused: it is something else.
        """
        try:
            return kind.model_validate(self.query)
        except ValidationError as error:
            raise Refused(400, _first(error)) from error


Route = Callable[[Request], Awaitable[Answer]]


class Router:
    """An ASGI application made of routes.

    Args:
        routes: method, path with ``{names}``, and what answers it.
    """

    def __init__(self, routes: Iterable[tuple[str, str, Route]]) -> None:
        self._routes = [(method, _pattern(path), route) for method, path, route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Mapping[str, str] = {}
        try:
            answer = await self._answer(scope, receive)
        except Disconnected:
            return
        except Refused as refused:
            answer, headers = _failure(refused.status, str(refused)), refused.headers
        except NotFound as error:
            answer = _failure(404, str(error))
        except InvalidInput as error:
            answer = _failure(400, str(error))
        except ForescaleError as error:
            answer = _failure(500, str(error))
        except Exception:  # noqa: BLE001 - one request's fault must not end the server; the log has all of it
            structlog.get_logger().exception("request_failed", path=scope["path"])
            answer = _failure(500, "an unexpected fault; the server's log says more")
        await _send(answer, headers, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        allowed: list[str] = []
        for method, pattern, route in self._routes:
            found = pattern.fullmatch(scope["raw_path"].decode("latin-1"))
            if found is None:
                continue
            if method == scope["method"]:
                path = {name: unquote(text) for name, text in found.groupdict().items()}
                return await route(Request(scope, receive, path))
            allowed.append(method)
        if allowed:
            words = ", ".join(allowed)
            raise Refused(405, f"{scope['method']} is not possible here; {words} is", {"allow": words})
        raise Refused(404, f"there is nothing at {scope['path'][:200]}")


def read(kind: type[M], text: str | bytes, what: str = "") -> M:
    """JSON of that shape.

    Raises:
        Refused: it is something else.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise Refused(400, f"{what}: {_first(error)}" if what else _first(error)) from error


def _pattern(path: str) -> re.Pattern[str]:
    # Matched before decoding, so that an encoded slash does not end a name.
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/?]+)", path))


def _first(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, fault["loc"]))
    return f"{where}: {fault['msg']}" if where else fault["msg"]


def _failure(status: int, message: str) -> Answer:
    return Answer(status=status, body={"error": message})


async def _send(answer: Answer, headers: Mapping[str, str], send: Send) -> None:
    body = orjson.dumps(answer.body)
    fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    start = {
        "type": "http.response.start",
        "status": answer.status,
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
