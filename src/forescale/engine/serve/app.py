"""The gateway as an ASGI application: Open Inference Protocol v2 over HTTP, and ``/metrics``."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, ClassVar

import orjson
import structlog

from forescale import __version__
from forescale.core.errors import BadRequest, NotServed, RequestFailed, TooBusy
from forescale.engine.serve.compression import choose_encoding, compress, decompress
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.metrics import exposition, process_exposition
from forescale.engine.serve.operations import (
    INFER,
    LIVE,
    METRICS,
    MODEL,
    MODEL_READY,
    READY,
    SERVER,
    VERSION,
    VERSION_INFER,
    VERSION_READY,
    Operation,
    pattern_of,
)
from forescale.engine.serve.protocol import (
    JSON_LENGTH_HEADER,
    format_answer,
    format_error,
    format_metadata,
    parse_request,
)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_LIMIT_BYTES = 64 << 20
FLOW_HEADER = b"x-forescale-client"
"""Names the client among which a model's requests are shared out fairly."""

JOURNEY = "forescale.journey"
"""Where the scope of a request that is traced holds its ``Journey``."""

_PATIENCE = 4  # times the limit is read of a body that is too large
_JOIN_BYTES = 1 << 16  # answers up to here are sent at once, larger ones part by part without a copy
_IN_THREAD_BYTES = 1 << 18  # bodies from here on are (de)compressed beside the event loop
_Header = tuple[bytes, bytes]
_Told = tuple[int, bytes, _Header]
"""Status, body and its type."""
_JSON: _Header = (b"content-type", b"application/json")
_OCTETS: _Header = (b"content-type", b"application/octet-stream")
_TEXT: _Header = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_SERVER = orjson.dumps(
    {"name": "forescale", "version": __version__, "extensions": ["binary_tensor_data", "schedule_policy"]}
)


