"""Roofline of a device: measured matmul and copy rates, and the lower bound that they imply for a decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from engines.benchmark.timing import best_seconds
from engines.pid import FoldedDecoder, PidConfig
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS
from engines.size import Size

NO_CHUNKING = 2**62  # a pixel_memory_budget in bytes that no size exceeds, so the pixel blocks run in one piece


@dataclass(frozen=True)
class Rates:
    """Measured peak rates of a device: large square matrix products, and copies within its memory."""

    matmul_flops: float  # per second, in the benchmark's precision
    copy_bytes: float  # per second, read plus written


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one call of each graph."""

    condition: int
    step: int


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the rates of `device`, with matrix products in `dtype`."""
    side, count = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    matmul = best_seconds(device, lambda: a @ b)
    copy = best_seconds(device, lambda: target.copy_(source))
    return Rates(2 * side**3 / matmul, 2 * count / copy)


def count_flops(config: PidConfig, size: Size, caption_tokens: int, batch: int) -> Flops:
    """Count the operations of decoding a batch at an output size, on the meta device: nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        decoder = FoldedDecoder(config, MODEL_TIMESTEPS)
        decoder.pixel_memory_budget = NO_CHUNKING
        latent = torch.empty(batch, config.latent_channels, *config.latent_size(size))
        with FlopCounterMode(display=False) as condition:
            conditioning = decoder.condition(latent, torch.empty(batch, caption_tokens, config.caption_width), size)
        with FlopCounterMode(display=False) as step:
            rows = torch.zeros(batch, dtype=torch.long)
            decoder.velocity_at(torch.empty(batch, 3, *size), rows, conditioning, torch.empty(batch))
    return Flops(condition.get_total_flops(), step.get_total_flops())


def lower_bound_seconds(rates: Rates, flops: Flops, weight_bytes: int) -> float:
    """Return the time in seconds that no four-step decode on this device can beat.

    It is the larger of two times: all operations at the matmul rate, and all weights read once per step.
    """
    compute = (flops.condition + MAX_STEPS * flops.step) / rates.matmul_flops
    memory = MAX_STEPS * weight_bytes / (rates.copy_bytes / 2)
    return max(compute, memory)
