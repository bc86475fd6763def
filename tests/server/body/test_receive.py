"""Receiving a body: limits count received bytes, Content-Length has to be true, and all bodies share their memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engines.errors import PidError
from server.body.head import read_head
from server.body.media import JSON
from server.body.parse import parse_body
from server.body.receive import SMALL_BODY, BodyMemory, BodyReader, receive
from server.errors import BodyMemoryError, BodyTimeoutError, BodyTooLargeError, MalformedBodyError
from tests.server.body.bodies import LATENT, LIMITS, VALID, json_body, packed


def read(chunks: list[bytes], content_length: int | None = None, limit: int = 10) -> tuple[bytes | PidError, int]:
    """Return the body or the error raised, and the number of chunks read from the connection."""
    count = 0

    async def connection() -> AsyncIterator[bytes]:
        nonlocal count
        for chunk in chunks:
            count += 1
            yield chunk

    with BodyMemory(1000).reserve(0) as reservation:
        try:
            return asyncio.run(receive(connection(), content_length, limit, reservation)), count
        except PidError as error:
            return error, count


@pytest.mark.parametrize("content_length", [None, 10])
@pytest.mark.parametrize("chunks", [[b"0123456789"], [b"01234", b"", b"56789"], [bytes([c]) for c in b"0123456789"]])
def test_a_body_up_to_the_limit_is_read(chunks, content_length):
    body, count = read(chunks, content_length)
    assert body == b"0123456789"
    assert count == len(chunks)


def test_an_empty_body_is_read():
    assert read([]) == (b"", 0)
    assert read([b""], 0) == (b"", 1)


@pytest.mark.parametrize(
    ("content_length", "chunks", "count"),
    [(None, [b"a" * 11], 1), (None, [b"a" * 6] * 100, 2), (3, [b"a" * 6] * 100, 2)],
)
def test_a_body_over_the_limit_is_rejected_before_the_rest_is_read(content_length, chunks, count):
    error, chunks_read = read(chunks, content_length)
    assert isinstance(error, BodyTooLargeError)
    assert "10 bytes" in str(error)
    assert chunks_read == count


@pytest.mark.parametrize("content_length", [4, 6, 0])
def test_a_content_length_that_differs_from_the_body_is_rejected(content_length):
    error, _ = read([b"12345"], content_length)
    assert isinstance(error, MalformedBodyError)
    assert "5 bytes" in str(error)


class TestMemory:
    def test_all_bodies_share_the_limit_and_release_their_bytes(self):
        memory = BodyMemory(100)
        with memory.reserve(0) as first:
            first.add(60)
            with memory.reserve(40) as second:
                second.add(40)
                for reservation in (first, second):
                    with pytest.raises(BodyMemoryError):
                        reservation.add(1)
                assert memory.bytes == 100
            assert memory.bytes == 60
            first.add(40)
        assert memory.bytes == 0

    def test_a_declared_length_that_does_not_fit_is_rejected_before_a_byte_arrives(self):
        memory = BodyMemory(100)
        with memory.reserve(0) as first:
            first.add(60)
            with pytest.raises(BodyMemoryError), memory.reserve(41):
                pass
            assert memory.bytes == 60

    def test_bytes_that_are_declared_but_do_not_arrive_take_no_memory_from_others(self):
        memory = BodyMemory(100)
        with memory.reserve(100), memory.reserve(100) as second:
            second.add(100)

    def test_one_body_always_fits(self):
        memory = BodyMemory(100)
        with memory.reserve(1000) as only:
            only.add(600)
            only.add(400)

    def test_memory_is_released_after_an_error(self):
        memory = BodyMemory(100)
        with contextlib.suppress(BodyTooLargeError), memory.reserve(0) as reservation:
            reservation.add(70)
            raise BodyTooLargeError("for the test")
        assert memory.bytes == 0


class TestReader:
    def run(self, media_type: str, chunks: AsyncIterator[bytes], timeout: float = 60.0, memory: int = 10**7):
        shared = BodyMemory(memory)
        head = read_head([("content-type", media_type)], [], LIMITS)

        async def read_one() -> torch.Tensor:  # on the loop that the reader is made for
            reader = BodyReader(LIMITS.max_body_bytes, shared, timeout, threads)
            return (await reader.read(chunks, head.content_length, lambda body: parse_body(head, body, LIMITS))).latents

        try:
            with ThreadPoolExecutor(1) as threads:
                return asyncio.run(read_one())
        finally:
            assert shared.bytes == 0

    @pytest.mark.parametrize("padding", [0, SMALL_BODY])
    def test_small_and_large_bodies_are_parsed_and_leave_no_memory_reserved(self, padding):
        body = json_body(latent=packed(LATENT))
        space = b" " * 60_000 if padding else b""
        large = body[:-1] + b',"' + b"x" * padding + b'":1}' if padding else body

        async def chunks() -> AsyncIterator[bytes]:
            yield space
            yield large

        if padding:  # the key is too long, which shows that it was parsed
            with pytest.raises(MalformedBodyError, match="key"):
                self.run(JSON, chunks())
        else:
            assert torch.equal(self.run(JSON, chunks()), LATENT)

    def test_a_body_that_does_not_arrive_in_time_is_rejected(self):
        async def chunks() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(60)

        with pytest.raises(BodyTimeoutError):
            self.run(JSON, chunks(), timeout=0.01)

    def test_a_body_that_fills_the_memory_alone_is_parsed(self):
        media_type, body, _ = VALID["safetensors"]

        async def chunks() -> AsyncIterator[bytes]:
            yield body[:100]
            yield body[100:]

        assert torch.equal(self.run(media_type, chunks(), memory=1), LATENT)
