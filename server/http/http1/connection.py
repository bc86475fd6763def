"""One HTTP/1.1 connection: its phases, their limits, and the order of requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from typing import Any

import uvicorn
from starlette.types import Scope
from uvicorn.server import ServerState

from engines.errors import PidError
from server.errors import UnavailableError
from server.http.http1.body import Body, ChunkedBody, LengthBody
from server.http.http1.connections import RESERVE, HttpContext
from server.http.http1.deadline import Deadline
from server.http.http1.exchange import Exchange, asgi_scope, last_response
from server.http.http1.head import HeadReader, RequestHead
from server.http.http1.writer import Writer

log = logging.getLogger(__name__)

READ_AHEAD = 64 * 1024  # bytes received but not processed, above which reading pauses
LINGER_SECONDS = 2.0  # for a client to read its last response before the connection is closed
DISCARD_BYTES = 32 * 2**20  # of a body that nobody wants, so that its client gets the response instead of a reset
_RESET = struct.pack("ii", 1, 0)  # value of SO_LINGER with which closing a socket discards unsent data


class Connection(asyncio.Protocol):
    """HTTP/1.1 connection for `uvicorn.Server`.

    Requests are processed one at a time, in order. A connection is in one of three phases, each with a time limit:
    waiting for a head, an exchange (receiving a body and responding), or lingering after the last response, until the
    client has read it. `scope["state"]["over_limit"]` is true on a connection over the connection limit.
    """

    def __init__(
        self,
        context: HttpContext,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Create the protocol of one connection; all arguments but `context` are uvicorn's."""
        self._context, self._settings, self._metrics = context, context.settings, context.metrics
        self._app, self._server, self._state = config.loaded_app, server_state, app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._lower: asyncio.Transport | None = None  # that of the socket; another than `_transport` with TLS
        self._writer: Writer
        self._buffer = bytearray()  # received, not processed
        self._head = self._new_head()
        self._exchange: Exchange | None = None
        self._lingering = False
        self._discard_left = DISCARD_BYTES
        self._deadline = Deadline(self._loop, self._on_timeout)
        self._keeping_alive = False  # waiting for the first byte of a request after the first one
        self._last = False  # no further request is wanted
        self._requests = 0
        self._accepted = self._loop.time()

    # From the transport and the server

    def accept(self, transport: asyncio.Transport) -> None:
        """Count the connection, or refuse it if there are too many. With TLS, the handshake follows."""
        self._lower = transport
        self._use(transport)
        self._metrics.connections.inc()
        self._server.connections.add(self)  # type: ignore[arg-type]  # uvicorn calls only shutdown()
        excess = self._context.connections.add(self)
        if excess > RESERVE:
            self.abort("refused")
            return
        self._last = excess > 0
        self._state = {**self._state, "over_limit": self._last}
        self._context.connections.set_idle(self, True)
        self._deadline.set(self._settings.header_timeout, "header-timeout")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        if self._lower is None:
            self.accept(transport)
        else:
            self._use(transport)

    def _use(self, transport: asyncio.Transport) -> None:
        settings = self._settings
        self._transport = transport
        self._writer = Writer(transport, self._loop, settings.response_timeout, settings.min_read_rate, self._reset)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report to the application that the client has disconnected."""
        self._server.connections.discard(self)
        self._context.connections.remove(self)
        self._deadline.close()
        self._writer.close()
        self._end_exchange()

    def data_received(self, data: bytes) -> None:
        """Process the data, or keep it until the response to an earlier request is complete."""
        self._buffer += data
        exchange = self._exchange
        if self._lingering or (exchange is not None and exchange.is_early):
            self._discard()
        elif exchange is None or not exchange.body.complete:
            self._process()
        self._pause_if_ahead()

    def eof_received(self) -> None:
        """Stop working for a client that has closed its side; the transport then closes the connection."""
        self._end_exchange()

    def pause_writing(self) -> None:
        """Make the application wait until the client has read more."""
        self._writer.pause()

    def resume_writing(self) -> None:
        """Let the application continue."""
        self._writer.resume()

    def shutdown(self) -> None:
        """Close the connection after the response in progress; called by uvicorn."""
        self._last = True
        if self._exchange is None:
            self._close()

    def abort(self, reason: str) -> None:
        """Close the connection at once and count `reason`."""
        self._metrics.aborted_connections.labels(reason).inc()
        self._transport.abort()

    # Requests

    def _process(self) -> None:
        """Process the buffer, at most to the end of one request."""
        try:
            if self._exchange is None:
                self._read_head()
            else:
                self._exchange.feed(self._buffer)
        except PidError as error:
            self._metrics.rejections.labels(error.code).inc()
            self._fail(error)
            return
        if self._exchange is not None and self._exchange.body.complete:
            self._deadline.clear()

    def _read_head(self) -> None:
        head = self._head.feed(self._buffer)
        if head is None:
            if self._keeping_alive:
                self._keeping_alive = False
                self._deadline.set(self._settings.header_timeout, "header-timeout")
            return
        exchange = Exchange(
            head,
            self._new_body(head),
            self._writer,
            self._server.default_headers,
            wants_more=self._wants_more,
            on_read=self._resume_reading,
            on_end=self._response_complete,
        )
        exchange.feed(self._buffer)
        self._exchange = exchange
        self._requests += 1
        self._context.connections.set_idle(self, False)
        if not exchange.body.complete:
            # The application responds to a slow body that it reads. This is the limit for one that it ignores.
            self._deadline.set(self._settings.body_timeout + LINGER_SECONDS, "body-timeout")
        scope = asgi_scope(head, self._transport, self._state)
        task = self._loop.create_task(self._run(exchange, scope))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    async def _run(self, exchange: Exchange, scope: Scope) -> None:
        """Call the application. Whatever it does, the client gets a complete response or a closed connection."""
        error: BaseException | None = None
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # the server stops
            error = UnavailableError("The server shut down before the request was finished; retry.")
        except Exception as unexpected:
            log.exception("unexpected error in the response to %s %s", scope["method"], scope["path"])
            error = unexpected
        if exchange is self._exchange and not exchange.disconnected:
            self._fail(error or PidError("The server did not respond; report this."))

    def _response_complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None  # noqa: S101  it has called this method
        self._server.total_requests += 1
        if self._transport.is_closing():
            return
        if not exchange.closes and not self._last:
            self._expect_request()
        elif exchange.head.keep_alive or not exchange.body.complete or self._buffer:
            self._linger()
        else:
            self._close()

    def _expect_request(self) -> None:
        self._head = self._new_head()
        self._context.connections.set_idle(self, True)
        self._keeping_alive = True
        self._deadline.set(self._settings.keep_alive_timeout, "keep-alive-timeout")
        self._resume_reading()
        if self._buffer:
            self._process()
            self._pause_if_ahead()

    def _wants_more(self) -> bool:
        settings, age = self._settings, self._loop.time() - self._accepted
        return not (
            self._last
            or self._requests >= settings.max_requests_per_connection
            or age >= settings.max_connection_age
            or self._context.is_draining()
        )

    # The end of a connection

    def _fail(self, error: BaseException) -> None:
        """End the request in progress, which may be malformed, with an error."""
        exchange = self._exchange
        self._end_exchange()
        if exchange is None or not exchange.started:
            self._writer.write(last_response(error, self._server.default_headers))
            self._linger()
        elif exchange.is_framed:
            self._close()  # the client notices that the response is incomplete
        else:
            self._reset("incomplete")

    def _end_exchange(self) -> None:
        if self._exchange is not None:
            self._exchange.disconnect()
            self._exchange = None

    def _linger(self) -> None:
        """Close this side, and wait for the client to close the other.

        If the connection were closed while the client still sends, the client would get a reset, which can discard the
        response before it has been read.
        """
        self._lingering = True
        self._context.connections.set_idle(self, True)
        self._deadline.set(LINGER_SECONDS, "linger-timeout")
        if self._transport.can_write_eof() and not self._transport.get_write_buffer_size():  # not with TLS
            with contextlib.suppress(OSError):  # the client has disconnected already
                self._transport.write_eof()
        self._resume_reading()
        self._discard()

    def _discard(self) -> None:
        self._discard_left -= len(self._buffer)
        self._buffer.clear()
        if self._discard_left < 0:
            self._transport.pause_reading()

    def _close(self) -> None:
        """Close the connection once everything has been sent."""
        self._transport.close()
        if self._lower is not None and not self._transport.get_write_buffer_size():
            self._lower.close()  # TLS would wait until the client closes its side, which idle ones may never do

    def _reset(self, reason: str) -> None:
        """Abort the connection, and discard what the kernel has not sent yet."""
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.abort(reason)

    # Reading and time

    def _new_head(self) -> HeadReader:
        return HeadReader(self._settings.max_header_bytes, self._settings.max_headers)

    def _new_body(self, head: RequestHead) -> Body:
        if head.chunked:
            settings = self._settings
            return ChunkedBody(self._context.max_wire_bytes, settings.max_header_bytes, settings.max_headers)
        return LengthBody(head.content_length)

    def _resume_reading(self) -> None:
        self._transport.resume_reading()

    def _pause_if_ahead(self) -> None:
        """Pause reading if more has arrived than can be processed now.

        As long as reading continues, a disconnected client is noticed.
        """
        unread = 0 if self._exchange is None else self._exchange.buffered
        if len(self._buffer) > READ_AHEAD or unread > READ_AHEAD:
            self._transport.pause_reading()

    def _on_timeout(self, reason: str) -> None:
        self._metrics.aborted_connections.labels(reason).inc()
        self._close()  # sends what the client has not read yet, which the writer limits
