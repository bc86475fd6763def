"""Benchmark of the Python client: its latency compared with that of httpx alone, and its memory while streaming.

Both send the same latent with the same options over one connection and read the whole image. The four kinds of requests
(synchronous and asynchronous, client and httpx) take turns, so that a drift of the machine's speed affects all equally.
The simulated decoder has no cost. The server runs in this process and its clients in another one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from safetensors.torch import save

from engines.cli import ArgumentParser
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.benchmarks.http_overhead import serving
from loadtest.benchmarks.pairs import difference_interval
from pid_client import AsyncPidClient, PidClient
from server.images import png
from server.service import DecodeService
from server.settings import Settings

PERCENTILES = (50.0, 99.0)
_WARM_UP = 5  # requests of each kind


@dataclass(frozen=True)
class Case:
    """Requests to measure."""

    size: int  # pixels per side
    format: str
    latent: torch.Tensor  # [c, h, w]
    rounds: int

    def __str__(self) -> str:
        return f"{self.size}x{self.size}, {self.format}"


@dataclass(frozen=True)
class Overhead:
    """A percentile of the latency of one client and of httpx, in milliseconds."""

    case: str
    client: str
    percentile: float
    httpx_ms: float
    client_ms: float
    added_ms: float
    low_ms: float  # 95 % interval of the difference
    high_ms: float


@dataclass(frozen=True)
class ClientReport:
    """Latency that the client adds to httpx, and its peak memory."""

    rounds: dict[str, int]  # requests of each kind, by case
    load_average: float
    overheads: tuple[Overhead, ...]
    image_mb: float  # of the image whose memory was measured
    peak_mb: dict[str, float]  # largest amount of memory allocated by Python at once, by method

    def table(self) -> str:
        """Return the report as text."""
        lines = [f"{'latency, ms':<22}{'client':<17}{'':<6}{'httpx':>8}{'client':>9}{'added':>9}   95 % interval"]
        lines += [
            f"{row.case:<22}{row.client:<17}p{row.percentile:<5g}{row.httpx_ms:>8.2f}{row.client_ms:>9.2f}"
            f"{row.added_ms:>+9.2f}   {row.low_ms:+.2f} to {row.high_ms:+.2f}"
            for row in self.overheads
        ]
        lines += ["", f"peak memory for an image of {self.image_mb:.1f} MB, MB"]
        lines += [f"{method:<39}{peak:>8.2f}" for method, peak in self.peak_mb.items()]
        return "\n".join(lines)

    def document(self) -> dict[str, object]:
        """Return the report for JSON."""
        rows = [{name: _rounded(value) for name, value in asdict(row).items()} for row in self.overheads]
        peaks = {method: round(peak, 3) for method, peak in self.peak_mb.items()}
        return {**asdict(self), "overheads": rows, "image_mb": round(self.image_mb, 3), "peak_mb": peaks}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = ArgumentParser(
        prog="python -m loadtest.benchmarks.client_overhead",
        usage="%(prog)s [options]",
        description="Measure the latency that the Python client adds to httpx, and its memory while streaming.",
    )
    add = parser.add_argument
    add("--small", type=int, default=256, metavar="PIXELS", help="side of the raw image (default: %(default)s)")
    add("--large", type=int, default=2048, metavar="PIXELS", help="side of the PNG, of noise (default: %(default)s)")
    add("--rounds", type=int, default=1000, metavar="COUNT", help="raw images of each kind (default: %(default)s)")
    add("--large-rounds", type=int, default=200, metavar="COUNT", help="PNGs of each kind (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    report = measure(options.small, options.large, options.rounds, options.large_rounds)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.document(), indent=2) + "\n")


def measure(small: int, large: int, rounds: int, large_rounds: int) -> ClientReport:
    """Measure requests for raw images of `small` pixels per side, and for PNGs of `large` pixels per side."""
    png.warm_up()
    squares = Size(small, small), Size(large, large)
    noise = np.random.default_rng(0).integers(0, 256, (large, large, 3), np.uint8)  # cannot be compressed
    runtime = SimulatedRuntime(dict.fromkeys(squares, SimulatedCost()), {squares[1]: noise})
    latents = [torch.randn(16, *runtime.info.latent_size(square)).bfloat16() for square in squares]
    cases = Case(small, "raw", latents[0], rounds), Case(large, "png", latents[1], large_rounds)
    service = DecodeService(Settings(bundle=Path(), encoder_threads=2), {"simulated": {"simulated": runtime}})
    with serving(service) as port, multiprocessing.get_context("spawn").Pool(1) as clients:
        url = f"http://127.0.0.1:{port}"
        overheads = [row for case in cases for row in compare(case, clients.apply(latencies, (url, case)))]
        image_bytes, peaks = clients.apply(peak_bytes, (url, cases[1]))
    return ClientReport(
        {str(case): case.rounds for case in cases},
        os.getloadavg()[0],
        tuple(overheads),
        image_bytes / 1e6,
        {method: peak / 1e6 for method, peak in peaks.items()},
    )


def compare(case: Case, seconds: dict[str, list[float]]) -> list[Overhead]:
    """Compare the percentiles of each client with those of httpx.

    Args:
        case: What was measured.
        seconds: Latencies by kind: PidClient, httpx.Client, AsyncPidClient, httpx.AsyncClient.
    """
    rows = []
    for client, other in (("PidClient", "httpx.Client"), ("AsyncPidClient", "httpx.AsyncClient")):
        pairs = 1000 * np.array([seconds[other], seconds[client]]).T
        low, high = difference_interval(pairs, PERCENTILES)
        without, through = np.percentile(pairs, PERCENTILES, axis=0).T
        columns = zip(PERCENTILES, without, through, through - without, low, high, strict=True)
        rows += [Overhead(str(case), client, *map(float, column)) for column in columns]
    return rows


def latencies(url: str, case: Case) -> dict[str, list[float]]:
    """Send `case.rounds` requests of each kind in turn and return the seconds that each took."""
    return asyncio.run(_latencies(url, case))


async def _latencies(url: str, case: Case) -> dict[str, list[float]]:
    post: dict[str, Any] = {
        "url": f"{url}/decode",
        "content": save({"latent": case.latent}),
        "params": {"seed": 1, "format": case.format},
        "headers": {"Content-Type": "application/x-safetensors"},
    }
    options: dict[str, Any] = {"seed": 1, "format": case.format}
    async with AsyncPidClient(url) as async_client, httpx.AsyncClient(timeout=60) as async_http:
        with PidClient(url) as client, httpx.Client(timeout=60) as http:

            async def decode() -> bytes:
                return (await async_client.decode(case.latent, **options)).data

            async def send() -> bytes:
                return (await async_http.post(**post)).raise_for_status().content

            kinds = {
                "PidClient": _awaitable(lambda: client.decode(case.latent, **options).data),
                "httpx.Client": _awaitable(lambda: http.post(**post).raise_for_status().content),
                "AsyncPidClient": decode,
                "httpx.AsyncClient": send,
            }
            await _take_turns(kinds, _WARM_UP)
            return await _take_turns(kinds, case.rounds)


def _awaitable(function: Callable[[], bytes]) -> Callable[[], Awaitable[bytes]]:
    async def call() -> bytes:
        return function()

    return call


async def _take_turns(kinds: Mapping[str, Callable[[], Awaitable[bytes]]], rounds: int) -> dict[str, list[float]]:
    """Call each function once per round, in an order that rotates, and return the seconds that each call took."""
    names, seconds = list(kinds), {name: list[float]() for name in kinds}
    sizes = set()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            data = await kinds[name]()
            seconds[name].append(time.perf_counter() - began)
            sizes.add(len(data))
    if len(sizes) > 1:
        raise SystemExit(f"The images of different clients have different sizes: {sorted(sizes)} bytes.")
    return seconds


def peak_bytes(url: str, case: Case) -> tuple[int, dict[str, int]]:
    """Return the size of the image and, by method, the largest number of bytes that Python allocated at once."""
    options: dict[str, Any] = {"seed": 1, "format": case.format}
    with PidClient(url) as client, tempfile.TemporaryDirectory() as folder:

        def stream() -> int:
            with client.stream(case.latent, **options) as chunks:
                return sum(map(len, chunks))

        def decode_to_file() -> int:
            path = Path(folder) / "image"
            client.decode_to_file(case.latent, path, **options)
            return path.stat().st_size

        methods: dict[str, Callable[[], int]] = {
            "decode": lambda: len(client.decode(case.latent, **options).data),
            "stream": stream,
            "decode_to_file": decode_to_file,
        }
        sizes = {method() for method in methods.values()}
        if len(sizes) > 1:
            raise SystemExit(f"The images of different methods have different sizes: {sorted(sizes)} bytes.")
        return sizes.pop(), {name: _peak(method) for name, method in methods.items()}


def _peak(method: Callable[[], int]) -> int:
    tracemalloc.start()
    try:
        method()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
