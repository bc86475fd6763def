"""Traces by OpenTelemetry, where --traces asks for them: nothing else imports this file.

A span a request, in the caller's trace where its `traceparent` names one, with a child for each stage of each image and
for each step. Stages are recorded in `ImageStream.spans` and exported once the request is over, so that the device's
thread never waits for a tracer.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engines.errors import ConfigError
from server.http.context import RequestContext

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigError(f"--traces needs OpenTelemetry ({error}); pip install 'pid-decode-server[otel]'.") from None


def exporter(endpoint: str) -> SpanExporter:
    return OTLPSpanExporter(
        endpoint=endpoint, timeout=2
    )  # seconds, tries included; the end of the process waits for it


def tracer_provider(endpoint: str) -> TracerProvider:
    """Sends spans to `endpoint` from a thread of its own; sampling and the service's name follow OTEL_* variables."""
    resource = Resource.create({SERVICE_NAME: "pid-decode-server"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter(endpoint)))
    return provider


class TracingMiddleware:
    """Traces requests to /decode."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app, self._tracer = app, provider.get_tracer("server")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/decode":
            await self._app(scope, receive, send)
            return
        exchange: RequestContext = scope["state"]["context"]
        caller = self._propagator.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span("POST /decode", caller, SpanKind.SERVER)
        exchange.fields["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        exchange.spans = [] if span.is_recording() else None
        try:
            await self._app(scope, receive, send)
        finally:
            if span.is_recording():
                self._describe(span, exchange, scope)
                self._add_stages(set_span_in_context(span), exchange)
            span.end()

    def _describe(self, span: Span, exchange: RequestContext, scope: Scope) -> None:
        fields = exchange.fields
        span.set_attributes(
            {
                "http.request.method": scope["method"],
                "http.route": "/decode",
                "http.response.status_code": exchange.status,
                "http.response.body.size": exchange.bytes_out,
                "pid.request_id": exchange.request_id,
                **{
                    f"pid.{name}": fields[name]
                    for name in ("size", "images", "steps", "seed", "errors")
                    if name in fields
                },
            }
        )
        if exchange.status >= 500:
            span.set_status(Status(StatusCode.ERROR, ", ".join(fields.get("errors", ()))))

    def _add_stages(self, parent: Context, exchange: RequestContext) -> None:
        epoch = time.time() - time.monotonic()
        for image, stage in exchange.spans or ():
            start, end = (round((epoch + seconds) * 1e9) for seconds in (stage.start, stage.end))
            span = self._tracer.start_span(stage.stage, parent, attributes={"pid.image": image}, start_time=start)
            span.end(end)
