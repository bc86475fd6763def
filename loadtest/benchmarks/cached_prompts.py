"""Benchmark of cached prompts: the same request with and without a prompt whose caption the server has in memory.

Requests are sent in pairs over one connection, one of each kind, in alternating order, so that a drift of the machine's
speed affects both kinds equally. The decoder and the text encoder take no time. The server runs in this process and its
client in another one.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from safetensors.torch import save

from engines.captions.simulated import SimulatedTextEncoder
from engines.cli import ArgumentParser
from engines.runtime.simulated import SimulatedCost, SimulatedRuntime
from engines.size import Size
from loadtest.benchmarks.http_overhead import serving
from loadtest.benchmarks.pairs import difference_interval
from loadtest.generator import PROMPT
from server.images import png
from server.service import DecodeService
from server.settings import Settings

PERCENTILES = (50.0, 90.0, 99.0)
_WARM_UP = 50  # pairs


@dataclass(frozen=True)
class Quantile:
    """A percentile of the latency at the client, in milliseconds."""

    percentile: float
    without_ms: float
    cached_ms: float
    low_ms: float  # 95 % interval of the difference
    high_ms: float

    @property
    def added_ms(self) -> float:
        """Difference between requests with and without a prompt."""
        return self.cached_ms - self.without_ms


@dataclass(frozen=True)
class PromptReport:
    """Latency of requests with a cached prompt and without a prompt."""

    size: int  # pixels per side
    pairs: int
    load_average: float
    quantiles: tuple[Quantile, ...]

    def table(self) -> str:
        """Return the report as text."""
        lines = [f"{self.pairs} pairs of requests for {self.size}x{self.size}, latency in ms", ""]
        lines.append(f"{'':<6}{'no prompt':>12}{'cached prompt':>16}{'difference':>13}   95 % interval")
        lines += [
            f"p{q.percentile:<5g}{q.without_ms:>12.3f}{q.cached_ms:>16.3f}{q.added_ms:>+13.3f}"
            f"   {q.low_ms:+.3f} to {q.high_ms:+.3f}"
            for q in self.quantiles
        ]
        return "\n".join(lines)

    def document(self) -> dict[str, object]:
        """Return the report for JSON."""
        quantiles = [{**asdict(q), "added_ms": q.added_ms} for q in self.quantiles]
        rounded = [{name: round(value, 4) for name, value in quantile.items()} for quantile in quantiles]
        return {**asdict(self), "quantiles": rounded}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = ArgumentParser(
        prog="python -m loadtest.benchmarks.cached_prompts",
        usage="%(prog)s [options]",
        description="Measure the latency that a cached prompt adds to a request.",
    )
    add = parser.add_argument
    add("--size", type=int, default=256, metavar="PIXELS", help="side of the square image (default: %(default)s)")
    add("--pairs", type=int, default=3000, metavar="COUNT", help="pairs of requests to send (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    report = measure(options.size, options.pairs)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.document(), indent=2) + "\n")


def measure(size: int, pairs: int) -> PromptReport:
    """Measure `pairs` requests of each kind for images of `size` pixels per side."""
    png.warm_up()
    square = Size(size, size)
    runtime = SimulatedRuntime({square: SimulatedCost()})
    body = save({"latent": torch.zeros(16, *runtime.info.latent_size(square), dtype=torch.float16)})
    settings = Settings(bundle=Path(), encoder_threads=2)
    encoder = SimulatedTextEncoder(runtime.info.caption_tokens, runtime.info.caption_width)
    service = DecodeService(settings, {"simulated": {"simulated": runtime}}, text_encoder=encoder)
    with serving(service) as port, multiprocessing.get_context("spawn").Pool(1) as client:
        client.apply(send_pairs, (port, body, _WARM_UP))  # also encodes the prompt
        seconds = np.array(client.apply(send_pairs, (port, body, pairs)))
    return PromptReport(size, pairs, os.getloadavg()[0], quantiles(1000 * seconds))


def send_pairs(port: int, body: bytes, pairs: int) -> list[tuple[float, float]]:
    """Send pairs of requests and return the seconds that each took: without a prompt, with the prompt."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    paths = ("/decode?seed=1", f"/decode?seed=1&prompt={quote(PROMPT)}")
    taken = []
    for number in range(pairs):
        pair = [0.0, 0.0]
        for kind in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            connection.request("POST", paths[kind], body, {"Content-Type": "application/x-safetensors"})
            response = connection.getresponse()
            data = response.read()
            pair[kind] = time.perf_counter() - began
            if response.status != 200:
                raise SystemExit(f"The server returned status {response.status}: {data[:500]!r}")
        taken.append((pair[0], pair[1]))
    return taken


def quantiles(pairs: np.ndarray) -> tuple[Quantile, ...]:
    """Compare the percentiles of two columns, without and with a prompt, with an interval of the difference."""
    low, high = difference_interval(pairs, PERCENTILES)
    without, cached = np.percentile(pairs, PERCENTILES, axis=0).T
    rows = zip(PERCENTILES, without, cached, low, high, strict=True)
    return tuple(Quantile(*map(float, row)) for row in rows)


if __name__ == "__main__":
    main()
