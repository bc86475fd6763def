"""Traces with OpenTelemetry; imported only if traces are exported.

There is one span per decode request, in the caller's trace if the request has a `traceparent` header, with a child
per stage and step of each image. Stages are recorded in `ImageStream.spans` and exported after the request has ended,
so that no device thread waits for a tracer.
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
    raise ConfigError(f"Traces need OpenTelemetry ({error}); run pip install 'pid-decode-server[otel]'.") from None


EXPORT_TIMEOUT = 2  # seconds, including retries; the exit of the process waits for the last export


def exporter(endpoint: str) -> SpanExporter:
    """Return the exporter of spans to `endpoint`, over OTLP/HTTP."""
    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT)


def tracer_provider(endpoint: str) -> TracerProvider:
    """Return a provider that exports spans on a background thread.

    The OTEL_* environment variables configure sampling and the name of the service.
    """
    resource = Resource.create({SERVICE_NAME: "pid-decode-server"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter(endpoint)))
    return provider


class TracingMiddleware:
    """ASGI middleware that traces decode requests."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app, self._tracer = app, provider.get_tracer("server")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, in a new span if it is for a decode."""
        context: RequestContext | None = scope["state"]["context"] if scope["type"] == "http" else None
        if context is None or context.route is None:
            await self._app(scope, receive, send)
            return
        caller = self._propagator.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span(f"{scope['method']} {context.route}", caller, SpanKind.SERVER)
        context.fields["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        context.spans = [] if span.is_recording() else None
        try:
            await self._app(scope, receive, send)
        finally:
            if span.is_recording():
                self._describe(span, context, scope)
                self._add_stages(set_span_in_context(span), context)
            span.end()

    def _describe(self, span: Span, context: RequestContext, scope: Scope) -> None:
        fields = context.fields
        span.set_attributes(
            {
                "http.request.method": scope["method"],
                "http.route": context.route or "",
                "http.response.status_code": context.status,
                "http.response.body.size": context.bytes_out,
                "pid.request_id": context.request_id,
                **{
                    f"pid.{name}": fields[name]
                    for name in ("size", "images", "steps", "seed", "errors")
                    if name in fields
                },
            }
        )
        if context.status >= 500:
            span.set_status(Status(StatusCode.ERROR, ", ".join(fields.get("errors", ()))))

    def _add_stages(self, parent: Context, context: RequestContext) -> None:
        epoch = time.time() - time.monotonic()
        for image, stage in context.spans or ():
            start, end = (round((epoch + seconds) * 1e9) for seconds in (stage.start, stage.end))
            span = self._tracer.start_span(stage.stage, parent, attributes={"pid.image": image}, start_time=start)
            span.end(end)
