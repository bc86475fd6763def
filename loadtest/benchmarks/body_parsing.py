"""Benchmark of body parsing: how long bodies of the largest size, valid and hostile, delay the event loop.

The decoder is one for 4096×4096 pixels with captions. Bodies arrive in chunks of 64 KiB. The delay is that of a task
that sleeps for a millisecond over and over, as a probe would see it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from engines.errors import PidError
from engines.size import Size
from server.body.head import read_head
from server.body.media import FORM, JSON, SAFETENSORS
from server.body.parse import parse_body
from server.body.receive import BodyMemory, BodyReader
from server.request import DecoderLimits, ServerLimits

CHANNELS, LATENT, TOKENS, WIDTH, IMAGES = 16, Size(128, 128), 300, 2304, 8
DECODER = DecoderLimits("flux-2k", "flux", CHANNELS, (LATENT,), 32, 4, TOKENS, WIDTH, IMAGES)
LIMIT = DECODER.largest_body
LIMITS = ServerLimits({DECODER.name: DECODER}, LIMIT)
CHUNK = 2**16  # bytes
LONG_BOUNDARY = "b" * 70


@dataclass(frozen=True)
class BodyReport:
    """Milliseconds to receive and parse one body, and the largest delay of the event loop during this time."""

    name: str
    result: str  # "accepted" or an error code
    total: float
    delay: float


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """Yield name, Content-Type and content of each body."""
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((IMAGES, CHANNELS, *LATENT), dtype=np.float32)
    caption = generator.standard_normal((IMAGES, TOKENS, WIDTH), dtype=np.float32)
    yield "safetensors, valid", SAFETENSORS, save({"latent": latent, "caption": caption})
    yield "JSON, valid", JSON, json.dumps({"latent": _packed(latent), "caption": _packed(caption)}).encode()
    data = b'{"latent": {"shape": [1], "dtype": "float32", "data": "'
    yield "JSON, one character in four escaped", JSON, _fill(b"AA\\/A", data, b'"}}')
    yield "JSON, every character escaped", JSON, _fill(b"\\u0041", data, b'"}}')
    yield "JSON, whitespace", JSON, _fill(b" ", b"{", b"}")
    yield "JSON, a list of numbers", JSON, _fill(b"1,", b'{"latent": [', b"1]}")
    yield "JSON, backslashes", JSON, _fill(b"\\", b'{"latent": "', b'"}')
    yield "JSON, short strings", JSON, _fill(b'"",', b'{"latent": [', b'""]}')
    part = b'\r\nContent-Disposition: form-data; name="latent"; filename="latent.npy"\r\n\r\n'
    yield "form, line breaks", f"{FORM}; boundary=b", _fill(b"\r", b"--b" + part, b"\r\n--b--")
    yield "form, dashes before the first part", f"{FORM}; boundary=b", _fill(b"-")
    line = b"--" + LONG_BOUNDARY.encode()
    yield (
        "form, lines that are almost a boundary",
        f"{FORM}; boundary={LONG_BOUNDARY}",
        _fill(b"\r\n" + line[:-1], line + part, b"\r\n" + line + b"--"),
    )


def _packed(tensor: NDArray[np.float32]) -> dict[str, object]:
    return {"data": base64.b64encode(tensor.tobytes()).decode(), "shape": list(tensor.shape), "dtype": "float32"}


def _fill(unit: bytes, start: bytes = b"", end: bytes = b"") -> bytes:
    """Return a body of the largest size."""
    return start + unit * ((LIMIT - len(start) - len(end)) // len(unit)) + end


async def measure(name: str, content_type: str, body: bytes) -> BodyReport:
    """Receive and parse a body."""
    reader = BodyReader(LIMIT, BodyMemory(LIMIT), timeout=600, threads=ThreadPoolExecutor(1))
    head, delays, result = read_head([("content-type", content_type)], [], LIMITS), [0.0], "accepted"

    async def arrive() -> AsyncIterator[bytes]:
        for start in range(0, len(body), CHUNK):
            await asyncio.sleep(0)
            yield body[start : start + CHUNK]

    async def probe() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            delays.append(time.perf_counter() - began - 0.001)

    probing, began = asyncio.ensure_future(probe()), time.perf_counter()
    try:
        await reader.read(arrive(), head.content_length, lambda data: parse_body(head, data, LIMITS))
    except PidError as error:
        result = error.code
    total = time.perf_counter() - began
    await asyncio.sleep(0.01)  # the probe that was delayed
    probing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await probing
    return BodyReport(name, result, 1000 * total, 1000 * max(delays))


def main() -> None:
    """Measure every body and print a table."""
    print(f"Bodies of up to {LIMIT / 1e6:.1f} MB\n\n| body | result | total | delay |\n| --- | --- | --- | --- |")
    for name, content_type, body in bodies():
        report = asyncio.run(measure(name, content_type, body))
        print(f"| {report.name} | {report.result} | {report.total:.0f} ms | {report.delay:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
