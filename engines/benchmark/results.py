"""Result of a benchmark, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.benchmark.roofline import Flops, Rates
from engines.manifest import Precision
from engines.pid.sampler import MAX_STEPS
from engines.size import Size


@dataclass(frozen=True)
class Implementation:
    """Measurements of one implementation."""

    seconds: Sequence[float]  # of each decode of a batch
    weight_bytes: int
    activation_bytes: int  # peak

    @property
    def decode_seconds(self) -> float:
        """Median over all decodes."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON report."""
        return {
            "decode_seconds": self.decode_seconds,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
        }


@dataclass(frozen=True)
class LowerBound:
    """Roofline of the device, and the decode time in seconds that it allows."""

    seconds: float
    flops: Flops
    rates: Rates

    def to_json(self) -> dict[str, float]:
        """Return the fields of the JSON report."""
        return {
            "seconds": self.seconds,
            "condition_flops": self.flops.condition,
            "step_flops": self.flops.step,
            **asdict(self.rates),
        }


@dataclass(frozen=True)
class MemoryOverDecodes:
    """Bytes in use after the first and the last of several decodes, and the maximum."""

    decodes: int
    first: int
    last: int
    largest: int

    @classmethod
    def of(cls, samples: Sequence[int]) -> MemoryOverDecodes:
        """Summarise the bytes in use after each decode."""
        return cls(len(samples), samples[0], samples[-1], max(samples))


@dataclass(frozen=True)
class BenchmarkResult:
    """Everything that one run of the benchmark measures."""

    machine: Mapping[str, str | int]
    decoder: str
    size: Size
    batch: int
    precision: Precision
    serving: Implementation
    stage_seconds: Mapping[str, float]  # of the serving runtime
    reference: Implementation | None  # None: skipped
    bound: LowerBound
    memory: MemoryOverDecodes

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios of the serving runtime to the lower bound ("floor") and to the reference ("published")."""
        ours, reference = self.serving, self.reference
        ratios = {"decode over floor": ours.decode_seconds / self.bound.seconds}
        if reference:
            pairs = zip(ours.seconds, reference.seconds, strict=False)  # the runtime may have decoded more often
            ratios |= {
                "time over published": statistics.median(a / b for a, b in pairs),
                "weight bytes over published": ours.weight_bytes / reference.weight_bytes,
                "activation bytes over published": ours.activation_bytes / (reference.activation_bytes or 1),
            }
        return ratios

    def to_json(self) -> dict[str, Any]:
        """Return the report, in the form of docs/measurements/flux-2k-1024-cpu.json."""
        report = {
            "machine": dict(self.machine),
            "decoder": self.decoder,
            "size": self.size,
            "batch": self.batch,
            "precision": self.precision,
            "runtime": {
                **self.serving.to_json(),
                "images_per_second": self.batch / self.serving.decode_seconds,
                "stage_seconds": dict(self.stage_seconds),
            },
            "floor": self.bound.to_json(),
            "memory_over_decodes": asdict(self.memory),
            "ratios": self.ratios,
        }
        return report | ({"published": self.reference.to_json()} if self.reference else {})

    def table(self) -> str:
        """Return the result as a plain-text table."""
        ours, reference, bound, memory = self.serving, self.reference, self.bound, self.memory

        def row(name: str, show: Callable[[float], str], quantity: Callable[[Implementation], float]) -> str:
            other = "" if reference is None else show(quantity(reference))
            return f"{name:<18}{show(quantity(ours)):>16}{other:>16}"

        lines = [
            f"{'':<18}{'runtime':>16}{'reference':>16}",
            row("decode", _milliseconds, lambda measured: measured.decode_seconds),
            *(f"  {stage:<16}{_milliseconds(seconds):>16}" for stage, seconds in self.stage_seconds.items()),
            row("images per second", "{:.3f}".format, lambda measured: self.batch / measured.decode_seconds),
            row("weights", _mebibytes, lambda measured: measured.weight_bytes),
            row("peak activations", _mebibytes, lambda measured: measured.activation_bytes),
            f"lower bound       {_milliseconds(bound.seconds):>16}  ({bound.flops.condition / 1e12:.3g} + "
            f"{MAX_STEPS}×{bound.flops.step / 1e12:.3g} TFLOP at {bound.rates.matmul_flops / 1e12:.3g} TFLOP/s)",
            f"memory in use: {_mebibytes(memory.first)} after the first decode, {_mebibytes(memory.last)} after "
            f"{memory.decodes}, {_mebibytes(memory.largest)} peak",
            *(f"{name:<34}{ratio:6.3f}" for name, ratio in self.ratios.items()),
        ]
        return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
