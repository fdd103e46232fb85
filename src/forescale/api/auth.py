"""Who may use the management interface: those who know a token."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import orjson

from forescale.api.http import Application, Receive, Scope, Send
from forescale.core.errors import InvalidInput

_LEAST = 16  # characters
_WHY = orjson.dumps({"error": "this needs a token that the server knows: set FORESCALE_TOKEN"})


class TokenCheck:
    """An application that hands on requests with a token, and those for the OpenAPI document."""

    def __init__(self, app: Application, tokens: Iterable[str]) -> None:
        self._app = app
        # Digests are of one length, so that comparing them tells nothing about that of a token either.
        self._digests = [_digest(token.encode()) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/openapi.json" or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(_WHY)),
            (b"www-authenticate", b'Bearer realm="forescale"'),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": _WHY})

    def _is_known(self, scope: Scope) -> bool:
        said = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = said.partition(b" ")
        digest = _digest(token.strip())
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(found)


def read_tokens(path: Path) -> tuple[str, ...]:
    """Tokens of a file, one a line.

    Raises:
        InvalidInput: it cannot be read, has none, or one that is too short or could not be sent.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not a text file with tokens") from error
    tokens = tuple(line for line in lines if line)
    if not tokens:
        raise InvalidInput(f"{path} holds no token: put one into it, for instance of 'openssl rand -hex 32'")
    for number, token in enumerate(tokens, 1):
        if len(token) < _LEAST or not token.isascii() or not token.isprintable() or " " in token:
            raise InvalidInput(
                f"{path}: token {number} must be at least {_LEAST} ASCII characters without spaces"
            )
    return tokens


def _digest(token: bytes) -> bytes:
    return sha256(token).digest()
