"""Time of work on a CUDA device, by which kernels are chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

REPEATS = 3

T = TypeVar("T")
Timer = Callable[[Callable[[], object]], float]  # runs a function and returns its duration in seconds


def if_supported(measure: Callable[[], T]) -> T | None:
    """Return what `measure` returns, or None if it raises RuntimeError because the device does not support a kernel.

    Raises:
        torch.AcceleratorError: The device is broken.
        torch.OutOfMemoryError: The device is out of memory.
    """
    try:
        return measure()
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as reason:
        log.debug("not supported: %s", reason)
        return None


def cuda_seconds(work: Callable[[], object]) -> float:
    """Return the shortest duration of a few runs on the current CUDA stream."""
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return min(seconds)
