"""OpenTelemetry traces of requests: at the gateway, in the queue, and at replicas.

A client's ``traceparent`` (W3C Trace Context) is taken up. Nothing here runs, nor is OpenTelemetry imported,
unless traces are asked for.
"""

from __future__ import annotations

import re
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forescale import __version__
from forescale.core.clock import Clock
from forescale.engine.serve.app import JOURNEY, AsgiApp, Message, Receive, Scope, Send
from forescale.engine.serve.journey import Journey

_NAMES = re.compile(r"(/(?:models|versions|deployments|aliases|rollouts))/[^/]+")
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """An application that traces what another one answers.

    Args:
        exporter: where finished spans go, in batches, from a thread of its own.
    """

    def __init__(self, app: AsgiApp, exporter: SpanExporter, clock: Clock) -> None:
        self._app = app
        self._clock = clock
        # How many requests are traced is the environment's to say, as OpenTelemetry has it.
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: "forescale"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer: Tracer = self._provider.get_tracer("forescale", __version__)

    def close(self) -> None:
        """Hand over what is finished; may take seconds if nobody takes it."""
        self._provider.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        time_of = _Times(self._clock)
        span = self._begin(scope, time_of(self._clock.monotonic_s()))
        if not span.is_recording():
            await self._app(scope, receive, send)
            return
        journey = scope[JOURNEY] = Journey()

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            end_s = self._clock.monotonic_s()
            self._trace(journey, end_s, time_of, set_span_in_context(span))
            span.end(time_of(end_s))

    def _begin(self, scope: Scope, at_ns: int) -> Span:
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        path = scope["path"]
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "url.path": path,
            "url.scheme": "http",
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        if scope.get("client"):
            attributes["client.address"] = scope["client"][0]
        return self._tracer.start_span(
            f"{scope['method']} {_NAMES.sub(_placeholder, path)}",
            _PROPAGATOR.extract(carrier),
            SpanKind.SERVER,
            attributes,
            start_time=at_ns,
        )

    def _trace(self, journey: Journey, end_s: float, time_of: _Times, context: Context) -> None:
        """Spans for where the request has been, one after the other."""
        if journey.arrived_s is None:
            return
        begin_s, name, known = journey.arrived_s, "queue", dict[str, Any]()
        for leg in journey.legs:
            self._span(name, time_of(begin_s), time_of(leg.sent_s), context, known)
            begin_s, name = leg.sent_s, "replica"
            known = {"forescale.replica": leg.replica, "forescale.batch_rows": leg.batch_rows}
        self._span(name, time_of(begin_s), time_of(end_s), context, known)

    def _span(self, name: str, begin_ns: int, end_ns: int, context: Context, known: dict[str, Any]) -> None:
        self._tracer.start_span(name, context, attributes=known, start_time=begin_ns).end(end_ns)


class _Times:
    """Nanoseconds since the epoch, as traces have them, for monotonic times of one request."""

    def __init__(self, clock: Clock) -> None:
        self._offset_s = clock.wall_s() - clock.monotonic_s()

    def __call__(self, monotonic_s: float) -> int:
        return round((self._offset_s + monotonic_s) * 1e9)


def otlp(url: str) -> SpanExporter:
    """Sends spans to a collector, as OTLP over HTTP.

    Args:
        url: of the collector, without the path.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    return OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces")


def _placeholder(found: re.Match[str]) -> str:
    return f"{found[1]}/{{{found[1].strip('/').removesuffix('s')}}}"
