"""Strict parsing of the head of a request: request line and headers (RFC 9112)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

import httptools

from server.errors import HeadersTooLargeError, MalformedRequestError

RawHeaders = list[tuple[bytes, bytes]]  # names in lower case

_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_REQUEST_LINE = re.compile(rb"([A-Z-]+) ([!-~]+) HTTP/(1\.[01])\r\n")
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_ABSOLUTE_TARGET = re.compile(r"https?://[A-Za-z0-9._~%:\[\]-]+(/.*)")
_LENGTH = re.compile(rb"[0-9]{1,19}")
_END = b"\r\n\r\n"


@dataclass(frozen=True)
class RequestHead:
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


class HeadReader:
    """Incremental reader of one request head.

    httptools checks the syntax. It alone would not do: it accepts protocols and forms of requests that this server does
    not support, and it would treat what follows the head of an upgrade as another protocol. Therefore it only sees
    heads, whose end is found here.
    """

    def __init__(self, max_bytes: int, max_headers: int) -> None:
        """Begin a head of at most `max_bytes`, line ends included, with at most `max_headers` headers."""
        self._max_bytes, self._max_headers = max_bytes, max_headers
        self._received = bytearray()
        self._headers: RawHeaders = []
        self._parser = httptools.HttpRequestParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header; called by httptools."""
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def feed(self, buffer: bytearray) -> RequestHead | None:
        """Remove the bytes of the head from the beginning of `buffer`; return the head once it is complete.

        Raises:
            HeadersTooLargeError: the head exceeds a limit.
            MalformedRequestError: it is not a valid request.
        """
        before = len(self._received)
        piece = bytes(buffer[: self._max_bytes - before])
        self._received += piece
        start = _match_end(_EMPTY_LINES, self._received)
        end = self._received.find(_END, max(start, before - len(_END) + 1))
        if end >= 0:
            piece = piece[: end + len(_END) - before]
            del self._received[end + len(_END) :]
        self._parse(piece)
        del buffer[: len(piece)]
        if len(self._headers) > self._max_headers or (end < 0 and len(self._received) >= self._max_bytes):
            raise HeadersTooLargeError(
                f"A request may have {self._max_headers} headers and {self._max_bytes} bytes before its body; "
                "send fewer or shorter headers."
            )
        return self._head(start) if end >= 0 else None

    def _parse(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # upgrades are ignored, as RFC 9110 allows
        except httptools.HttpParserError:
            raise _malformed(
                "Malformed HTTP/1.1 request; check that the client uses http:// and not https://."
            ) from None

    def _head(self, start: int) -> RequestHead:
        lines = self._received.count(b"\r\n", start)
        line = _REQUEST_LINE.match(self._received, start)
        # If httptools and this class disagreed on where a line or the head ends, the counts would differ.
        if line is None or lines != len(self._headers) + 2 or lines != self._received.count(b"\n", start):
            raise _malformed("The request is not HTTP/1.1 or HTTP/1.0; use an HTTP client library.")
        method, target, version = (bytes(group).decode() for group in line.groups())
        raw_path, query = _split_target(method, target)
        named: dict[bytes, list[bytes]] = {}
        for name, value in self._headers:
            named.setdefault(name, []).append(value)
        is_1_1 = version == "1.1"
        _check_host(named.get(b"host", []), required=is_1_1)
        chunked, length = _framing(named, is_1_1)
        return RequestHead(
            method=method,
            path=unquote(raw_path) if "%" in raw_path else raw_path,
            raw_path=raw_path.encode(),
            query=query.encode(),
            http_version="1.1" if is_1_1 else "1.0",
            headers=self._headers,
            content_length=length,
            chunked=chunked,
            keep_alive=is_1_1 and b"close" not in _tokens(named.get(b"connection", [])),
            expects_continue=is_1_1 and b"100-continue" in _tokens(named.get(b"expect", [])),
        )


def _malformed(message: str) -> MalformedRequestError:
    return MalformedRequestError(message)


def _match_end(pattern: re.Pattern[bytes], data: bytearray) -> int:
    match = pattern.match(data)
    return 0 if match is None else match.end()


def _tokens(values: list[bytes]) -> set[bytes]:
    """Return the elements of a comma-separated header, in lower case."""
    return {token.strip(b" \t").lower() for value in values for token in value.split(b",")}


def _split_target(method: str, target: str) -> tuple[str, str]:
    """Return path and query of a request target: `/path`, `*` or `http://host/path`."""
    absolute = _ABSOLUTE_TARGET.fullmatch(target)
    if absolute is not None:
        target = absolute[1]
    if method == "CONNECT" or (not target.startswith("/") and target != "*") or "#" in target:
        raise _malformed("The request target must be a path such as /decode; check the URL.")
    path, _, query = target.partition("?")
    return path, query


def _check_host(hosts: list[bytes], required: bool) -> None:
    if len(hosts) > 1 or (required and not hosts) or (hosts and not _HOST.fullmatch(hosts[0])):
        raise _malformed("A request needs exactly one valid Host header; use an HTTP client library.")


def _framing(named: dict[bytes, list[bytes]], is_1_1: bool) -> tuple[bool, int]:
    """Return true if the body is chunked, and the length of one that is not.

    Whatever two servers might read differently is rejected, since a proxy could be the other one (request smuggling).
    """
    codings, lengths = named.get(b"transfer-encoding", []), named.get(b"content-length", [])
    if codings:
        if not is_1_1 or lengths or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise _malformed("Send either one Content-Length header or, with HTTP/1.1, Transfer-Encoding: chunked.")
        return True, 0
    if not lengths:
        return False, 0
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _malformed("The Content-Length header is invalid; let your HTTP client write it.")
    return False, int(lengths[0])
