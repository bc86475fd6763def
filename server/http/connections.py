"""The connection limit, and the configuration with which uvicorn serves the application."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import TooManyConnectionsError
from server.http.auth import PROBE_PATHS
from server.http.context import error_response
from server.http.http1.connection import Connection
from server.http.http1.connections import Connections, HttpContext
from server.http.http1.tls import tls_connection
from server.lifecycle import State
from server.metrics import Metrics
from server.service import DecodeService

MIN_WIRE_BYTES = 2 * 2**20
# Connections that asyncio accepts before it looks at them. More would use up the descriptors before any is evicted.
ACCEPT_BURST = 16
WIRE_FACTOR = 8  # chunks of one byte make a body six times as large


class ConnectionLimitMiddleware:
    """ASGI middleware that rejects requests on a connection over the limit, except for health and metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or respond with 503."""
        app = self._app
        if scope["type"] == "http" and scope["state"].get("over_limit") and scope["path"] not in PROBE_PATHS:
            error = TooManyConnectionsError("Connection limit reached; retry shortly.")
            app = error_response(error, scope["state"]["context"], self._metrics)
        await app(scope, receive, send)


def http_config(app: ASGIApp, service: DecodeService, tls: ssl.SSLContext | None = None) -> uvicorn.Config:
    """Return the configuration with which uvicorn serves `app`, the application of `service`.

    Args:
        app: The application.
        service: Its service, with the settings.
        tls: Context for TLS on all connections.
    """
    settings, metrics = service.settings, service.metrics
    connections = Connections(settings.max_connections)
    metrics.open_connections.labels("idle").set_function(connections.idle)
    metrics.open_connections.labels("active").set_function(connections.active)
    metrics.connection_limit.set(settings.max_connections)
    context = HttpContext(
        settings,
        metrics,
        connections,
        max_wire_bytes=max(MIN_WIRE_BYTES, WIRE_FACTOR * service.limits.max_body_bytes),
        is_draining=lambda: service.lifecycle.state is State.DRAINING,
    )
    connection: Callable[..., object] = partial(Connection, context=context)
    if tls is not None:
        connection = partial(tls_connection, tls, context=context)
    return uvicorn.Config(
        app,
        loop="asyncio",  # uvloop holds the GIL while the kernel copies a response, which delays the encoders
        http=connection,  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # clients could use X-Forwarded-For to choose their fair share
        backlog=ACCEPT_BURST,
        timeout_graceful_shutdown=5,
    )
