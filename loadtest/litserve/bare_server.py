"""A server that reads a body and sends stored bytes or an image that it encodes: a lower bound for the comparison.

It has no validation, scheduler, error handling or metrics.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn

from engines.cli import ArgumentParser
from engines.runtime.simulated import simulated_image
from engines.size import Size
from loadtest.benchmarks.parallel_png import submit_strips
from loadtest.outcome import PNG_END
from server.images import png

_CHUNK = 512 * 1024  # bytes


def stored(size: int) -> list[bytes]:
    """Return `size` bytes in chunks, with the end of a PNG, so that the client accepts them as complete."""
    data = bytes(size - len(PNG_END)) + PNG_END
    return [data[start : start + _CHUNK] for start in range(0, size, _CHUNK)]


class EncodedImage:
    """An image that is encoded for each request, with as many threads as the decode server uses."""

    def __init__(self, size: Size) -> None:
        """Create the image and compile the encoder."""
        png.warm_up()
        self._pixels = simulated_image(size)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Encode the image and yield its bytes as they become ready."""
        height, width, _ = self._pixels.shape
        strips = submit_strips(self._pool, self._pixels)
        yield png.png_head(width, height)
        for strip in strips:
            yield (await asyncio.wrap_future(strip)).data
        yield png.png_tail(strip.result().checksum for strip in strips)


def main() -> None:
    """Serve until a signal arrives."""
    parser = ArgumentParser(prog="python -m loadtest.litserve.bare_server", description=__doc__)
    parser.add_argument(
        "--bytes", type=int, help="size of a stored response (default: encode an image of 2048x2048 per request)"
    )
    parser.add_argument("--port", type=int, required=True, help="port to listen on (required)")
    options = parser.parse_args()
    chunks = [] if options.bytes is None else stored(options.bytes)
    image = EncodedImage(Size(2048, 2048)) if options.bytes is None else None

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200})
        if scope["path"] == "/health":
            await send({"type": "http.response.body"})
            return
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if image is not None:
            async for chunk in image.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body"})

    uvicorn.run(app, host="127.0.0.1", port=options.port, lifespan="off", log_config=None, access_log=False)


if __name__ == "__main__":
    main()
