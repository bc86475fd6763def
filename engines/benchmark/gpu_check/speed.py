"""Time and memory of decodes: sizes, batches and precisions, the reference, torch.compile and TensorRT."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from engines.benchmark import compare
from engines.benchmark.activations import retained_bytes
from engines.benchmark.decoders import (
    ReferenceDecoder,
    ServingDecoder,
    calibrate_and_quantise,
    make_runtime,
    random_inputs,
    weight_bytes,
)
from engines.benchmark.gpu_check.config import RunConfig, folded_network
from engines.benchmark.gpu_check.findings import Failed, Finding, Measurement, Note, Skipped, Value
from engines.benchmark.results import Implementation
from engines.benchmark.timing import measure_seconds
from engines.bundle import Bundle, open_bundle
from engines.compile.inputs.random_weights import random_decoder
from engines.errors import ConfigError, DeviceMemoryError
from engines.manifest import Package, Precision
from engines.pid import FoldedDecoder
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.open import open_runtime
from engines.runtime.trt import import_package
from engines.size import Size

REPEATS = 2
MAX_FP8_ERROR = 0.5  # relative, of a velocity with random weights; rounding alone stays below
PACKAGES: tuple[Package, ...] = get_args(Package)


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each stage of a batch, measured with one step."""

    batch: int
    stages: Mapping[str, float]  # condition and finish of one image, step of the batch

    @property
    def decode_seconds(self) -> float:
        """Seconds of a four-step decode of the batch: the sum of its stages."""
        stages = self.stages
        return self.batch * (stages["condition"] + stages["finish"]) + MAX_STEPS * stages["step"]

    @property
    def images_per_second(self) -> float:
        """Throughput of such batches one after another."""
        return self.batch / self.decode_seconds

    def columns(self) -> dict[str, Value]:
        """Return the columns of the report."""
        stages = {f"{stage} ms": _milliseconds(seconds) for stage, seconds in self.stages.items()}
        throughput = float(f"{self.images_per_second:.4g}")
        return {**stages, "decode ms": _milliseconds(self.decode_seconds), "images/s": throughput}


@dataclass(frozen=True)
class RuntimeCost:
    """Times and memory of a runtime that was warmed up for one size."""

    times: StageTimes
    warm_up_seconds: float
    buffer_bytes: int
    peak_bytes: int | None  # of the allocator; CUDA only

    def columns(self) -> dict[str, Value]:
        """Return the columns of the report."""
        columns = self.times.columns()
        columns |= {"warm-up s": round(self.warm_up_seconds, 1), "buffers MiB": round(self.buffer_bytes / 2**20)}
        return columns | ({} if self.peak_bytes is None else {"peak MiB": round(self.peak_bytes / 2**20)})


def decode_bf16(config: RunConfig) -> Iterator[Finding]:
    """Measure all sizes and batches in bf16."""
    yield from _sizes_and_batches(config, folded_network(config), "bf16")


def decode_fp8(config: RunConfig) -> Iterator[Finding]:
    """Measure all sizes and batches in FP8, and its error against bf16."""
    folded = folded_network(config)
    before, exact = weight_bytes(folded), _velocity(config, folded)
    calibrate_and_quantise(folded)
    error = ((_velocity(config, folded) - exact).norm() / exact.norm()).item()
    yield Note(f"weights: {weight_bytes(folded) / 2**20:,.0f} MiB, {before / 2**20:,.0f} MiB in bf16")
    yield Note(f"velocity with random weights: relative error {error:.1e} against bf16")
    if not error < MAX_FP8_ERROR:  # also true for NaN
        yield Failed(f"FP8 error {error:.1e} exceeds {MAX_FP8_ERROR:g}")
    yield from _sizes_and_batches(config, folded, "fp8")


@torch.inference_mode()
def _velocity(config: RunConfig, folded: FoldedDecoder) -> Tensor:
    """Return the velocity [1, 3, H, W] of the first step at the smallest size; the same inputs every time."""
    size, device = config.sizes[0], config.device
    torch.manual_seed(0)
    latent, caption = random_inputs(folded.config, size, device)
    x = torch.randn(1, 3, *size, device=device)
    return folded.velocity(x, MODEL_TIMESTEPS[0], folded.condition(latent, caption, size), 0.0)


def _sizes_and_batches(config: RunConfig, folded: FoldedDecoder, precision: Precision) -> Iterator[Finding]:
    """Measure smallest first; leave out combinations that are not expected to finish before the deadline."""
    step_seconds, area = 0.0, 1  # of one image at the previous size
    for size in config.sizes:
        # Attention grows with the square: four times the pixels take up to sixteen times as long.
        step_seconds, area = step_seconds * (size.area / area) ** 2, size.area
        single: float | None = None  # images per second at batch 1
        for batch in config.batches:
            # The warm-up runs every batch size up to this one; then a few steps of this one are timed.
            expected = step_seconds * (batch * (batch + 1) / 2 + (1 + REPEATS) * batch)
            if expected > config.seconds_left:
                yield Note(f"{size} in batches of {batch} left out: it would take about {expected:.0f} s")
                continue
            row: dict[str, Value] = {"size": str(size), "batch": batch}
            cost = _serving_cost(folded, config, size, batch, precision)
            if cost is None:
                yield Measurement(row)
                yield Note(f"{size} in batches of {batch}: out of memory")
                continue
            if batch == 1:
                step_seconds, single = cost.times.stages["step"], cost.times.images_per_second
            speed_up = {} if single is None else {"over batch 1": f"{cost.times.images_per_second / single:.3f}"}
            yield Measurement(row | cost.columns() | speed_up)


