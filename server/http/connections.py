"""Limits on connections and request headers.

uvicorn's protocol based on httptools needs less than half the time of the one based on h11, but it limits neither the
headers nor the time until the first request. Both are added here, and rejections are problem documents.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engines.errors import PidError
from server.errors import HeadersTooLargeError, MalformedRequestError, TooManyConnectionsError
from server.http.auth import PUBLIC_PATHS
from server.http.context import error_response
from server.http.problem import PROBLEM_MEDIA_TYPE, problem
from server.metrics import Metrics
from server.settings import Settings


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits on the head of a request (request line and headers) and on connections.

    `scope["state"]["over_limit"]` is true on a connection over the limit, and `scope["state"]["abort"]()` closes the
    connection at once.
    """

    def __init__(self, settings: Settings, **arguments: Any) -> None:
        """Create the protocol of one connection; `arguments` are uvicorn's."""
        super().__init__(**arguments)
        self._settings = settings
        self._head_timer: asyncio.TimerHandle | None = None
        self._error: PidError | None = None
        self._expect_head()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the header timeout."""
        super().connection_made(transport)
        over_limit = len(self.connections) > self._settings.max_connections
        self.app_state = {**self.app_state, "over_limit": over_limit, "abort": transport.abort}
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the header timeout."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data, and reject a head that is too large before it is complete."""
        if self._in_head:
            self._start_head_timer()
            self._received += len(data)
        super().data_received(data)
        # The parser reports a header only when it is complete, so the bytes received are counted as well.
        too_large = self._in_head and self._received > self._settings.max_header_bytes
        if too_large and not self.transport.is_closing():
            self._error = self._headers_too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Start to count the headers of a request."""
        super().on_message_begin()
        self._headers = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count the bytes of the URL."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header and its bytes."""
        self._headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the header timeout; the body has its own."""
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect the next request of the connection."""
        super().on_message_complete()
        self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Send a problem document and close the connection; uvicorn calls this if a request cannot be parsed."""
        error = self._error or MalformedRequestError(
            "Malformed HTTP/1.1 request; check that the client uses http:// and not https://."
        )
        status, _, document = problem(error)
        body = json.dumps(document).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {PROBLEM_MEDIA_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """Abort an idle connection; close() would wait for a client that has stopped reading."""
        self.transport.abort()

    def _expect_head(self) -> None:
        self._in_head, self._received, self._headers, self._header_bytes = True, 0, 0, 0

    def _count(self, size: int) -> None:
        self._header_bytes += size
        settings = self._settings
        if self._header_bytes > settings.max_header_bytes or self._headers > settings.max_headers:
            self._error = self._headers_too_large()
            raise self._error  # the parser replaces it with its own error, which ends in send_400_response

    def _headers_too_large(self) -> HeadersTooLargeError:
        settings = self._settings
        return HeadersTooLargeError(
            f"A request may have {settings.max_headers} headers with {settings.max_header_bytes} bytes in total; "
            "send fewer or shorter ones."
        )

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._settings.header_timeout, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class ConnectionLimitMiddleware:
    """ASGI middleware that rejects requests on a connection over the limit, except for health and metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or respond with 503."""
        app = self._app
        if scope["type"] == "http" and scope["state"].get("over_limit") and scope["path"] not in PUBLIC_PATHS:
            error = TooManyConnectionsError("Connection limit reached; retry shortly.")
            app = error_response(error, scope["state"]["context"], self._metrics)
        await app(scope, receive, send)


def http_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """Return the configuration with which uvicorn serves `app`."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="asyncio",  # uvloop holds the GIL while the kernel copies a response, which delays the encoders
        http=partial(Connection, settings),  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]  # passed to call_later
        timeout_graceful_shutdown=5,
    )