class App:
    """The application.

    Args:
        body_limit_bytes: a larger body, compressed or not, is refused.
        api: answers all paths that are not this one's; None: they are unknown.

    Attributes:
        operations: all that it answers itself.
    """

    def __init__(
        self, gateway: Gateway, *, body_limit_bytes: int = BODY_LIMIT_BYTES, api: AsgiApp | None = None
    ) -> None:
        self._gateway = gateway
        self._limit_bytes = body_limit_bytes
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if scope["type"] != "http" or not (path.startswith("/v2") or path == "/metrics"):
            await self._elsewhere(scope, receive, send)
            return
        try:
            if path.endswith("/infer"):
                await self._infer(scope, receive, send)
            else:
                await self._tell(scope, send)
        except RequestFailed as error:
            await _fail(send, error, allow=b"POST" if path.endswith("/infer") else b"GET, HEAD")
        except Exception:  # noqa: BLE001 - one request must not end a connection that others use
            # As text: structlog's pictures of tracebacks take a tenth of a second each.
            structlog.get_logger().error("request_failed", path=path, traceback=traceback.format_exc())
            await _answer(send, 500, [format_error("internal error; the server's log tells more")], [_JSON])

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        model, version = _model_of(scope["path"])
        if scope["method"] != "POST":
            raise BadRequest(f"{scope['method']} is not possible here; use POST", status=405)
        self._gateway.find(model, version)  # or it is said before the body is read
        headers: dict[bytes, bytes] = dict(scope["headers"])
        body = await self._body(headers, receive)
        if body is None:
            return  # the client is gone
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding != b"identity":
            body = await _beside(len(body), decompress, body, encoding, self._limit_bytes)
        # Chosen when nothing is waited for until the request is in the queue: a version may leave meanwhile.
        served = self._gateway.find(model, version)
        if version is None:
            served = self._gateway.choose(model, headers)
        request = parse_request(body, _json_length_bytes(headers), served.signature, scope.get(JOURNEY))
        if version is None:
            self._gateway.copy(request, served)
        flow = headers.get(FLOW_HEADER)
        outputs = await served.infer(request, flow.decode("latin-1") if flow else "")
        parts, json_length_bytes = format_answer(request, outputs, model=served.model, version=served.version)
        fields = [_JSON]
        if json_length_bytes is not None:
            fields = [_OCTETS, (JSON_LENGTH_HEADER, b"%d" % json_length_bytes)]
        accepted = headers.get(b"accept-encoding")
        if accepted and (chosen := choose_encoding(accepted, sum(map(len, parts)))):
            plain = b"".join(parts)
            parts = [await _beside(len(plain), compress, plain, chosen)]
            fields.append((b"content-encoding", chosen))
        await _answer(send, 200, parts, fields)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None if the client went away."""
        limit_bytes = self._limit_bytes
        # Who asks before sending is answered before; the server has checked that the length is a number.
        if b"expect" in headers and int(headers.get(b"content-length", b"0")) > limit_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunks.append(message["body"])
            size_bytes += len(message["body"])
            if size_bytes > limit_bytes:
                # The rest is read and dropped, within bounds: a client that is cut off while it sends would
                # not see the answer.
                chunks.clear()
            more = message.get("more_body", False) and size_bytes <= _PATIENCE * limit_bytes
        if size_bytes > limit_bytes:
            raise self._too_large()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> BadRequest:
        return BadRequest(f"the body is larger than {self._limit_bytes:,} bytes", status=413)

    async def _tell(self, scope: Scope, send: Send) -> None:
        """What is asked for without a body."""
        path: str = scope["path"].rstrip("/")
        tells = ((pattern.fullmatch(path), tell) for pattern, tell in self._tells)
        found, tell = next((pair for pair in tells if pair[0]), (None, None))
        if found is None or tell is None:
            raise NotServed(f"there is nothing at {scope['path']}")
        if scope["method"] not in ("GET", "HEAD"):
            raise BadRequest(f"{scope['method']} is not possible here; use GET", status=405)
        status, body, kind = tell(self, **found.groupdict())
        await _answer(send, status, [body], [kind])

    def _metrics(self) -> _Told:
        state = ((one.model, one.version, one.metrics, one.gauges()) for one in self._gateway.all())
        return 200, exposition(state) + process_exposition(), _TEXT

    def _is_live(self) -> _Told:
        return 200, b'{"live":true}', _JSON

    def _is_ready(self) -> _Told:
        return 200, b'{"ready":true}', _JSON

    def _server(self) -> _Told:
        return 200, _SERVER, _JSON

    def _ready(self, model: str, version: str | None = None) -> _Told:
        served = self._gateway.find(model, version)
        body = orjson.dumps({"name": model, "ready": served.is_ready})
        return (200 if served.is_ready else 503), body, _JSON

    def _metadata(self, model: str, version: str | None = None) -> _Told:
        served = self._gateway.find(model, version)
        return 200, format_metadata(model, self._gateway.versions(model), served.signature), _JSON

    _tellers: ClassVar[tuple[tuple[Operation, Callable[..., _Told]], ...]] = (
        (LIVE, _is_live),
        (READY, _is_ready),
        (SERVER, _server),
        (MODEL, _metadata),
        (MODEL_READY, _ready),
        (VERSION, _metadata),
        (VERSION_READY, _ready),
        (METRICS, _metrics),
    )
    _tells = tuple((pattern_of(operation.path), tell) for operation, tell in _tellers)
    operations: ClassVar[tuple[Operation, ...]] = (
        INFER,
        VERSION_INFER,
        *(operation for operation, _ in _tellers),
    )

    async def _elsewhere(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._api is not None:
            await self._api(scope, receive, send)
        elif scope["type"] == "http":
            await _fail(send, NotServed(f"there is nothing at {scope['path']}"))


def _model_of(path: str) -> tuple[str, str | None]:
    """Model and version of ``/v2/models/MODEL[/versions/VERSION]/infer``."""
    # Not by patterns: this is asked for every request.
    match path.split("/"):
        case ["", "v2", "models", model, "infer"]:
            return model, None
        case ["", "v2", "models", model, "versions", version, "infer"]:
            return model, version
        case _:
            raise NotServed(f"there is nothing at {path}")


def _json_length_bytes(headers: dict[bytes, bytes]) -> int | None:
    length = headers.get(JSON_LENGTH_HEADER)
    if length is None:
        return None
    if not length.isdigit() or len(length) > 15:
        raise BadRequest("Inference-Header-Content-Length must be a number of bytes")
    return int(length)


async def _beside(size_bytes: int, work: Callable[..., bytes], *arguments: Any) -> bytes:
    if size_bytes < _IN_THREAD_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


async def refuse(send: Send, status: int, message: str) -> None:
    """Answer with an error."""
    await _answer(send, status, [format_error(message)], [_JSON])


async def _fail(send: Send, error: RequestFailed, allow: bytes = b"") -> None:
    fields = [_JSON]
    if error.status == 405:
        fields.append((b"allow", allow))
    if isinstance(error, TooBusy):
        fields.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if error.status == 413:
        fields.append((b"connection", b"close"))  # the rest of the body is not read
    await _answer(send, error.status, [format_error(str(error))], fields)


async def _answer(
    send: Send, status: int, parts: Iterable[bytes | memoryview], fields: list[_Header]
) -> None:
    parts = tuple(parts)
    length_bytes = sum(map(len, parts))
    *first, last = parts if length_bytes > _JOIN_BYTES else (b"".join(parts),)
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*fields, (b"content-length", b"%d" % length_bytes)],
        }
    )
    for part in first:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": last})
