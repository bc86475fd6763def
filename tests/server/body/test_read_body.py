"""Receiving a body: limits count received bytes, and Content-Length has to be true."""

from __future__ import annotations

import asyncio

import pytest

from engines.errors import PidError
from server.body.parse import read_body
from server.errors import BodyTooLargeError, MalformedBodyError


def read(chunks: list[bytes], content_length: str | None = None, limit: int = 10) -> tuple[bytes | PidError, int]:
    """Return the body or the error raised, and the number of chunks read from the connection."""
    count = 0

    async def connection():
        nonlocal count
        for chunk in chunks:
            count += 1
            yield chunk

    try:
        return asyncio.run(read_body(connection(), content_length, limit)), count
    except PidError as error:
        return error, count


@pytest.mark.parametrize("content_length", [None, "10", "0010"])
@pytest.mark.parametrize("chunks", [[b"0123456789"], [b"01234", b"", b"56789"], [bytes([c]) for c in b"0123456789"]])
def test_a_body_up_to_the_limit_is_read(chunks, content_length):
    body, count = read(chunks, content_length)
    assert body == b"0123456789"
    assert count == len(chunks)


def test_an_empty_body_is_read():
    assert read([]) == (b"", 0)
    assert read([b""], "0") == (b"", 1)


@pytest.mark.parametrize(
    ("content_length", "chunks", "count"),
    [
        ("11", [b"a"], 0),  # rejected before a byte is read
        ("99999999999999999999", [b"a"], 0),
        (None, [b"a" * 11], 1),
        (None, [b"a" * 6] * 100, 2),
        ("3", [b"a" * 6] * 100, 2),
    ],
)
def test_a_body_over_the_limit_is_rejected_before_the_rest_is_read(content_length, chunks, count):
    error, chunks_read = read(chunks, content_length)
    assert isinstance(error, BodyTooLargeError)
    assert "10 bytes" in str(error)
    assert chunks_read == count


@pytest.mark.parametrize("content_length", ["", "-1", "+5", "5.0", "0x5", "five", "5 ", "5, 5", "٥", "1" * 5000])
def test_an_invalid_content_length_is_rejected_before_reading(content_length):
    error, count = read([b"12345"], content_length)
    assert isinstance(error, MalformedBodyError)
    assert count == 0


@pytest.mark.parametrize("content_length", ["4", "6", "0"])
def test_a_content_length_that_differs_from_the_body_is_rejected(content_length):
    error, _ = read([b"12345"], content_length)
    assert isinstance(error, MalformedBodyError)
    assert "5 bytes" in str(error)
