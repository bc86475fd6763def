"""Ceilings and predicted times of the kernels of this project, from counted work and published rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.benchmark.kernels.work import KernelWork
from engines.benchmark.predictions import Gpu

SPECIAL_PER_CLOCK = 16  # exponentials, reciprocals and reciprocal roots, per multiprocessor


@dataclass(frozen=True)
class Multiprocessors:
    """Number of multiprocessors, and FLOP of each per clock in bf16; with the published rate, they give the clock."""

    count: int
    flops_per_clock: int

    def clock(self, gpu: Gpu) -> float:
        """Return the clock in Hz at which the published rate in bf16 is reached."""
        return gpu.bf16 / (self.count * self.flops_per_clock)

    def special_rate(self, gpu: Gpu) -> float:
        """Return the special functions per second at that clock."""
        return SPECIAL_PER_CLOCK * self.count * self.clock(gpu)


MULTIPROCESSORS: Mapping[str, Multiprocessors] = {
    "H100": Multiprocessors(132, 4096),
    "H200": Multiprocessors(132, 4096),
    "RTX 5090": Multiprocessors(170, 512),
    "GB200": Multiprocessors(148, 8192),
}

# Products and special functions at their published rates, one after the other, relative to the assumed time. The page
# has the reasons.
_ATTENTION: Mapping[str, float] = {"H100": 1.0, "H200": 1.0, "RTX 5090": 1.0, "GB200": 0.475}
_FP8_VALUES = 0.85  # for attention with values in FP8, in addition
_PIXEL_UPDATE = 0.6


@dataclass(frozen=True)
class Times:
    """Times of one call of a kernel in seconds."""

    products: float  # at the published rates, as are the next two
    special: float
    memory: float
    predicted: float

    @property
    def ceiling(self) -> float:
        """Least time: if the three overlap perfectly."""
        return max(self.products, self.special, self.memory)

    @property
    def bound(self) -> str:
        """Whose time the ceiling is."""
        parts = {"products": self.products, "special functions": self.special, "memory": self.memory}
        return max(parts, key=parts.__getitem__)


def times(gpu: Gpu, work: KernelWork) -> Times:
    """Return the ceilings of one call of a kernel, and its predicted time."""
    products = work.bf16 / gpu.bf16 + work.fp8 / gpu.fp8
    special = work.special / MULTIPROCESSORS[gpu.name].special_rate(gpu)
    memory = work.nbytes / gpu.memory
    busy = (products * work.padding + special) / _efficiency(gpu, work)
    return Times(products, special * (1 - work.polynomials), memory, max(busy, memory / gpu.bandwidth))


def _efficiency(gpu: Gpu, work: KernelWork) -> float:
    if work.kernel == "attention":
        return _ATTENTION[gpu.name] * (1.0 if work.bf16 else _FP8_VALUES)
    return gpu.fp8_linear if work.fp8 else _PIXEL_UPDATE
