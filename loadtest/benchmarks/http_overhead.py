"""Benchmark of the HTTP overhead: requests to a server whose decoder costs nothing.

The server runs in this process and its client in another one, so this process's CPU time is that of the server alone:
reading the request, scheduling, encoding the PNG and sending it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from safetensors.torch import save

from engines.bundled.decoder import PHOTO
from engines.cli import ArgumentParser
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.benchmarks.png_encoder import Pixels, square_photo
from server.http.app import create_app
from server.http.connections import http_config
from server.images import png
from server.lifecycle import State
from server.service import DecodeService
from server.settings import Settings


@dataclass(frozen=True)
class HttpReport:
    """Cost of one request: CPU time of the server and latency at the client, in milliseconds."""

    response_mb: float
    requests: int
    server_ms: float
    encoding_ms: float
    median_ms: float
    largest_ms: float

    @property
    def other_ms(self) -> float:
        """CPU time of the server other than for encoding."""
        return self.server_ms - self.encoding_ms

    def table(self) -> str:
        """Return the report as text."""
        rows = {
            "response, MB": f"{self.response_mb:.2f}",
            "requests": f"{self.requests}",
            "server CPU time per request, ms": f"{self.server_ms:.2f}",
            "  encoding, ms": f"{self.encoding_ms:.2f}",
            "  everything else, ms": f"{self.other_ms:.2f}",
            "client latency, median, ms": f"{self.median_ms:.2f}",
            "client latency, maximum, ms": f"{self.largest_ms:.2f}",
        }
        return "\n".join(f"{name:<40}{value:>10}" for name, value in rows.items())

    def document(self) -> dict[str, float]:
        """Return the report under its published JSON keys."""
        return {
            "answer, MB": self.response_mb,
            "requests": self.requests,
            "server's processor time, ms a request": self.server_ms,
            "  of which encoding, ms": self.encoding_ms,
            "  of which everything else, ms": self.other_ms,
            "latency at the client, median, ms": self.median_ms,
            "latency at the client, largest, ms": self.largest_ms,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = ArgumentParser(
        prog="python -m loadtest.benchmarks.http_overhead",
        usage="%(prog)s [options]",
        description="Measure the CPU time and latency of requests to a decoder that takes no time.",
    )
    add = parser.add_argument
    add("--size", type=int, default=2048, metavar="PIXELS", help="side of the square image (default: %(default)s)")
    add("--requests", type=int, default=50, metavar="COUNT", help="requests to send in turn (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    report = measure(options.size, options.requests)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.document(), indent=2) + "\n")


def measure(size: int, requests: int) -> HttpReport:
    """Measure `requests` requests for images of `size` pixels per side."""
    image, _ = square_photo(PHOTO, size)
    png.warm_up()
    square = Size(size, size)
    runtime = SimulatedRuntime({square: SimulatedCost()}, {square: image})
    body = save({"latent": torch.zeros(16, *runtime.info.latent_size(square), dtype=torch.float16)})
    service = DecodeService(Settings(bundle=Path(), encoder_threads=2), {"simulated": {"simulated": runtime}})
    with serving(service) as port, multiprocessing.get_context("spawn").Pool(1) as client:
        client.apply(send, (port, body, 5))
        before = time.process_time()
        latencies = client.apply(send, (port, body, requests))
        spent = time.process_time() - before
    return HttpReport(
        response_mb=len(png.encode(image)) / 1e6,
        requests=requests,
        server_ms=1000 * spent / requests,
        encoding_ms=1000 * _encoding_seconds(image, requests),
        median_ms=1000 * statistics.median(latencies),
        largest_ms=1000 * max(latencies),
    )


@contextlib.contextmanager
def serving(service: DecodeService) -> Iterator[int]:
    """Serve `service` on a thread of this process for the duration of the block; yield the port."""
    server = uvicorn.Server(http_config(create_app(service), service))
    # With the protocol 0 of socket.create_server, asyncio would not set TCP_NODELAY, and responses could wait 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while thread.is_alive() and (service.lifecycle.state is State.STARTING or not server.started):
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def send(port: int, body: bytes, count: int) -> list[float]:
    """Send `count` requests over one connection and return the seconds that each took."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", "/decode?seed=1", body, {"Content-Type": "application/x-safetensors"})
        response = connection.getresponse()
        data = response.read()
        seconds.append(time.perf_counter() - began)
        if response.status != 200:
            raise SystemExit(f"The server returned status {response.status}: {data[:500]!r}")
    return seconds


def _encoding_seconds(image: Pixels, rounds: int) -> float:
    """Return the CPU seconds for encoding one image on one thread."""
    before = time.process_time()
    for _ in range(rounds):
        png.encode(image)
    return (time.process_time() - before) / rounds


if __name__ == "__main__":
    main()
