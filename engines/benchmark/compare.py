"""Compare a decode in the serving runtime with the reference implementation and with the device's lower bound."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.benchmark.activations import bytes_in_use, peak_bytes, retained_bytes
from engines.benchmark.decoders import (
    ReferenceDecoder,
    ServingDecoder,
    calibrate_and_quantise,
    make_runtime,
    random_inputs,
    weight_bytes,
)
from engines.benchmark.results import BenchmarkResult, Implementation, LowerBound, MemoryOverDecodes
from engines.benchmark.roofline import count_flops, lower_bound_seconds, measure_rates
from engines.benchmark.timing import measure_seconds
from engines.bundle import DTYPES
from engines.compile.inputs.random_weights import random_decoder
from engines.compile.variants import cast
from engines.machine import device_name
from engines.manifest import Precision
from engines.pid import FoldedDecoder, PidConfig, PidDecoder, fold, load_checkpoint
from engines.pid.released import DecoderDescription
from engines.pid.sampler import MODEL_TIMESTEPS
from engines.runtime.device_runtime import DeviceRuntime
from engines.size import Size


@dataclass(frozen=True)
class Options:
    """Options of one benchmark. None selects the default for the device."""

    description: DecoderDescription
    size: Size
    device: torch.device
    batch: int = 1
    precision: Precision | None = None  # None: bf16 on CUDA, else fp32
    checkpoint: Path | None = None  # None: random weights
    compiled: bool | None = None  # None: on CUDA only
    skip_reference: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Both implementations of one network, ready to be timed."""

    config: PidConfig
    size: Size
    batch: int
    precision: Precision
    runtime: DeviceRuntime
    serving: ServingDecoder
    reference: ReferenceDecoder | None
    buffer_bytes: int  # allocated by the runtime once, at warm-up
    serving_weight_bytes: int
    reference_weight_bytes: int  # in the same precision as the runtime's


def prepare(options: Options) -> Benchmark:
    """Load or draw the weights, build both implementations and warm up the runtime."""
    device, size, batch, config = options.device, options.size, options.batch, options.description.config
    precision: Precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    compiled = device.type == "cuda" if options.compiled is None else options.compiled
    report_progress(f"{options.description.name} at {size}, {precision}, on {device_name(device)}")
    live = _load(options)
    folded = _fold_and_cast(live, precision)
    serving_weight_bytes = weight_bytes(folded)
    reference_weight_bytes = sum(p.numel() for p in live.parameters()) * DTYPES[precision].itemsize
    reference = None
    if not options.skip_reference:
        inputs = random_inputs(config, size, device, batch)
        reference = ReferenceDecoder(live, inputs, size, compiled=compiled, autocast=precision != "fp32")
    del live
    runtime = make_runtime(folded, options.description, (size,), batch, precision, compiled)
    buffers = retained_bytes(device, runtime.warm_up)
    return Benchmark(
        config=config,
        size=size,
        batch=batch,
        precision=precision,
        runtime=runtime,
        serving=ServingDecoder(runtime, batch),
        reference=reference,
        buffer_bytes=buffers,
        serving_weight_bytes=serving_weight_bytes,
        reference_weight_bytes=reference_weight_bytes,
    )


def _load(options: Options) -> PidDecoder:
    config = options.description.config
    if options.checkpoint:
        return load_checkpoint(options.checkpoint, config, torch.float32).to(options.device)
    return random_decoder(config, seed=0, device=options.device)


def _fold_and_cast(live: PidDecoder, precision: Precision) -> FoldedDecoder:
    folded = fold(live, MODEL_TIMESTEPS)
    cast(folded, DTYPES[precision])
    if precision in ("fp8", "fp4"):
        calibrate_and_quantise(folded, precision)
    return folded


def measure(bench: Benchmark, repeats: int, decodes: int) -> BenchmarkResult:
    """Time both implementations in turn `repeats` times.

    If `decodes` is larger, the runtime continues alone up to that number of decodes, to show whether memory grows.
    """
    device, serving, reference = bench.runtime.device, bench.serving, bench.reference
    # The first decode of each also warms it up.
    serving_activations = bench.buffer_bytes + peak_bytes(device, serving.decode)
    reference_activations = peak_bytes(device, reference.decode) if reference else 0
    serving.reset_times()
    serving_seconds, reference_seconds, memory = [], [], []
    total = max(repeats, decodes)
    for number in range(total):
        if number < repeats or number % 20 == 0:
            report_progress(f"decode {number + 1} of {total}")
        if reference and number < repeats:
            reference_seconds.append(measure_seconds(device, reference.decode))
        serving_seconds.append(measure_seconds(device, serving.decode))
        memory.append(bytes_in_use(device))
    return BenchmarkResult(
        machine=_machine(bench.runtime),
        decoder=bench.runtime.info.decoder,
        size=bench.size,
        batch=bench.batch,
        precision=bench.precision,
        serving=Implementation(serving_seconds, bench.serving_weight_bytes, serving_activations),
        stage_seconds=serving.stage_seconds(),
        reference=Implementation(reference_seconds, bench.reference_weight_bytes, reference_activations)
        if reference
        else None,
        bound=_lower_bound(bench),
        memory=MemoryOverDecodes.of(memory),
    )


def _lower_bound(bench: Benchmark) -> LowerBound:
    rates = measure_rates(bench.runtime.device, DTYPES[bench.precision])
    flops = count_flops(bench.config, bench.size, bench.runtime.info.caption_tokens, bench.batch)
    return LowerBound(lower_bound_seconds(rates, flops, bench.serving_weight_bytes), flops, rates)


def _machine(runtime: DeviceRuntime) -> dict[str, str | int]:
    return {
        "device": runtime.info.device,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def report_progress(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)
