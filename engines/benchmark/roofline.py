"""What a device sets: its rates, measured, and the time and memory below which no decode can go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from engines.benchmark.activations import PeakActivations
from engines.pid import FoldedDecoder, PidConfig
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS
from engines.size import Size

UNLIMITED = 2**62  # as a memory budget of the pixel blocks: whole, not in chunks


@dataclass(frozen=True)
class Rates:
    """What the device does at best, measured: large square matrix products, and copies in its own memory."""

    matmul_flops: float  # per second, in the benchmark's precision
    copy_bytes: float  # per second, read plus written


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    side, count = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    matmul = best_seconds(device, lambda: a @ b)
    copy = best_seconds(device, lambda: target.copy_(source))
    return Rates(2 * side**3 / matmul, 2 * count / copy)


def best_seconds(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> float:
    """Of the fastest of a few runs."""
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(config: PidConfig, size: Size, caption_tokens: int, batch: int) -> tuple[int, int]:
    """Floating-point operations of one condition and of one step, counted on the meta device."""
    with torch.device("meta"), torch.no_grad():
        decoder = FoldedDecoder(config, MODEL_TIMESTEPS)
        decoder.pixel_memory_budget = UNLIMITED
        latent = torch.empty(batch, config.latent_channels, *config.latent_size(size))
        with FlopCounterMode(display=False) as condition:
            conditioning = decoder.condition(latent, torch.empty(batch, caption_tokens, config.caption_width), size)
        with FlopCounterMode(display=False) as step:
            rows = torch.zeros(batch, dtype=torch.long)
            decoder.velocity_at(torch.empty(batch, 3, *size), rows, conditioning, torch.empty(batch))
    return condition.get_total_flops(), step.get_total_flops()


def floor_seconds(rates: Rates, flops: tuple[int, int], weight_bytes: int) -> float:
    """No decode on this device can be faster: all operations at the matrix rate, or all weights read once a step."""
    condition, step = flops
    by_arithmetic = (condition + MAX_STEPS * step) / rates.matmul_flops
    by_memory = MAX_STEPS * weight_bytes / (rates.copy_bytes / 2)
    return max(by_arithmetic, by_memory)


def peak_activations(device: torch.device, work: Callable[[], None]) -> int:
    """Bytes that `work` takes at its peak: by the allocator on CUDA, by the tensors it makes elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakActivations() as memory:
        work()
    return memory.peak


def resident(device: torch.device, work: Callable[[], None]) -> int:
    """Bytes that `work` leaves allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)  # reserved: a graph's memory is not allocated between its runs
        work()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device) - before
    with PeakActivations() as memory:
        work()
    return memory.live


def memory_in_use(device: torch.device) -> int:
    """Bytes held now: of the device's allocator on CUDA, of the process elsewhere (on Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
