"""What a process uses, as the kernel counts it: memory, descriptors and threads."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engines.errors import ConfigError

INTERVAL = 1.0  # seconds


@dataclass(frozen=True)
class Usage:
    """Usage at one moment, or the medians of a period."""

    at: float  # seconds after sampling began
    memory_mb: float  # resident memory
    descriptors: float
    threads: float


def read_usage(pid: int, at: float = 0.0) -> Usage:
    """Return the present usage of a process.

    Raises:
        ConfigError: The process does not exist, or the system is not Linux.
    """
    folder = Path(f"/proc/{pid}")
    try:
        lines = (folder / "status").read_text().splitlines()
        descriptors = sum(1 for _ in (folder / "fd").iterdir())
    except OSError as error:
        raise ConfigError(f"Cannot read /proc of process {pid}, which may have exited: {error.strerror}.") from None
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return Usage(at, int(status["VmRSS"][0]) * 1024 / 1e6, descriptors, int(status["Threads"][0]))


def median_usage(samples: Sequence[Usage], begin: float, end: float) -> Usage:
    """Return the medians of the samples in [begin, end)."""
    within = [sample for sample in samples if begin <= sample.at < end]
    memory, descriptors, threads = (
        statistics.median(getattr(sample, name) for sample in within)
        for name in ("memory_mb", "descriptors", "threads")
    )
    return Usage(begin, memory, descriptors, threads)


@asynccontextmanager
async def watching(pid: int) -> AsyncIterator[list[Usage]]:
    """Sample the usage of a process every `INTERVAL` seconds during the block, until it exits."""
    samples, began = list[Usage](), time.monotonic()

    async def sample() -> None:
        with suppress(ConfigError):
            while True:
                samples.append(read_usage(pid, time.monotonic() - began))
                await asyncio.sleep(INTERVAL)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()
