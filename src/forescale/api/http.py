"""What the management interface needs of HTTP: routes, JSON in and out, errors as answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import orjson
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from forescale.core.errors import ForescaleError, InvalidInput, NoRoom, NotFound
from forescale.engine.serve.operations import JSON, OCTETS, Operation, pattern_of

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_LIMIT_BYTES = 1 << 20

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """What a request brings, in a query or a body; names that are not declared are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


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
        path: what the route's path found, decoded.
    """

    def __init__(self, scope: Scope, receive: Receive, route: Operation, path: Mapping[str, str]) -> None:
        self._receive = receive
        self._route = route
        self.path = path
        text = scope.get("query_string", b"").decode("latin-1")
        query = dict(parse_qsl(text, keep_blank_values=True))
        self._query = _checked(route.query or Strict, query)
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
        """The body, read as JSON of the shape that the route declares.

        Raises:
            Refused: it is something else, or too long.
        """
        assert self._route.takes.get(JSON) is kind
        body = b""
        async for chunk in self.chunks():
            body += chunk
            if len(body) > _BODY_LIMIT_BYTES:
                raise Refused(413, f"the body is longer than {_BODY_LIMIT_BYTES:,} bytes")
        return _read(kind, body or b"{}")

    def asked(self, kind: type[M]) -> M:
        """The query, read as the shape that the route declares."""
        assert isinstance(self._query, kind)
        return self._query


@dataclass(frozen=True, slots=True, kw_only=True)
class Route(Operation):
    """An operation, and what answers it."""

    answer: Callable[[Request], Awaitable[Answer]]


def route(
    operation: str,
    does: str,
    answer: Callable[[Request], Awaitable[Answer]],
    *,
    gives: object,
    takes: type | None = None,
    query: type[Strict] | None = None,
    status: int = 200,
    refuses: tuple[int, ...] = (),
) -> Route:
    """A route for JSON.

    Args:
        operation: method and path.
        gives: the answer's shape, a type.
        takes: the body's shape, or ``bytes``.
        refuses: statuses of errors besides those that all such routes have.
    """
    method, path = operation.split()
    usual = {400, 500}
    usual |= {404} if "{" in path else set()
    usual |= {413} if takes not in (None, bytes) else set()
    return Route(
        method=method,
        path=path,
        does=does,
        takes={} if takes is None else {OCTETS if takes is bytes else JSON: takes},
        query=query,
        gives={JSON: gives},
        status=status,
        refuses=tuple(sorted({*usual, *refuses})),
        answer=answer,
    )


class Router:
    """An ASGI application made of routes."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._patterns = [(pattern_of(route.path), route) for route in self.routes]

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
        except NoRoom as error:
            answer = _failure(409, str(error))
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
        unknown = Refused(404, f"there is nothing at {scope['path'][:200]}")
        for pattern, route in self._patterns:
            found = pattern.fullmatch(scope["raw_path"].decode("latin-1"))
            if found is None:
                continue
            if route.method == scope["method"]:
                path = {name: unquote(text) for name, text in found.groupdict().items()}
                if not all(map(str.isprintable, path.values())):  # databases do not take all of these
                    raise unknown
                return await route.answer(Request(scope, receive, route, path))
            allowed.append(route.method)
        if allowed:
            words = ", ".join(allowed)
            raise Refused(405, f"{scope['method']} is not possible here; {words} is", {"allow": words})
        raise unknown


def _read(kind: type[M], text: bytes) -> M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise Refused(400, first_fault(error)) from error


def _checked(kind: type[M], fields: Mapping[str, str]) -> M:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise Refused(400, first_fault(error)) from error


def first_fault(error: ValidationError) -> str:
    """Which field is wrong, and why."""
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
