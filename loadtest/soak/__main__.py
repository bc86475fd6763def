"""`python -m loadtest.soak`: 60,000 good and bad requests in five minutes against a server on a simulated device.

The server's memory, descriptors and threads should be the same at the end as at the beginning. Requires Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engines.cli import ArgumentParser
from engines.errors import PidError
from loadtest import processes
from loadtest.http_client import Client
from loadtest.keys import create_keys
from loadtest.scrape import read_metrics
from loadtest.soak.kinds import BAD, GOOD, Behaviour, Kind, make_kinds
from loadtest.soak.report import SoakReport
from loadtest.soak.sender import Sender
from loadtest.soak.usage import Usage, read_usage, watching
from loadtest.summary import percentile
from loadtest.target import inspect_server

# Short limits, so that many slow clients meet them.
_FLAGS = (
    *("--header-timeout", "2", "--body-timeout", "3", "--response-timeout", "5", "--keep-alive-timeout", "5"),
    *("--drain-delay", "0", "--pre-encoded"),
)
_MAX_BODY_BYTES = 2 * 2**20
_WARM_UP = 3  # requests of each kind that gets a response, before anything is measured
_SETTLE_SECONDS = 30.0  # limit for the server to close the last connections


def main(arguments: Sequence[str]) -> int:
    """Run the test; return 0 if every check holds, 1 if not, and 2 if the run was impossible."""
    options = _parser().parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(soak(options.requests, options.duration, options.output.resolve(), options.memory_growth))
    except PidError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    print(report.table())
    return 0 if report.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m loadtest.soak",
        usage="%(prog)s [options]",
        description="Send many good and bad requests to a server on a simulated device, and compare what it uses at "
        "the beginning and at the end.",
    )
    add = parser.add_argument
    add("--requests", type=int, default=60_000, metavar="COUNT", help="requests to send (default: %(default)s)")
    add("--duration", type=float, default=300.0, metavar="SECONDS", help="time to send them (default: %(default)s)")
    add(
        "--memory-growth",
        type=float,
        default=16.0,
        metavar="MB",
        help="allowed growth of the server's memory from the first minute to the last (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("loadtest-report"),
        metavar="DIR",
        help="directory for the server's log (default: %(default)s)",
    )
    return parser


async def soak(requests: int, duration: float, folder: Path, memory_bound_mb: float) -> SoakReport:
    """Start a server, send it `requests` requests within `duration` seconds, and stop it.

    Raises:
        ConfigError: The server does not start, or the system is not Linux.
    """
    keys = create_keys(folder / "api-keys", (GOOD, BAD))
    flags = [*_FLAGS, "--max-body-bytes", str(_MAX_BODY_BYTES), "--api-keys", str(folder / "api-keys")]
    async with processes.started(processes.simulated_server("zero", 1, flags, folder / "soak.log")) as server:
        target = await inspect_server(server.url, keys=keys)
        (shape,) = target.latents.values()
        kinds = make_kinds(shape, keys, _MAX_BODY_BYTES)
        sender = Sender("127.0.0.1", server.port)
        for kind in kinds:
            if kind.behaviour is Behaviour.READ:
                await asyncio.gather(*(sender.send(kind) for _ in range(_WARM_UP)))
        sender.close()
        before = await _settled(server.pid)
        cpu, began = time.process_time(), time.monotonic()
        async with watching(server.pid) as samples:
            results, lags = await _send_all(sender, _draw(kinds, requests), duration)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        sender.close()
        after = await _settled(server.pid, before.descriptors)
        metrics = await _metrics(server.url)
        status = await server.stop()
    return SoakReport(
        kinds=kinds,
        results={kind.name: results[kind.name] for kind in kinds if kind.name in results},
        duration=duration,
        seconds=seconds,
        cpu_seconds=cpu,
        lag_p99_ms=1000 * percentile(lags, 99),
        before=before,
        after=after,
        samples=samples,
        metrics=metrics,
        exit_status=status,
        memory_bound_mb=memory_bound_mb,
    )


def _draw(kinds: Sequence[Kind], requests: int) -> list[Kind]:
    """Draw the kinds of all requests, always in the same order."""
    shares = np.array([kind.share for kind in kinds])
    return [kinds[index] for index in np.random.default_rng(1).choice(len(kinds), requests, p=shares / shares.sum())]


async def _send_all(
    sender: Sender, requests: Sequence[Kind], duration: float
) -> tuple[dict[str, Counter[str]], list[float]]:
    """Send the requests at a constant rate.

    Returns:
        The number of each result by kind, and the seconds by which each request was sent late.
    """
    results: dict[str, Counter[str]] = {}
    lags, tasks, began = [], set[asyncio.Task[None]](), time.monotonic()

    async def send(kind: Kind) -> None:
        result = await sender.send(kind)
        results.setdefault(kind.name, Counter())[result] += 1

    for number, kind in enumerate(requests):
        at = began + number * duration / len(requests)
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        lags.append(max(0.0, time.monotonic() - at))
        task = asyncio.create_task(send(kind))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return results, lags


async def _settled(pid: int, descriptors: float = 0) -> Usage:
    """Return the usage of the idle server once it has at most `descriptors` open, or after `_SETTLE_SECONDS`."""
    end = time.monotonic() + _SETTLE_SECONDS
    usage, stable = read_usage(pid), 0
    while time.monotonic() < end and stable < 3:
        await asyncio.sleep(1.0)
        previous, usage = usage, read_usage(pid)
        settled = usage.descriptors <= descriptors or (not descriptors and usage.descriptors == previous.descriptors)
        stable = stable + 1 if settled else 0
    return usage


async def _metrics(url: str) -> dict[str, float]:
    """Return what the idle server should report as 0, by a description."""
    client = Client(url)
    try:
        _, body = await client.get("/metrics")
    finally:
        client.close()
    values = read_metrics(body.decode())

    def total(start: str) -> float:
        return sum(value for series, value in values.items() if series.startswith(start))

    return {
        "responses with status 500": total('pid_requests_total{code="500"'),
        "images in the queue": total("pid_queue_images{"),
        "images on the device": total("pid_running_images{"),
        "undelivered bytes": values["pid_pending_bytes"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
