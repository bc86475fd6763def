"""A small HTTP/1.1 client on bare connections: answers of 12 MB are counted, not kept, at little cost.

General clients hand out every chunk through several layers; at hundreds of megabytes a second that would be most of
what is measured. Connections are kept alive and used again, most recent first.
"""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from engines.errors import ConfigError

_BUFFER = 256 * 1024
_SLOW_BUFFER = 64 * 1024  # bytes in the kernel for a client that reads slowly, so that the server feels it
_LEFT_AFTER = 64 * 1024  # bytes after which a client that leaves while streaming has gone
_FAILED_PART = b"X-Status: "  # of a part in a multipart answer that is a problem, not an image


@dataclass
class HttpExchange:
    """What came back; times on `time.perf_counter`."""

    status: int = 0
    sent: float = 0.0
    first_byte: float | None = None  # of the body
    done: float | None = None  # when the last byte was read, or the exchange ended otherwise
    size: int = 0  # bytes of the body
    tail: bytes = b""
    failed_parts: int = 0
    complete: bool = False
    left: bool = False
    retry_after: float | None = None  # seconds, as the answer's header has it
    reason: str = ""  # why it is not complete


class Connection(asyncio.BufferedProtocol):
    """One exchange at a time; httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(_BUFFER))
        self._transport: asyncio.Transport
        self._over: asyncio.Future[None] | None = None
        self._resume: asyncio.TimerHandle | None = None
        self.reusable = True

    async def exchange(
        self, request: bytes, read_rate: float | None = None, leave_streaming: bool = False, keep_body: bool = False
    ) -> HttpExchange:
        """Send `request` and read its answer. A cancelled or failed exchange closes the connection."""
        self._exchange, self._read_rate, self._leave_streaming = HttpExchange(), read_rate, leave_streaming
        self._multipart = False
        self._kept = bytearray() if keep_body else None
        self._parser = httptools.HttpResponseParser(self)
        self._over = asyncio.get_running_loop().create_future()
        self._exchange.sent = self._began_reading = time.perf_counter()
        self._transport.write(request)
        try:
            await self._over
        except asyncio.CancelledError:
            self.close("cancelled")
            raise
        finally:
            self._over = None
        if self._kept is not None:
            self._exchange.tail = bytes(self._kept)
        return self._exchange

    def close(self, reason: str = "") -> None:
        self.reusable = False
        self._transport.abort()
        self._end(reason)

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport, by construction

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        if self._over is None or self._over.done():
            self.close()  # bytes that nobody asked for
            return
        try:
            self._parser.feed_data(self._view[:nbytes])
        except httptools.HttpParserError as error:
            self.close(f"not HTTP: {error}")
            return
        if self._leave_streaming and self._exchange.size >= _LEFT_AFTER and not self._over.done():
            self._exchange.left = True
            self.close("left")
        elif self._read_rate is not None:
            self._pace(self._read_rate)

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if self._resume is not None:
            self._resume.cancel()
        self._end(f"connection lost: {error or 'closed by the server'}")

    def _pace(self, rate: float) -> None:
        """Read no further until `rate` allows for what was read."""
        ahead = self._began_reading + self._exchange.size / rate - time.perf_counter()
        if ahead > 0 and not self._transport.is_closing():
            self._transport.pause_reading()
            self._resume = asyncio.get_running_loop().call_later(ahead, self._read_on)

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # The parser's side.

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"content-type":
                self._multipart = value.startswith(b"multipart/")
            case b"retry-after" if value.isdigit():  # a date is as good as none here
                self._exchange.retry_after = float(value)

    def on_headers_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange.first_byte is None:
            exchange.first_byte = self._began_reading = time.perf_counter()
        exchange.size += len(body)
        exchange.tail = body[-12:] if len(body) >= 12 else (exchange.tail + body)[-12:]
        if self._multipart:
            exchange.failed_parts += body.count(_FAILED_PART)
        if self._kept is not None:
            self._kept += body

    def on_message_complete(self) -> None:
        self._exchange.complete = True
        self.reusable = self.reusable and self._parser.should_keep_alive()
        self._end("")

    def _end(self, reason: str) -> None:
        if self._over is not None and not self._over.done():
            self._exchange.done = time.perf_counter()
            self._exchange.reason = reason
            self._over.set_result(None)


class Client:
    """Connections to one server, as many as are needed at once."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ConfigError(f"The URL of a server looks like http://127.0.0.1:8000, not {url}.")
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle: list[Connection] = []
        self.opened = 0

    def request(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> bytes:
        """A request as it goes over the wire."""
        fields = {"Host": f"{self._host}:{self._port}", "Content-Length": str(len(body)), **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body

    async def connect(self, slow: bool = False) -> Connection:
        """An idle connection or a new one. Raises OSError."""
        while self._idle and not slow:
            if (idle := self._idle.pop()).reusable:
                return idle
        self.opened += 1
        plain = socket.socket()
        plain.setblocking(False)
        if slow:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(plain, (self._host, self._port))
            _, connection = await loop.create_connection(Connection, sock=plain)
        except BaseException:
            plain.close()
            raise
        return connection

    def give_back(self, connection: Connection) -> None:
        if connection.reusable:
            self._idle.append(connection)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises OSError where there is no whole answer."""
        connection = await self.connect()
        exchange = await connection.exchange(self.request("GET", path), keep_body=True)
        self.give_back(connection)
        if not exchange.complete:
            raise ConnectionError(exchange.reason)
        return exchange.status, exchange.tail

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
