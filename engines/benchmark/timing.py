"""Wall-clock time of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work; no-op on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call of `work`, including the work that it queues on the device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def best_seconds(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the seconds of the fastest of `repeats` calls, after one call that is not timed."""
    work()
    return min(measure_seconds(device, work) for _ in range(repeats))
