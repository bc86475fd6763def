"""Parser of multipart bodies (RFC 2046) that arrive in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from typing import NamedTuple

import httpx

_END_OF_HEADERS = b"\r\n\r\n"


class Part(NamedTuple):
    """A part of a body."""

    headers: httpx.Headers
    content: bytes


class MultipartParser:
    """Returns the parts of a body, each as soon as its Content-Length has arrived, or else the delimiter after it."""

    def __init__(self, content_type: str) -> None:
        """Begin a body.

        Args:
            content_type: Content-Type header of the response.

        Raises:
            ValueError: it is not a multipart type with a boundary.
        """
        header = Message()
        header["Content-Type"] = content_type
        boundary = header.get_boundary()
        if header.get_content_maintype() != "multipart" or not boundary:
            raise ValueError(f"The body is {content_type or 'untyped'}, not multipart with a boundary.")
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = bytearray(b"\r\n")  # the line break before the first delimiter
        self._searched = 0  # bytes of the buffer in which no delimiter begins
        self._headers: httpx.Headers | None = None  # of the part whose content the buffer begins with
        self.complete = False

    def feed(self, data: bytes) -> Iterator[Part]:
        """Yield the parts that `data`, the next piece of the body, completes.

        Raises:
            ValueError: the length of a part is not a number.
        """
        self._buffer += data
        while not self.complete:
            if self._headers is None and not self._read_headers():
                return
            if self._headers is not None:
                content = self._read_content(self._headers)
                if content is None:
                    return
                yield Part(self._headers, content)
                self._headers = None

    def _read_headers(self) -> bool:
        """Read what precedes the content of the next part, or the end of the body; return False if more is needed."""
        at = self._find_delimiter()
        line = at + len(self._delimiter)
        if at < 0 or len(self._buffer) < line + 2:
            return False
        if self._buffer[line : line + 2] == b"--":
            self.complete = True
            return True
        end = self._buffer.find(_END_OF_HEADERS, line)
        if end < 0:
            return False
        text = bytes(self._buffer[line + 2 : end]) + _END_OF_HEADERS
        self._headers = httpx.Headers(BytesHeaderParser().parsebytes(text).items())
        self._discard(end + len(_END_OF_HEADERS))
        return True

    def _read_content(self, headers: httpx.Headers) -> bytes | None:
        """Return the content of the part, or None if more is needed."""
        end = int(headers["Content-Length"]) if "Content-Length" in headers else self._find_delimiter()
        if end < 0 or len(self._buffer) < end:
            return None
        content = bytes(self._buffer[:end])
        self._discard(end)
        return content

    def _find_delimiter(self) -> int:
        at = self._buffer.find(self._delimiter, self._searched)
        self._searched = at if at >= 0 else max(0, len(self._buffer) - len(self._delimiter) + 1)
        return at

    def _discard(self, count: int) -> None:
        del self._buffer[:count]
        self._searched = 0
