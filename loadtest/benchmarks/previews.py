"""Benchmark of previews: the same request without previews, with multipart previews and with server-sent events.

The kinds of requests take turns, so that a drift of the machine's speed affects all of them equally. The device is
simulated: a step takes as long as in the cost table, and a preview no time on the device. HTTP, encoding and everything
else are real. The server runs in this process and its client in another one.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from engines.cli import ArgumentParser
from engines.runtime.simulated import SimulatedRuntime, SimulatedTable
from engines.size import Size, size_argument
from loadtest.benchmarks.http_overhead import serving
from loadtest.cost_tables import find_table, table_names
from server.body.negotiation import EVENTS, REPLACE
from server.images import png
from server.service import DecodeService
from server.settings import Settings

KINDS: Mapping[str, str] = {"none": "image/png", "multipart": REPLACE, "events": EVENTS}  # Accept header
_WARM_UP = 3  # rounds


@dataclass(frozen=True)
class KindReport:
    """Times of one kind of request at the client, medians in milliseconds."""

    first_preview_ms: float | None  # from sending the request to the last byte of the first preview
    total_ms: float
    server_cpu_ms: float  # mean


@dataclass(frozen=True)
class PreviewReport:
    """Times of all kinds of requests."""

    device: str
    size: str
    rounds: int
    load_average: float
    condition_and_step_ms: float  # of the cost table
    kinds: Mapping[str, KindReport]

    def table(self) -> str:
        """Return the report as text."""
        lines = [
            f"{self.rounds} requests of each kind for {self.size} on a simulated {self.device}, ms at the client",
            f"condition and first step: {self.condition_and_step_ms:.1f} ms",
            "",
            f"{'previews':<12}{'first preview':>15}{'total':>10}{'server CPU':>12}",
        ]
        for name, kind in self.kinds.items():
            first = "-" if kind.first_preview_ms is None else f"{kind.first_preview_ms:.1f}"
            lines.append(f"{name:<12}{first:>15}{kind.total_ms:>10.1f}{kind.server_cpu_ms:>12.1f}")
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = ArgumentParser(
        prog="python -m loadtest.benchmarks.previews",
        usage="%(prog)s [options]",
        description="Measure when the first preview arrives, and what previews add to a request.",
    )
    add = parser.add_argument
    tables = ", ".join(table_names())
    add("--table", default="gb200", help=f"cost table: {tables}, or a JSON file (default: %(default)s)")
    add("--size", type=size_argument, default=Size(2048, 2048), help="size of the image (default: %(default)s)")
    add("--rounds", type=int, default=50, metavar="COUNT", help="requests of each kind (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    table = find_table(options.table)
    if options.size not in table.costs:
        parser.error(f"argument --size: the cost table has {', '.join(map(str, table.costs))}, not {options.size}")
    report = measure(table, options.size, options.rounds)
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


def measure(table: SimulatedTable, size: Size, rounds: int) -> PreviewReport:
    """Measure `rounds` requests of each kind."""
    png.warm_up()
    cost = table.costs[size]
    body = save({"latent": torch.zeros(table.latent_shape(size), dtype=torch.float16)})
    service = DecodeService(
        Settings(bundle=Path(), encoder_threads=2), {"simulated": {"gpu": SimulatedRuntime.from_table(table)}}
    )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    cpu = dict.fromkeys(KINDS, 0.0)
    with serving(service) as port, multiprocessing.get_context("spawn").Pool(1) as client:
        for number in range(-_WARM_UP, rounds):
            for name, accept in KINDS.items():
                before = time.process_time()
                both = client.apply(send, (port, body, accept))
                if number >= 0:
                    cpu[name] += time.process_time() - before
                    times[name].append(both)
    kinds = {}
    for name, taken in times.items():
        first, total = 1000 * np.median(np.array(taken), axis=0)
        kinds[name] = KindReport(
            None if name == "none" else round(float(first), 2),
            round(float(total), 2),
            round(1000 * cpu[name] / rounds, 2),
        )
    known = round(1000 * (cost.condition + cost.step), 2)
    return PreviewReport(table.name, str(size), rounds, os.getloadavg()[0], known, kinds)


def send(port: int, body: bytes, accept: str) -> tuple[float, float]:
    """Send a request and return the seconds until its first preview and its last byte had arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    ends = {EVENTS: b"\n\n", REPLACE: b"\r\n--"}
    began = time.perf_counter()
    connection.request("POST", "/decode", body, {"Content-Type": "application/x-safetensors", "Accept": accept})
    response = connection.getresponse()
    first, head = 0.0, b""
    while piece := response.read1():
        if not first and accept in ends:
            head += piece
            first = time.perf_counter() - began if ends[accept] in head else 0.0
    seconds = time.perf_counter() - began
    connection.close()
    if response.status != 200:
        raise SystemExit(f"The server returned status {response.status}.")
    return first, seconds


if __name__ == "__main__":
    main()
