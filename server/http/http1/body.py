"""Framing of request bodies: Content-Length and chunked (RFC 9112, sections 6 and 7)."""

from __future__ import annotations

import re
from typing import Protocol

from server.errors import BodyTooLargeError, HeadersTooLargeError, MalformedRequestError

_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_SIZE = rb"\r\n([0-9A-Fa-f]{1,16})"  # the line end belongs to the preceding chunk
_SIZE_LINE = re.compile(_SIZE + rb"(?:;" + _TEXT + rb")?\r\n")
# The beginning of such a line. An extension may be long; the second and third group are the line without it.
_BEGINNING = re.compile(rb"(\r?|\r\n|" + _SIZE + rb"\r?)|(" + _SIZE + rb";)" + _TEXT + rb"(\r?)")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:" + _TEXT + rb"\r\n")


class Body(Protocol):
    """Framing of one request body."""

    complete: bool

    def feed(self, buffer: bytearray) -> bytes:
        """Remove the bytes of the body from the beginning of `buffer` and return their content.

        Raises:
            BodyTooLargeError, HeadersTooLargeError: the body exceeds a limit.
            MalformedRequestError: the framing is invalid.
        """


class LengthBody:
    """Body of a known length."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.complete = length == 0

    def feed(self, buffer: bytearray) -> bytes:
        """Remove and return bytes of the body."""
        with memoryview(buffer) as view:
            content = bytes(view[: self._left])
        del buffer[: len(content)]
        self._left -= len(content)
        self.complete = self._left == 0
        return content


class ChunkedBody:
    """Chunked body. Extensions and trailers are checked and dropped.

    llhttp could decode it too, but httptools does not report where a message ends, and what follows is the next
    request.
    """

    def __init__(self, max_bytes: int, max_trailer_bytes: int, max_trailers: int) -> None:
        """Begin a body of at most `max_bytes` bytes, framing included."""
        self._bytes_left, self._trailer_bytes_left, self._trailers_left = max_bytes, max_trailer_bytes, max_trailers
        self._pending = b"\r\n"  # an incomplete line; the first one has no chunk before it
        self._chunk_left = 0
        self._last = False  # only trailers follow
        self.complete = False

    def feed(self, buffer: bytearray) -> bytes:
        """Remove bytes of the body and return their content."""
        data, content, position = self._pending + buffer, [], 0
        kept, self._pending = len(self._pending), b""
        while not self._last:
            if self._chunk_left:
                piece = data[position : position + self._chunk_left]
                content.append(piece)
                position += len(piece)
                self._chunk_left -= len(piece)
                if self._chunk_left:
                    break
            line = _SIZE_LINE.match(data, position)
            if line is None:
                self._pending = _beginning(data[position:])
                position = len(data)
                break
            position = line.end()
            self._chunk_left = int(line[1], 16)
            self._last = not self._chunk_left
        if self._last:
            position = self._read_trailers(data, position)
        del buffer[: position - kept]
        self._bytes_left -= position - kept
        if self._bytes_left < 0:
            raise BodyTooLargeError("The chunks of the body are too small for its size; send larger chunks.")
        return b"".join(content)

    def _read_trailers(self, data: bytes, start: int) -> int:
        """Drop trailers from `start` on and return the position after them."""
        position = start
        while not data.startswith(b"\r\n", position):
            line = _TRAILER.match(data, position)
            if line is None:
                self._pending = data[position:]
                if b"\n" in self._pending:
                    raise MalformedRequestError("The body has a malformed trailer; use an HTTP client library.")
                break
            position = line.end()
            self._trailers_left -= 1
        else:
            position += 2
            self.complete = True
        self._trailer_bytes_left -= position - start
        if self._trailers_left < 0 or self._trailer_bytes_left < len(self._pending):
            raise HeadersTooLargeError("The body has too many trailers; send fewer or shorter ones.")
        return position + len(self._pending)


def _beginning(line: bytes) -> bytes:
    """Return what is relevant of an incomplete size line."""
    match = _BEGINNING.fullmatch(line)
    if match is None:
        raise MalformedRequestError("The body has a malformed chunk; use an HTTP client library.")
    return line if match[1] is not None else match[3] + match[5]
