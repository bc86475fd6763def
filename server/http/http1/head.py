"""Strict parsing of the head of a request: request line and headers (RFC 9112)."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple
from urllib.parse import unquote

import httptools

from server.errors import HeadersTooLargeError, MalformedRequestError, count_of

RawHeaders = list[tuple[bytes, bytes]]  # names in lower case

_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_REQUEST_LINE = re.compile(rb"([A-Z-]+) ([!-~]+) HTTP/(1\.[01])\r\n")
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_ABSOLUTE_TARGET = re.compile(rb"https?://[A-Za-z0-9._~%:\[\]-]+(/.*)")
_LENGTH = re.compile(rb"[0-9]{1,19}")
_END = b"\r\n\r\n"
_RELEVANT = frozenset({b"host", b"connection", b"content-length", b"transfer-encoding", b"expect"})


class RequestHead(NamedTuple):
    """A request without its body."""

    method: str
    path: str  # percent-decoded
    raw_path: bytes
    query: bytes
    http_version: Literal["1.0", "1.1"]
    headers: RawHeaders
    content_length: int
    chunked: bool
    keep_alive: bool  # the client would like to send another request on the connection
    expects_continue: bool  # the client sends the body once it gets "100 Continue"


class _Headers:
    """Headers of one request, collected by httptools. Apart from `HeadReader`, so that the two form no cycle."""

    def __init__(self) -> None:
        self.all: RawHeaders = []
        self.relevant: dict[bytes, list[bytes]] = {}  # those that concern the connection

    def on_header(self, name: bytes, value: bytes) -> None:
        name, value = name.lower(), value.rstrip(b" \t")
        self.all.append((name, value))
        if name in _RELEVANT:
            self.relevant.setdefault(name, []).append(value)

    def has(self, name: bytes, token: bytes) -> bool:
        """Return true if `token` is an element of a comma-separated header."""
        elements = [element for value in self.relevant.get(name, ()) for element in value.split(b",")]
        return any(element.strip(b" \t").lower() == token for element in elements)


class HeadReader:
    """Incremental reader of one request head.

    httptools checks the syntax. It alone would not do: it accepts protocols and forms of requests that this server does
    not support, and it would treat what follows the head of an upgrade as another protocol. Therefore it only sees
    heads, whose end is found here.
    """

    def __init__(self, max_bytes: int, max_headers: int) -> None:
        """Begin a head of at most `max_bytes`, line ends included, with at most `max_headers` headers."""
        self._max_bytes, self._max_headers = max_bytes, max_headers
        self._received = b""
        self._headers = _Headers()
        self._parser = httptools.HttpRequestParser(self._headers)

    def feed(self, buffer: bytearray) -> RequestHead | None:
        """Remove the bytes of the head from the beginning of `buffer`; return the head once it is complete.

        Raises:
            HeadersTooLargeError: the head exceeds a limit.
            MalformedRequestError: it is not a valid request.
        """
        before = len(self._received)
        received = self._received + buffer[: self._max_bytes - before]
        start = _empty_lines(received)
        end = received.find(_END, max(start, before - len(_END) + 1))
        if end >= 0:
            received = received[: end + len(_END)]
        self._received = received
        self._parse(received[before:])
        del buffer[: len(received) - before]
        if len(self._headers.all) > self._max_headers or (end < 0 and len(received) >= self._max_bytes):
            raise HeadersTooLargeError(
                f"A request may have {count_of(self._max_headers, 'header')} and {count_of(self._max_bytes, 'byte')} "
                "before its body; send fewer or shorter headers."
            )
        return self._head(received, start) if end >= 0 else None

    def _parse(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # upgrades are ignored, as RFC 9110 allows
        except httptools.HttpParserError:
            raise _malformed("The request is not valid HTTP/1.1; check that the client uses http://.") from None

    def _head(self, data: bytes, start: int) -> RequestHead:
        lines, headers = data.count(b"\r\n", start), self._headers
        line = _REQUEST_LINE.match(data, start)
        # If httptools and this class disagreed on where a line or the head ends, the counts would differ.
        if line is None or lines != len(headers.all) + 2 or lines != data.count(b"\n", start):
            raise _malformed("The request is not HTTP/1.1 or HTTP/1.0; use an HTTP client library.")
        method, is_1_1 = line[1].decode(), line[3] == b"1.1"
        raw_path, query = _split_target(method, line[2])
        path = raw_path.decode()
        _check_host(headers.relevant.get(b"host", []), required=is_1_1)
        chunked, length = _framing(headers.relevant, is_1_1)
        return RequestHead(
            method=method,
            path=unquote(path) if "%" in path else path,
            raw_path=raw_path,
            query=query,
            http_version="1.1" if is_1_1 else "1.0",
            headers=headers.all,
            content_length=length,
            chunked=chunked,
            keep_alive=is_1_1 and not headers.has(b"connection", b"close"),
            expects_continue=is_1_1 and headers.has(b"expect", b"100-continue"),
        )


def _malformed(message: str) -> MalformedRequestError:
    return MalformedRequestError(message)


def _empty_lines(data: bytes) -> int:
    """Return the number of bytes of the empty lines that `data` begins with."""
    match = _EMPTY_LINES.match(data) if data.startswith(b"\r") else None
    return 0 if match is None else match.end()


def _split_target(method: str, target: bytes) -> tuple[bytes, bytes]:
    """Return path and query of a request target: `/path`, `*` or `http://host/path`."""
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE_TARGET.fullmatch(target)
        target = target if absolute is None else absolute[1]
    if method == "CONNECT" or (not target.startswith(b"/") and target != b"*") or b"#" in target:
        raise _malformed("The request target must be a path such as /decode; check the URL.")
    path, _, query = target.partition(b"?")
    return path, query


def _check_host(hosts: list[bytes], required: bool) -> None:
    if len(hosts) > 1 or (required and not hosts) or (hosts and not _HOST.fullmatch(hosts[0])):
        raise _malformed("A request needs exactly one valid Host header; use an HTTP client library.")


def _framing(relevant: dict[bytes, list[bytes]], is_1_1: bool) -> tuple[bool, int]:
    """Return true if the body is chunked, and the length of one that is not.

    Whatever two servers might read differently is rejected, since a proxy could be the other one (request smuggling).
    """
    codings, lengths = relevant.get(b"transfer-encoding", []), relevant.get(b"content-length", [])
    if codings:
        if not is_1_1 or lengths or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise _malformed("Send either one Content-Length header or, with HTTP/1.1, Transfer-Encoding: chunked.")
        return True, 0
    if not lengths:
        return False, 0
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _malformed("The Content-Length header is invalid; let your HTTP client write it.")
    return False, int(lengths[0])
