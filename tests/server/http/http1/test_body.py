"""Bodies of requests: framing is undone exactly, in whatever pieces it arrives, and never past its end."""

from __future__ import annotations

import itertools

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines.errors import PidError
from server.errors import BodyTooLargeError, HeadersTooLargeError, MalformedRequestError
from server.http.http1.body import Body, ChunkedBody, LengthBody

NEXT = b"GET / HTTP/1.1\r\n"  # what follows the body


def chunked(max_bytes: int = 2**20) -> ChunkedBody:
    return ChunkedBody(max_bytes, max_trailer_bytes=1024, max_trailers=8)


def read(body: Body, data: bytes, cuts: tuple[int, ...] = ()) -> tuple[bytes, bytes]:
    """Feed `data` in pieces; return the content, and what is left after the end of the body."""
    buffer, content = bytearray(), b""
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for start, end in itertools.pairwise(bounds):
        buffer += data[start:end]
        if not body.complete:
            content += body.feed(buffer)
    return content, bytes(buffer)


class Reference:
    """Decoding by llhttp."""

    def __init__(self, data: bytes) -> None:
        self.content, self.complete = b"", False
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + data)

    def on_body(self, data: bytes) -> None:
        self.content += data

    def on_message_complete(self) -> None:
        self.complete = True


chunk_lists = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
extensions = st.sampled_from([b"", b";", b";a=b", b';a="b;c"', b";" + b"x" * 300])
cuts = st.sets(st.integers(1, 400), max_size=10).map(tuple)


def encode(chunks: list[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    return framed + b"0" + extension + b"\r\n" + trailers + b"\r\n"


@given(chunk_lists, extensions, st.sampled_from([b"", b"A: b\r\n", b"A: b\r\nC:\r\n"]), cuts)
def test_chunks_are_joined_and_what_follows_is_left(
    chunks: list[bytes], extension: bytes, trailers: bytes, cuts: tuple[int, ...]
):
    body = chunked()
    content, rest = read(body, encode(chunks, extension, trailers) + NEXT, cuts)
    assert (content, rest, body.complete) == (b"".join(chunks), NEXT, True)


@given(st.binary(max_size=100), cuts)
def test_a_body_of_known_length_ends_there(data: bytes, cuts: tuple[int, ...]):
    body = LengthBody(len(data))
    assert read(body, data + NEXT, cuts) == (data, NEXT)
    assert body.complete


def without_extensions(data: bytes) -> bytes:
    """Drop the extensions of chunks, whose syntax llhttp checks; `data` is what a `ChunkedBody` has accepted."""
    result = b""
    while data:
        line, end, data = data.partition(b"\r\n")
        digits = line.partition(b";")[0]
        result += digits + end
        size = int(digits, 16) if end else 0
        if size == 0:  # trailers follow, or nothing
            return result + data
        result, data = result + data[: size + 2], data[size + 2 :]
    return result


@given(
    st.lists(
        st.sampled_from([b"\r\n", b"\r", b"\n", b"0", b"1", b"3", b"a", b";", b":", b" ", b"\t", b"\0", b"x-y"]),
        max_size=14,
    ),
    cuts,
)
@example([b"3", b"\r\n", b"\n", b"0", b";"], ())  # content that looks like an extension
def test_whatever_is_accepted_is_what_llhttp_reads(pieces: list[bytes], cuts: tuple[int, ...]):
    data, body = b"".join(pieces), chunked()
    try:
        content, rest = read(body, data, cuts)
    except PidError:
        return
    try:
        reference = Reference(without_extensions(data[: len(data) - len(rest)]))
    except httptools.HttpParserError:
        assert not body.complete
        return
    assert (reference.content, reference.complete) == (content, body.complete)


MALFORMED = [
    b"0x5\r\nhello\r\n",
    b"-5\r\nhello\r\n",
    b"5 \r\nhello\r\n",
    b" 5\r\nhello\r\n",
    b"f" * 17 + b"\r\n",
    b"\r\n5\r\nhello\r\n",
    b";a\r\n",
    b"5\nhello\r\n",
    b"5\r\nhello0\r\n\r\n",
    b"5\r\nhello\n0\r\n\r\n",
    b'5;a="b\nc"\r\nhello\r\n',
    b"5;a\0b\r\nhello\r\n",
    b"5;a\rb\r\nhello\r\n",
    b"0\r\nA: b\n\r\n",
    b"0\r\nA b\r\n\r\n",
    b"0\r\n folded: b\r\n\r\n",
    b"0\r\nA : b\r\n\r\n",
]


@pytest.mark.parametrize("data", MALFORMED)
@pytest.mark.parametrize("step", [1, 1000])
def test_malformed_framing_is_rejected(data: bytes, step: int):
    with pytest.raises(MalformedRequestError):
        read(chunked(), data, tuple(range(step, len(data), step)))


@pytest.mark.parametrize("trailers", [b"A: b\r\n" * 9, b"A: " + b"b" * 2000 + b"\r\n", b"A: " + b"b" * 2000])
@pytest.mark.parametrize("step", [1, 10_000])
def test_trailers_over_a_limit_are_rejected(trailers: bytes, step: int):
    data = encode([b"hello"], trailers=trailers)
    with pytest.raises(HeadersTooLargeError):
        read(chunked(), data, tuple(range(step, len(data), step)))


@pytest.mark.parametrize(
    "data", [b"1;" + b"a" * 5000, b"1\r\na\r\n" * 1000, b"0" * 15 + b"1\r\na\r\n" + b"1\r\na\r\n" * 900]
)
@pytest.mark.parametrize("step", [1, 10_000])
def test_framing_over_the_limit_is_rejected(data: bytes, step: int):
    with pytest.raises(BodyTooLargeError):
        read(chunked(max_bytes=4000), data, tuple(range(step, len(data), step)))


def test_a_long_extension_is_not_stored():
    body = chunked()
    for _ in range(1000):
        assert body.feed(bytearray(b"5;" if not _ else b"a" * 1000)) == b""
    assert body.feed(bytearray(b"\r\nhello\r\n0\r\n\r\n")) == b"hello"
    assert body.complete
