"""HTTP/1.1 client for load tests that counts the bytes of responses without storing them, at little CPU cost.

General-purpose clients pass every chunk through several layers. At hundreds of megabytes per second, these layers would
dominate the measurements. Connections are kept alive and reused, the most recently used one first.
"""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from engines.errors import ConfigError

_BUFFER = 256 * 1024  # bytes
_SLOW_BUFFER = 64 * 1024  # bytes in the kernel for a slow reader: small, so that back-pressure reaches the server
_DISCONNECT_AFTER = 64 * 1024  # bytes of the body that a client reads before it disconnects while streaming
_FAILED_PART = b"X-Status: "  # header of a part of a multipart response that holds a problem document, not an image
_TAIL = 12  # bytes; the size of PNG's last chunk


@dataclass
class HttpExchange:
    """A request and its response. Times are on `time.perf_counter`."""

    status: int = 0
    sent: float = 0.0
    first_byte: float | None = None  # of the body
    done: float | None = None  # when the last byte was read or the exchange ended early
    size: int = 0  # bytes of the body
    tail: bytes = b""  # last bytes of the body, or all of it if the caller asked to keep it
    failed_parts: int = 0
    complete: bool = False
    disconnected: bool = False  # the client closed the connection on purpose
    retry_after: float | None = None  # seconds, from the Retry-After header
    reason: str = ""  # why the response is incomplete


class Connection(asyncio.BufferedProtocol):
    """One connection, one exchange at a time. httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(_BUFFER))
        self._transport: asyncio.Transport
        self._finished: asyncio.Future[None] | None = None
        self._resume: asyncio.TimerHandle | None = None
        self.reusable = True
        self.used = False  # True after the first exchange

    async def exchange(
        self,
        request: bytes,
        read_rate: float | None = None,
        read_after: float | None = None,
        disconnect_streaming: bool = False,
        keep_body: bool = False,
    ) -> HttpExchange:
        """Send a request and read its response.

        Args:
            request: Head and body as bytes.
            read_rate: Bytes per second to read; None reads as fast as possible.
            read_after: Seconds after sending the request during which nothing is read.
            disconnect_streaming: Close the connection once part of the body has been read.
            keep_body: Return the whole body in `tail`.

        A cancelled or failed exchange closes the connection.
        """
        self._exchange, self._read_rate, self._disconnect_streaming = HttpExchange(), read_rate, disconnect_streaming
        self._multipart = False
        self._body = bytearray() if keep_body else None
        self._parser = httptools.HttpResponseParser(self)
        self._finished = asyncio.get_running_loop().create_future()
        self._exchange.sent = self._began_reading = time.perf_counter()
        self._transport.write(request)
        if read_after is not None:
            self._pause_reading(read_after)
        try:
            await self._finished
        except asyncio.CancelledError:
            self.close("cancelled")
            raise
        finally:
            self._finished, self.used = None, True
        if self._body is not None:
            self._exchange.tail = bytes(self._body)
        return self._exchange

    def close(self, reason: str = "") -> None:
        """Close the connection and end a running exchange with `reason`."""
        self.reusable = False
        self._transport.abort()
        self._finish(reason)

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = transport  # type: ignore[assignment]  # a stream transport, by construction

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer that the transport reads into."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Parse `nbytes` new bytes of the buffer."""
        if self._finished is None or self._finished.done():
            self.close()  # bytes without a request
            return
        try:
            self._parser.feed_data(self._view[:nbytes])
        except httptools.HttpParserError as error:
            self.close(f"invalid HTTP: {error}")
            return
        if self._disconnect_streaming and self._exchange.size >= _DISCONNECT_AFTER and not self._finished.done():
            self._exchange.disconnected = True
            self.close("disconnected")
        elif self._read_rate is not None:
            self._pace(self._read_rate)

    def connection_lost(self, error: Exception | None) -> None:
        """End a running exchange as incomplete."""
        self.reusable = False
        if self._resume is not None:
            self._resume.cancel()
        self._finish(f"connection lost: {error or 'closed by the server'}")

    def _pace(self, rate: float) -> None:
        """Pause reading until the bytes read so far are within `rate`."""
        ahead = self._began_reading + self._exchange.size / rate - time.perf_counter()
        if ahead > 0 and not self._transport.is_closing():
            self._pause_reading(ahead)

    def _pause_reading(self, seconds: float) -> None:
        self._transport.pause_reading()
        self._resume = asyncio.get_running_loop().call_later(seconds, self._resume_reading)

    def _resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        """Record the headers that matter here."""
        match name.lower():
            case b"content-type":
                self._multipart = value.startswith(b"multipart/")
            case b"retry-after" if value.isdigit():  # a date is ignored
                self._exchange.retry_after = float(value)

    def on_headers_complete(self) -> None:
        """Record the status."""
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Count a piece of the body and keep its tail."""
        exchange = self._exchange
        if exchange.first_byte is None:
            exchange.first_byte = self._began_reading = time.perf_counter()
        exchange.size += len(body)
        exchange.tail = body[-_TAIL:] if len(body) >= _TAIL else (exchange.tail + body)[-_TAIL:]
        if self._multipart:
            exchange.failed_parts += body.count(_FAILED_PART)
        if self._body is not None:
            self._body += body

    def on_message_complete(self) -> None:
        """End the exchange as complete."""
        self._exchange.complete = True
        self.reusable = self.reusable and self._parser.should_keep_alive()
        self._finish("")

    def _finish(self, reason: str) -> None:
        if self._finished is not None and not self._finished.done():
            self._exchange.done = time.perf_counter()
            self._exchange.reason = reason
            self._finished.set_result(None)


class Client:
    """Pool of connections to one server, without an upper limit."""

    def __init__(self, url: str) -> None:
        """Parse `url`, of the form http://host:port.

        Raises:
            ConfigError: The URL has another form.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ConfigError(f"{url} is not a valid server URL; use the form http://127.0.0.1:8000.")
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle: list[Connection] = []
        self.opened = 0  # connections opened so far

    def request(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> bytes:
        """Serialise a request, head and body."""
        fields = {"Host": f"{self._host}:{self._port}", "Content-Length": str(len(body)), **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body

    async def connect(self, slow: bool = False) -> Connection:
        """Return an idle connection or open a new one; a slow reader always gets a new one, with a small buffer.

        Raises:
            OSError: The server cannot be reached.
        """
        while self._idle and not slow:
            if (idle := self._idle.pop()).reusable:
                return idle
        self.opened += 1
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Nagle's algorithm could delay a request by 40 ms
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, (self._host, self._port))
            _, connection = await loop.create_connection(Connection, sock=sock)
        except BaseException:
            sock.close()
            raise
        return connection

    def release(self, connection: Connection) -> None:
        """Return a connection to the pool if it can be reused."""
        if connection.reusable:
            self._idle.append(connection)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Return the status and body of a GET request.

        Raises:
            OSError: The server cannot be reached or the response is incomplete.
        """
        connection = await self.connect()
        exchange = await connection.exchange(self.request("GET", path, headers), keep_body=True)
        self.release(connection)
        if not exchange.complete:
            raise ConnectionError(exchange.reason)
        return exchange.status, exchange.tail

    def close(self) -> None:
        """Close all idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
