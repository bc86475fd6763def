"""A streamed image is never in memory as a whole."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from pid_client import AsyncPidClient, PidClient

CHUNK, CHUNKS = 64 * 1024, 256
SIZE = CHUNK * CHUNKS  # bytes of the image
LATENT = np.zeros((16, 8, 8), np.float32)


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """An image whose chunks are created when they are read."""

    def __iter__(self) -> Iterator[bytes]:
        return (bytes(CHUNK) for _ in range(CHUNKS))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


def server(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, headers={"Content-Type": "image/png", "X-Seed": "7"}, stream=Body())


NETWORK = httpx.MockTransport(server)


def stream(path: Path) -> int:
    with PidClient("http://server", transport=NETWORK) as client, client.stream(LATENT) as chunks:
        return sum(map(len, chunks))


def decode_to_file(path: Path) -> int:
    with PidClient("http://server", transport=NETWORK) as client:
        client.decode_to_file(LATENT, path)
    return path.stat().st_size


def stream_async(path: Path) -> int:
    async def run() -> int:
        async with AsyncPidClient("http://server", transport=NETWORK) as client, client.stream(LATENT) as chunks:
            return sum([len(chunk) async for chunk in chunks])

    return asyncio.run(run())


def decode_to_file_async(path: Path) -> int:
    async def run() -> None:
        async with AsyncPidClient("http://server", transport=NETWORK) as client:
            await client.decode_to_file(LATENT, path)

    asyncio.run(run())
    return path.stat().st_size


@pytest.mark.parametrize("method", [stream, decode_to_file, stream_async, decode_to_file_async])
def test_a_streamed_image_is_not_held_in_memory(method: Callable[[Path], int], tmp_path: Path):
    tracemalloc.start()
    try:
        size = method(tmp_path / "image.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == SIZE
    assert peak < SIZE / 4
