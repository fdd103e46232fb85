"""What stands between the port and the application: only what is asked for; the rest costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from forescale.core.clock import Clock
from forescale.core.errors import InvalidInput
from forescale.engine.serve.access_log import AccessLog
from forescale.engine.serve.app import AsgiApp
from forescale.engine.serve.hosts import HostCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class Middleware:
    """What is to stand there.

    Attributes:
        names: under which requests are answered, besides addresses and localhost; None: under any.
        access_log: file that gets a line for each request.
        traces: URL of an OpenTelemetry collector (OTLP over HTTP).
    """

    names: tuple[str, ...] | None = None
    access_log: Path | None = None
    traces: str | None = None

    def check(self) -> None:
        """Whether it can be set up.

        Raises:
            InvalidInput: it cannot.
        """
        if self.access_log is not None:
            try:
                self.access_log.open("ab").close()
            except OSError as error:
                raise InvalidInput(f"cannot write {self.access_log}: {error.strerror}") from error
        if self.traces is not None:
            if not self.traces.startswith(("http://", "https://")):
                raise InvalidInput(f"{self.traces!r} is not the URL of a collector")
            try:
                for module in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
                    import_module(module)
            except ModuleNotFoundError as error:
                raise InvalidInput(f"traces need {error.name}: pip install 'forescale[otel]'") from error


@contextlib.asynccontextmanager
async def wrapped(app: AsgiApp, middleware: Middleware, clock: Clock) -> AsyncGenerator[AsgiApp]:
    """The application with that in front of it; at the end all is written down."""
    async with contextlib.AsyncExitStack() as stack:
        if middleware.traces is not None:
            from forescale.engine.serve.tracing import Tracing, otlp  # noqa: PLC0415 - only those who trace

            app = tracing = Tracing(app, otlp(middleware.traces), clock)
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        if middleware.names is not None:
            app = HostCheck(app, middleware.names)
        if middleware.access_log is not None:
            app = log = AccessLog(app, middleware.access_log, clock)
            stack.push_async_callback(log.close)
        yield app
