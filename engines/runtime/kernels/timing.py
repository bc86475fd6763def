"""Time of work on a CUDA device, by which kernels are chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch

REPEATS = 3

Timer = Callable[[Callable[[], object]], float]  # runs a function and returns its duration in seconds


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
