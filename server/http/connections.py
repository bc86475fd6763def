"""Connections: how many, how long they may idle, and how much header they may send how slowly.

uvicorn's parser on httptools, at under half the cost of the one on h11, has no limit on headers and no time limit
before the first request; both are added here. What is refused is refused as a problem document.
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
from server.errors import (
    HeadersTooLargeError,
    MalformedRequestError,
    TooManyConnectionsError,
)
from server.http.auth import PUBLIC_PATHS
from server.http.context import refusal
from server.http.problem import PROBLEM_MEDIA_TYPE, problem
from server.metrics import Metrics
from server.settings import Settings


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits. `scope["state"]` tells whether it is one too many, and how to cut it off."""

    def __init__(self, limits: Settings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._refusal: PidError | None = None
        self._expect_head()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        crowded = len(self.connections) > self._limits.max_connections
        self.app_state = {**self.app_state, "over_limit": crowded, "abort": transport.abort}
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._time_head()
            self._received += len(data)
        super().data_received(data)
        # The parser keeps a header to itself until it is complete, so count what went in, too.
        if self._in_head and self._received > self._limits.max_header and not self.transport.is_closing():
            self._refusal = self._too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._fields = self._size = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timing()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Whatever ends the parsing of a request: a problem document, and the connection is closed."""
        status, _, document = problem(self._refusal or MalformedRequestError("This is no HTTP/1.1 request."))
        body = json.dumps(document).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {PROBLEM_MEDIA_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # not close, which would wait for a client that has stopped reading

    def _expect_head(self) -> None:
        self._in_head, self._received, self._fields, self._size = True, 0, 0, 0

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self._limits.max_header or self._fields > self._limits.max_header_fields:
            self._refusal = self._too_large()
            raise self._refusal  # the parser turns it into an error of its own, which ends in send_400_response

    def _too_large(self) -> HeadersTooLargeError:
        limits = self._limits
        return HeadersTooLargeError(
            f"A request may have up to {limits.max_header_fields} headers and {limits.max_header} bytes of them."
        )

    def _time_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.header_seconds, self.transport.abort)

    def _stop_timing(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class ConnectionLimitMiddleware:
    """Refuses requests on a connection that is one too many, but for health and metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["state"].get("over_limit") and scope["path"] not in PUBLIC_PATHS:
            error = TooManyConnectionsError("This server has all the connections it takes; try again in a moment.")
            app = refusal(error, scope["state"]["context"], self._metrics)
        await app(scope, receive, send)


def http_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="asyncio",  # uvloop keeps the GIL while the kernel copies an answer, and encoders wait for it meanwhile
        http=partial(Connection, settings),  # type: ignore[arg-type]  # it is only ever called
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]  # goes to call_later
        timeout_graceful_shutdown=5,
    )
