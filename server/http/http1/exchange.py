"""One request and its response, as ASGI's `receive` and `send`."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from starlette.types import Message, Scope

from server.http.http1.body import Body
from server.http.http1.head import RawHeaders, RequestHead
from server.http.http1.writer import Writer
from server.http.problem import PROBLEM_MEDIA_TYPE, problem

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_BODILESS = (204, 304)
_HEAD = re.compile(rb"[^\r\n]*\r\n(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")


class Exchange:
    """State of one request and its response.

    The response ends the connection (`closes`) if the client asked for it, if the server does not want another request,
    or if the body has not arrived in full when the response starts.
    """

    def __init__(
        self,
        head: RequestHead,
        body: Body,
        writer: Writer,
        default_headers: RawHeaders,
        wants_more: Callable[[], bool],
        on_read: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Begin an exchange.

        Args:
            head: The request.
            body: Its body, of which nothing has been read.
            writer: Where the response is written.
            default_headers: Headers of every response.
            wants_more: Returns true if the server accepts another request on the connection.
            on_read: Called when the application waits for the body.
            on_end: Called once the response is complete.
        """
        self.head, self.body = head, body
        self.started = self.complete = self.disconnected = False
        self.closes = not head.keep_alive
        self.buffered = 0  # bytes of the body that the application has not read
        self._writer, self._default_headers = writer, default_headers
        self._wants_more, self._on_read, self._on_end = wants_more, on_read, on_end
        self._content: list[bytes] = []
        self._body_read = False
        self._continue_due = head.expects_continue
        self._changed = asyncio.Event()
        self._chunked = False
        self._left: int | None = None  # bytes that Content-Length still allows
        self._held = b""  # the head of the response, sent in one packet with the beginning of the body
        self._loop = asyncio.get_running_loop()

    # From the connection

    @property
    def is_early(self) -> bool:
        """True if the response started before the body had arrived; the rest of the body is not wanted."""
        return self.started and not self.body.complete

    @property
    def is_framed(self) -> bool:
        """True if the client can tell an incomplete response from a complete one."""
        return self._chunked or self._left is not None

    def feed(self, buffer: bytearray) -> None:
        """Move bytes of the body from the beginning of `buffer` to the application."""
        content = self.body.feed(buffer)
        if content:
            self._continue_due = False
            self._content.append(content)
            self.buffered += len(content)
        if content or self.body.complete:
            self._changed.set()

    def disconnect(self) -> None:
        """Report to the application that the client has disconnected, and ignore what it sends."""
        self.disconnected = True
        self._changed.set()

    # From the application

    async def receive(self) -> Message:
        """Return the next part of the body, or http.disconnect once the client has disconnected or has its response."""
        while not (self.disconnected or self.complete):
            if self._content or (self.body.complete and not self._body_read):
                return self._body_message()
            if self._continue_due and not self.started:
                self._continue_due = False
                self._writer.write(CONTINUE)
            self._on_read()
            self._changed.clear()
            await self._changed.wait()
        return {"type": "http.disconnect"}

    def _body_message(self) -> Message:
        content = self._content[0] if len(self._content) == 1 else b"".join(self._content)
        self._content.clear()
        self.buffered = 0
        self._body_read = self.body.complete
        return {"type": "http.request", "body": content, "more_body": not self._body_read}

    async def send(self, message: Message) -> None:
        """Send the start or a part of the body of the response; wait if the client reads slowly."""
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.started:
            self._start(message["status"], message.get("headers", ()))
        elif kind == "http.response.body" and self.started and not self.complete:
            more = message.get("more_body", False)
            self._write_body(message.get("body", b""), more)
            await self._writer.drain()
            if not more and not self.disconnected:
                self.complete = True
                self._changed.set()
                self._on_end()
        else:
            raise RuntimeError(f"The application sent {kind} out of turn.")

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        closes = self.closes or not (self.body.complete and self._wants_more())
        lines = list(self._default_headers)
        for name, value in headers:
            lower = name.lower()
            if lower == b"connection":
                closes = closes or value.lower() == b"close"
                continue
            if lower == b"transfer-encoding":
                raise RuntimeError("The connection chooses the framing of a response, not the application.")
            if lower == b"content-length":
                self._left = int(value)
            lines.append((name, value))
        if self.head.method == "HEAD" or status in _BODILESS:
            self._left = 0
        elif self._left is None and self.head.http_version == "1.1":
            self._chunked = True
            lines.append((b"transfer-encoding", b"chunked"))
        if closes:
            lines.append((b"connection", b"close"))
        self._held = response_head(status, lines)
        self.closes, self.started = closes, True
        self._writer.begin_response()
        if self._left is None:  # the body may come later
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._held and not self.disconnected:
            self._writer.write(self._held)
        self._held = b""

    def _write_body(self, data: bytes, more: bool) -> None:
        if self.head.method == "HEAD":
            data = b""
        elif self._left is not None:
            self._left -= len(data)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("The body of the response does not have the length of its Content-Length.")
        pieces = _chunk(data, more) if self._chunked else [data]
        packet = b"".join([self._held, *pieces])
        self._held = b""
        if packet:
            self._writer.write(packet)


def asgi_scope(head: RequestHead, transport: asyncio.BaseTransport, state: dict[str, Any]) -> Scope:
    """Return the ASGI scope of a request that arrived on `transport`."""
    client, server = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": head.http_version,
        "method": head.method,
        "scheme": "http" if transport.get_extra_info("sslcontext") is None else "https",
        "path": head.path,
        "raw_path": head.raw_path,
        "query_string": head.query,
        "root_path": "",
        "headers": head.headers,
        # The address of a Unix socket is its path, which is empty for a client.
        "client": client[:2] if isinstance(client, tuple) else None,
        "server": server[:2] if isinstance(server, tuple) else (server, None),
        "state": state.copy(),
    }


def last_response(error: BaseException, default_headers: RawHeaders) -> bytes:
    """Return a complete response with a problem document, after which the connection ends."""
    status, headers, document = problem(error)
    body = json.dumps(document).encode()
    lines = {name.lower(): value for name, value in headers.items()} | {
        "content-type": PROBLEM_MEDIA_TYPE,
        "content-length": str(len(body)),
        "connection": "close",
    }
    return response_head(status, [*default_headers, *((k.encode(), v.encode()) for k, v in lines.items())]) + body


def response_head(status: int, headers: RawHeaders) -> bytes:
    """Return status line and headers, with the empty line that ends them."""
    line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode()
    head = b"".join([line, *[b"%b: %b\r\n" % header for header in headers], b"\r\n"])
    if head.count(b"\n") != len(headers) + 2 or not _HEAD.fullmatch(head):
        raise RuntimeError(f"The application sent an invalid header in {headers!r}.")
    return head


def _chunk(data: bytes, more: bool) -> list[bytes]:
    pieces = [b"%x\r\n" % len(data), data, b"\r\n"] if data else []
    return pieces if more else [*pieces, b"0\r\n\r\n"]
