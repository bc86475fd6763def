"""Parser of `multipart/mixed` bodies (RFC 2046) that arrive in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from typing import NamedTuple

import httpx

from pid_client.errors import DecodeFailedError

_END_OF_HEADERS = b"\r\n\r\n"


class Part(NamedTuple):
    """A part of a body."""

    headers: httpx.Headers
    content: bytes


class MultipartParser:
    """Returns the parts of a body as soon as they are complete."""

    def __init__(self, content_type: str) -> None:
        """Begin a body.

        Args:
            content_type: Content-Type header of the response.

        Raises:
            DecodeFailedError: it is not a multipart type with a boundary.
        """
        header = Message()
        header["Content-Type"] = content_type
        boundary = header.get_boundary()
        if header.get_content_maintype() != "multipart" or not boundary:
            detail = f"The response is {content_type or 'untyped'}, not multipart/mixed; check the URL of the server."
            raise DecodeFailedError(200, "http-200", detail)
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = bytearray(b"\r\n")  # the line break before the first delimiter
        self._searched = 0  # bytes of the buffer that contain no beginning of a delimiter
        self._in_part = False  # whether a delimiter precedes the buffer
        self.complete = False

    def feed(self, data: bytes) -> Iterator[Part]:
        """Yield the parts that `data`, the next piece of the body, completes."""
        self._buffer += data
        while not self.complete:
            at = self._buffer.find(self._delimiter, self._searched)
            after = at + len(self._delimiter) + 2  # two dashes, or the end of the line
            if at < 0 or len(self._buffer) < after:
                self._searched = max(0, len(self._buffer) - len(self._delimiter) - 1)
                return
            content, ending = bytes(self._buffer[:at]), self._buffer[after - 2 : after]
            del self._buffer[:after]
            self._searched = 0
            self.complete = ending == b"--"
            if self._in_part:
                yield _read_part(content)
            self._in_part = True


def _read_part(content: bytes) -> Part:
    head, _, body = content.partition(_END_OF_HEADERS)
    return Part(httpx.Headers(BytesHeaderParser().parsebytes(head + _END_OF_HEADERS).items()), body)
