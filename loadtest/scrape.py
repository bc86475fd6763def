"""Samples of the server's metrics, scraped from /metrics during a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from loadtest.http_client import Client

INTERVAL = 0.5  # seconds


@dataclass(frozen=True)
class Sample:
    """One scrape, `at` seconds after scraping began."""

    at: float
    queue_images: float
    running_images: float
    batch_sum: float
    batch_count: float
    steps: float
    images: float
    cancelled: float
    memory_bytes: float  # resident memory of the server process
    cpu_seconds: float
    prompts: float = 0.0  # admitted images with a prompt
    encoded_prompts: float = 0.0  # those among them that needed the text encoder


_METRICS = {
    "queue_images": "pid_queue_images",
    "running_images": "pid_running_images",
    "batch_sum": "pid_batch_size_sum",
    "batch_count": "pid_batch_size_count",
    "steps": "pid_steps_total",
    "images": "pid_images_total",
    "cancelled": "pid_cancelled_total",
    "memory_bytes": "process_resident_memory_bytes",
    "cpu_seconds": "process_cpu_seconds_total",
    "prompts": "pid_prompts_total",
    "encoded_prompts": 'pid_prompts_total{source="encoder"}',
}
_COUNTERS = ("batch_sum", "batch_count", "steps", "images", "cancelled", "cpu_seconds", "prompts", "encoded_prompts")


def read_metrics(exposition: str) -> dict[str, float]:
    """Parse Prometheus' text format into values by series, e.g. `pid_images_total{format="png"}`."""
    lines = (line.rpartition(" ") for line in exposition.splitlines() if line and not line.startswith("#"))
    return {series: float(value) for series, _, value in lines}


def parse(exposition: str, at: float) -> Sample:
    """Return the sample of a scrape. Values are summed over unspecified labels; a missing metric counts as 0."""
    sums = read_metrics(exposition)
    for series, value in list(sums.items()):
        name = series.partition("{")[0]
        if name != series:
            sums[name] = sums.get(name, 0.0) + value
    return Sample(at, **{field: sums.get(name, 0.0) for field, name in _METRICS.items()})


def continuous(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples with counters that do not restart at zero when the server process is replaced."""
    joined: list[Sample] = []
    base, previous = dict.fromkeys(_COUNTERS, 0.0), None
    for sample in samples:
        if previous is not None and sample.cpu_seconds < previous.cpu_seconds:
            base = {name: base[name] + getattr(previous, name) for name in _COUNTERS}
        joined.append(replace(sample, **{name: base[name] + getattr(sample, name) for name in _COUNTERS}))
        previous = sample
    return joined


@asynccontextmanager
async def sampling(url: str) -> AsyncIterator[list[Sample]]:
    """Scrape the server at `url` every `INTERVAL` seconds during the block and once at its end.

    Failed scrapes are skipped.
    """
    client, samples = Client(url), list[Sample]()
    began = time.perf_counter()

    async def scrape() -> None:
        with suppress(OSError, ValueError):
            status, body = await client.get("/metrics")
            if status == 200:
                samples.append(parse(body.decode(), time.perf_counter() - began))

    async def sample() -> None:
        while True:
            await scrape()
            await asyncio.sleep(INTERVAL)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await scrape()
        client.close()
