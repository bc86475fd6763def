"""`python -m loadtest.compare_litserve`: the same engine, encoder and client; this server and LitServe beside it.

Devices that take no time, latents of 0.5 MB, answers of 2048x2048: what remains is what a server adds. Each server runs
alone. Throughput is measured with clients that ask again at once, latency at half of that with Poisson arrivals. What
moving the bytes takes on the machine at hand is measured too, with a server that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from engines.errors import ConfigError, PidError
from engines.runtime.simulated import picture
from loadtest import processes
from loadtest.generator import Generator, Outcome, Run
from loadtest.http_client import Client
from loadtest.plan import Capacity, make_plan
from loadtest.scenario import Arrivals, RequestClass, Scenario
from loadtest.simulated_server import find_table
from loadtest.summary import percentile
from server import png

SIZE = (2048, 2048)
KIND = RequestClass(name="2K", size=SIZE)
SERVERS = {
    "this server": ["loadtest.simulated_server", "--log-level", "warning", "--drain-delay", "0"],
    "LitServe": ["loadtest.litserve_server"],
    "LitServe, fast_queue": ["loadtest.litserve_server", "--fast-queue"],
}
FLOOR = "bytes alone"
READY = {"this server": "/health/ready"}  # LitServe has /health


@dataclass(frozen=True)
class Measured:
    """One server with one kind of answer. Times in milliseconds."""

    server: str
    answers: str
    throughput: float  # answers a second
    megabytes: float  # of one answer
    p50_ms: float  # at half of that throughput
    p99_ms: float
    beyond_encoding_ms: float  # p99 less what one encoding takes on an idle thread
    errors: int
    client_cpu: float  # cores that the client used at full throughput


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare_litserve", description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--concurrency", type=int, default=8, help="clients that find the throughput")
    parser.add_argument("--output", type=Path, default=Path("loadtest-report"))
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if find_spec("litserve") is None:
            raise ConfigError("LitServe is not installed; pip install '.[litserve]' brings it.")
        measured = asyncio.run(compare(options.seconds, options.concurrency, folder))
    except PidError as error:
        print(f"compare_litserve: {error}", file=sys.stderr)
        return 2
    (folder / "litserve.json").write_text(json.dumps([asdict(row) for row in measured], indent=2))
    print(table(measured))
    return 0


async def compare(seconds: float, concurrency: int, folder: Path) -> list[Measured]:
    """Measure every server, and the floor below them, with both kinds of answer."""
    encoding, measured = _encoding_seconds(), []
    flags = {"encoded": [], "pre-encoded": ["--pre-encoded"]}
    for answers in flags:
        bench = Bench(answers, encoding if answers == "encoded" else 0.0, seconds, concurrency, folder)
        for server, module in SERVERS.items():
            measured.append(await bench.measure(server, [*module, "--table", "zero", *flags[answers]]))
        ours = measured[-len(SERVERS)]
        floor = ["loadtest.bytes_server", "--bytes", str(round(1e6 * ours.megabytes))]
        measured.append(await bench.measure(FLOOR, floor, rate=ours.throughput / 2))
    return measured


@dataclass(frozen=True)
class Bench:
    """How servers are measured that give one kind of answer."""

    answers: str
    encoding: float  # seconds
    seconds: float
    concurrency: int
    folder: Path

    async def measure(self, server: str, command: Sequence[str], rate: float | None = None) -> Measured:
        """Throughput, then latency at `rate` requests a second, which is half the throughput if not given."""
        port, zero = processes.free_port(), find_table("zero")
        log = self.folder / "litserve.log"
        process = processes.Process([sys.executable, "-m", *command, "--port", str(port)], port, log)
        await process.start(READY.get(server, "/health"))
        client = Client(process.url)
        generator = Generator(client, Capacity(zero.costs), {SIZE: zero.latent_shape(SIZE)})
        try:
            await generator.saturate(KIND, self.concurrency, self.seconds / 4)  # warm
            full = await generator.saturate(KIND, self.concurrency, self.seconds)
            throughput = len(_whole(full)) / full.wall_seconds
            if throughput == 0:
                raise ConfigError(f"{server} answered nothing: {full.outcomes[0].error}; see {log}.")
            arrivals = Arrivals(rate=rate or throughput / 2)
            scenario = Scenario(title="half load", duration=self.seconds, arrivals=arrivals, mix=(KIND,))
            half = await generator.run(make_plan(scenario, Capacity(zero.costs)), give_up=30)
        finally:
            client.close()
            await process.stop(signal.SIGINT)
        latencies = [1000 * (outcome.latency or math.nan) for outcome in _whole(half)]
        p99 = percentile(latencies, 99)
        return Measured(
            server=server,
            answers=self.answers,
            throughput=throughput,
            megabytes=_whole(full)[0].size / 1e6,
            p50_ms=percentile(latencies, 50),
            p99_ms=p99,
            beyond_encoding_ms=p99 - 1000 * (0.0 if server == FLOOR else self.encoding),
            errors=sum(outcome.kind != "in time" for run in (full, half) for outcome in run.outcomes),
            client_cpu=full.cpu_seconds / full.wall_seconds,
        )


def _whole(run: Run) -> list[Outcome]:
    return [outcome for outcome in run.outcomes if outcome.kind == "in time"]


def _encoding_seconds() -> float:
    """Median of one encoding on one thread of an otherwise idle process."""
    png.warm_up()
    pixels, seconds = picture(SIZE), []
    for _ in range(9):
        began = time.perf_counter()
        png.encode(pixels)
        seconds.append(time.perf_counter() - began)
    return percentile(seconds, 50)


def table(measured: Sequence[Measured]) -> str:
    """Numbers and ratios as text; ratios against the faster LitServe."""
    lines = [f"{'answers':12} {'server':22} {'per second':>10} {'MB':>6} {'p50 ms':>8} {'p99 ms':>8} {'added p99':>10}"]
    lines += [
        f"{m.answers:12} {m.server:22} {m.throughput:10.1f} {m.megabytes:6.1f} {m.p50_ms:8.1f} {m.p99_ms:8.1f} "
        f"{m.beyond_encoding_ms:10.1f}" + (f"  {m.errors} errors" if m.errors else "")
        for m in measured
    ]
    for answers in ("encoded", "pre-encoded"):
        ours, *others, floor = (m for m in measured if m.answers == answers)
        best = max(others, key=lambda m: m.throughput)
        quickest = min(others, key=lambda m: m.beyond_encoding_ms)
        ratio = quickest.beyond_encoding_ms / ours.beyond_encoding_ms
        lines.append(
            f"{answers}: {ours.throughput / best.throughput:.2f} times LitServe's throughput; p99 at half load beyond "
            f"encoding {ours.beyond_encoding_ms:.1f} ms, of which {floor.p99_ms:.1f} ms move the bytes; "
            f"LitServe's {quickest.beyond_encoding_ms:.1f} ms, {ratio:.1f} times as much"
        )
    cores = max(m.client_cpu for m in measured)
    lines.append(
        f"The client used up to {cores:.2f} of {os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f}; "
        "half load is half of each server's own throughput, for the bytes alone half of this server's."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
