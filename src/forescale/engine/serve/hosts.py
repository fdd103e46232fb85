"""Requests are answered only under names of this machine.

A page that somebody visits can let its own name point to 127.0.0.1 ("DNS rebinding"), and then ask a server
there as if it were its own: the browser sees one origin. But the request says under which name it came.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Iterable

from forescale.engine.serve.app import AsgiApp, Receive, Scope, Send, refuse

_REMEMBERED = 100


class HostCheck:
    """An application that hands on what comes under an address, as localhost, or under a given name."""

    def __init__(self, app: AsgiApp, names: Iterable[str] = ()) -> None:
        self._app = app
        self._names = {name.lower() for name in names}
        self._known: set[bytes] = set()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # No coroutine of its own: this is on every request's way.
        for name, value in scope["headers"]:
            if name == b"host":
                if value not in self._known and not self._is_ours(value):
                    return refuse(
                        send,
                        421,
                        f"this server is not {value.decode('latin-1')[:100]!r}; if it should be, start it "
                        "with --allow-host",
                    )
                break
        return self._app(scope, receive, send)

    def _is_ours(self, host: bytes) -> bool:
        text = host.decode("latin-1").lower()
        name, bracket, _ = text.removeprefix("[").partition("]")
        if not bracket:
            name = text.partition(":")[0]
        if not (name in self._names or name == "localhost" or _is_address(name)):
            return False
        if len(self._known) < _REMEMBERED:
            self._known.add(host)
        return True


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