def _serving_cost(
    folded: FoldedDecoder, config: RunConfig, size: Size, batch: int, precision: Precision
) -> RuntimeCost | None:
    """Measure a new runtime; None if the device runs out of memory."""
    runtime = make_runtime(folded, config.description, (size,), batch, precision)
    try:
        return _runtime_cost(runtime, batch)
    except DeviceMemoryError:
        return None
    finally:
        del runtime
        _free_memory(config.device)


def _runtime_cost(runtime: DeviceRuntime, batch: int) -> RuntimeCost:
    device = runtime.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.monotonic()
    buffers = retained_bytes(device, runtime.warm_up)
    warm_up = time.monotonic() - started
    times = _stage_times(runtime, runtime.info.sizes[0], batch)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return RuntimeCost(times, warm_up, buffers, peak)


def _stage_times(runtime: DeviceRuntime, size: Size, batch: int) -> StageTimes:
    decoder = ServingDecoder(runtime, batch, size)
    decoder.decode(steps=1)
    decoder.reset_times()
    for _ in range(REPEATS):
        decoder.decode(steps=1)
    return StageTimes(batch, decoder.stage_seconds())


def compare_with_reference(config: RunConfig) -> Iterator[Finding]:
    """Time the runtime and the reference in turn, without torch.compile, and compute the lower bound."""
    options = compare.Options(config.description, config.main_size, config.device, precision="bf16", compiled=False)
    result = compare.measure(compare.prepare(options), REPEATS, 0)
    yield _implementation("runtime, CUDA graphs" if config.device.type == "cuda" else "runtime", result.serving)
    if result.reference is not None:
        yield _implementation("reference", result.reference)
    yield Measurement({"implementation": "lower bound", "decode ms": _milliseconds(result.bound.seconds)})
    for name, ratio in result.ratios.items():
        yield Note(f"{name}: {ratio:.3f}")


def _implementation(name: str, result: Implementation) -> Measurement:
    return Measurement(
        {
            "implementation": name,
            "decode ms": _milliseconds(result.decode_seconds),
            "weights MiB": round(result.weight_bytes / 2**20),
            "activations MiB": round(result.activation_bytes / 2**20),
        }
    )


def decode_compiled(config: RunConfig) -> Iterator[Finding]:
    """Measure the runtime with torch.compile; its warm-up includes compilation."""
    precisions: tuple[Precision, ...] = ("bf16", "fp8")
    for precision in precisions:
        folded = folded_network(config)
        if precision == "fp8":
            calibrate_and_quantise(folded)
        runtime = make_runtime(folded, config.description, (config.main_size,), 1, precision, compiled=True)
        row: dict[str, Value] = {"precision": precision, "size": str(config.main_size), "batch": 1}
        yield Measurement(row | _runtime_cost(runtime, 1).columns())
        del runtime, folded
        _free_memory(config.device)


def decode_reference_compiled(config: RunConfig) -> Iterator[Finding]:
    """Time the reference with torch.compile, as its authors do."""
    network, size, device = config.description.config, config.main_size, config.device
    inputs = random_inputs(network, size, device)
    decoder = ReferenceDecoder(random_decoder(network, 0, device), inputs, size, compiled=True, autocast=True)
    first = measure_seconds(device, decoder.decode)
    best = min(measure_seconds(device, decoder.decode) for _ in range(REPEATS))
    yield Measurement({"size": str(size), "decode ms": _milliseconds(best), "first decode s": round(first, 1)})


def decode_with_engines(config: RunConfig) -> Iterator[Finding]:
    """Time the engines of a bundle, if TensorRT is installed and --bundle names one."""
    installed = [package for package in PACKAGES if _installed(package)]
    if not installed:
        yield Skipped(f"neither {' nor '.join(PACKAGES)} is installed")
        return
    if config.bundle is None:
        yield Skipped(f"{' and '.join(installed)} installed, but no --bundle with engines was passed")
        return
    yield from _time_engines(config, open_bundle(config.bundle))


def _time_engines(config: RunConfig, bundle: Bundle) -> Iterator[Finding]:
    manifest = bundle.manifest
    yield Note(f"{manifest.decoder}, {manifest.precision}, {manifest.runtime.package} {manifest.runtime.version}")
    runtime = open_runtime(bundle, config.device, slots=manifest.max_batch)
    seconds = measure_seconds(config.device, runtime.warm_up)
    yield Note(f"warm-up of all sizes and batches: {seconds:.1f} s")
    for size in manifest.sizes:
        for batch in range(1, manifest.max_batch + 1):
            row: dict[str, Value] = {"size": str(size), "batch": batch}
            yield Measurement(row | _stage_times(runtime, size, batch).columns())
    yield Note(f"peak memory: {(runtime.peak_memory() or 0) / 2**20:,.0f} MiB")


def _installed(package: Package) -> bool:
    try:
        import_package(package)
    except ConfigError:
        return False
    return True


def _milliseconds(seconds: float) -> float:
    return float(f"{1000 * seconds:.4g}")


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
