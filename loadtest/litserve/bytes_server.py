"""A server that reads a body and answers with bytes it has, or with a picture that it encodes: nothing else.

The floor below every server on this machine with this client: no checks, no scheduler, no errors, no metrics.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn

from engines.runtime.simulated import simulated_image
from server.images import png

_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # so that the client takes it for a whole picture
_PIECE = 512 * 1024


def stored(size: int) -> list[bytes]:
    """So many bytes, in pieces."""
    data = bytes(size - len(_END)) + _END
    return [data[start : start + _PIECE] for start in range(0, size, _PIECE)]


class Picture:
    """A picture, encoded for each who asks by as many threads as the decode server has."""

    def __init__(self, size: tuple[int, int]) -> None:
        png.warm_up()
        self._pixels = simulated_image(size)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def _strip(self, bounds: tuple[int, int]) -> png.Strip:
        start, stop = bounds
        return png.encode_strip(self._pixels[start:stop], self._pixels[start - 1] if start else None)

    async def encoded(self) -> AsyncIterator[bytes]:
        height, width, _ = self._pixels.shape
        strips = [self._pool.submit(self._strip, bounds) for bounds in png.strip_bounds(width, height)]
        yield png.png_head(width, height)
        for strip in strips:
            yield (await asyncio.wrap_future(strip)).data
        yield png.png_tail(strip.result().checksum for strip in strips)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, help="answer with so many; a picture of 2048x2048 is encoded if absent")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    pieces = [] if options.bytes is None else stored(options.bytes)
    encoder = Picture((2048, 2048)) if options.bytes is None else None

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200})
        if scope["path"] == "/health":
            await send({"type": "http.response.body"})
            return
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if encoder is not None:
            async for piece in encoder.encoded():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    uvicorn.run(app, host="127.0.0.1", port=options.port, lifespan="off", log_config=None, access_log=False)


if __name__ == "__main__":
    main()
