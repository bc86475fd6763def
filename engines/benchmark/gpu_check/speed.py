"""How fast, and in how much memory: sizes, batches and precisions, the published way, compiled, on TensorRT."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from engines.benchmark import compare
from engines.benchmark.decoders import ReferenceDecoder, ServingDecoder, make_runtime, quantise, weight_bytes
from engines.benchmark.gpu_check.setting import Row, Setting, folded_network
from engines.benchmark.roofline import best_seconds, measure_rates, resident
from engines.bundle import open_bundle
from engines.compile.load import random_decoder
from engines.errors import ConfigError, DeviceMemoryError
from engines.machine import device_name, driver_version
from engines.manifest import Package, Precision
from engines.pid import FoldedDecoder
from engines.pid.fp8 import FP8
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS
from engines.runtime.attention import KERNELS, choose_kernels, cuda_seconds
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.open import open_runtime
from engines.runtime.trt import find
from engines.size import Size

REPEATS = 2
FP8_ERROR = 0.5  # relative, of a velocity with random weights: more is no rounding
PACKAGES: tuple[Package, ...] = get_args(Package)


def machine(setting: Setting) -> Iterator[Row]:
    device = setting.device
    rates = measure_rates(device, torch.bfloat16)
    facts = {"device": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "driver": driver_version() or "does not tell",
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
        if (properties.major, properties.minor) >= (8, 9):
            facts["FP8 matrix product"] = f"{_fp8_flops(device) / 1e12:.4g} TFLOP/s"
    facts |= {
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "bf16 matrix product": f"{rates.matmul_flops / 1e12:.4g} TFLOP/s",
        "copy in its memory": f"{rates.copy_bytes / 1e9:.4g} GB/s",
    }
    for fact, value in facts.items():
        yield {"fact": fact, "value": value}


def _fp8_flops(device: torch.device) -> float:
    side, one = 8192, torch.ones((), device=device)
    a, b = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    seconds = best_seconds(
        device, lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    )
    return 2 * side**3 / seconds


def attention(setting: Setting) -> Iterator[Row]:
    """Every kernel at every size, both kinds of attention."""
    folded = folded_network(setting)
    for size in setting.sizes:
        for choice in choose_kernels(folded, size, folded.config.caption_tokens, cuda_seconds):
            times = {name: _milliseconds(choice.seconds[name]) for name in KERNELS}
            shape = choice.attention
            yield (
                {"size": str(size), "attention": shape.name, "tokens": shape.tokens, "head width": shape.width}
                | {f"{name} ms": value for name, value in times.items()}
                | {"fastest": choice.chosen or "none offered"}
            )


def decode_bf16(setting: Setting) -> Iterator[Row]:
    yield from _matrix(setting, folded_network(setting), "bf16")


def decode_fp8(setting: Setting) -> Iterator[Row]:
    folded = folded_network(setting)
    before, exact = weight_bytes(folded), _velocity(setting, folded)
    quantise(folded)
    error = ((_velocity(setting, folded) - exact).norm() / exact.norm()).item()
    yield {"note": f"weights: {weight_bytes(folded) / 2**20:,.0f} MiB, in bf16 {before / 2**20:,.0f} MiB"}
    yield {"note": f"velocity with random weights, against bf16: {error:.1e} relative"} | (
        {} if error < FP8_ERROR else {"failed": f"FP8 is off by {error:.1e}, over {FP8_ERROR:g}"}
    )
    yield from _matrix(setting, folded, "fp8")


@torch.inference_mode()
def _velocity(setting: Setting, folded: FoldedDecoder) -> Tensor:
    config, size, device = folded.config, setting.sizes[0], setting.device
    torch.manual_seed(0)
    latent = torch.randn(1, config.latent_channels, *config.latent_size(size), device=device)
    caption = torch.zeros(1, config.caption_tokens, config.caption_width, device=device)
    x = torch.randn(1, 3, *size, device=device)
    return folded.velocity(x, MODEL_TIMESTEPS[0], folded.condition(latent, caption, size), 0.0)


def _matrix(setting: Setting, folded: FoldedDecoder, precision: Precision) -> Iterator[Row]:
    """All sizes and batches, smallest first; what would not be done in time is left out."""
    step, area = 0.0, 1  # seconds of one image's step at the last size measured, and that size
    for size in setting.sizes:
        # Attention grows with the square: four times the pixels take up to sixteen times as long.
        step, area = step * (size[0] * size[1] / area) ** 2, size[0] * size[1]
        alone = None
        for batch in setting.batches:
            # The warm-up runs every batch up to this one; then a few steps of this one.
            expected = step * (batch * (batch + 1) / 2 + (1 + REPEATS) * batch)
            if expected > setting.left:
                yield {"note": f"{size!s} in batches of {batch} left out: it would take about {expected:.0f} s"}
                continue
            row = _measured(folded, setting, size, batch, precision)
            if batch == 1 and "step ms" in row:
                step, alone = row["step ms"] / 1000, row["images/s"]
            if alone and "images/s" in row:
                row["over batch 1"] = f"{row['images/s'] / alone:.3f}"
            yield row


def _measured(folded: FoldedDecoder, setting: Setting, size: Size, batch: int, precision: Precision) -> Row:
    runtime = make_runtime(folded, setting.description, (size,), batch, precision)
    try:
        return {"size": str(size), "batch": batch, **_timed(runtime, batch)}
    except DeviceMemoryError:
        return {"size": str(size), "batch": batch, "note": f"{size!s} in batches of {batch}: out of memory"}
    finally:
        del runtime
        _empty(setting)


def _timed(runtime: DeviceRuntime, batch: int) -> Row:
    device = runtime.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    buffers = resident(device, runtime.warm_up)
    memory: Row = {"warm-up s": round(time.monotonic() - began, 1), "buffers MiB": round(buffers / 2**20)}
    row = _stages(runtime, runtime.info.sizes[0], batch)
    if device.type == "cuda":
        memory["peak MiB"] = round(torch.cuda.max_memory_reserved(device) / 2**20)
    return row | memory


def _stages(runtime: DeviceRuntime, size: Size, batch: int) -> Row:
    """Measured with one step of four; a whole decode is their sum."""
    way = ServingDecoder(runtime, batch, size)
    way.decode(steps=1)
    for times in way.stages.values():
        times.clear()
    for _ in range(REPEATS):
        way.decode(steps=1)
    seconds = way.stage_seconds()
    decode = batch * (seconds["condition"] + seconds["finish"]) + MAX_STEPS * seconds["step"]
    stages = {f"{stage} ms": _milliseconds(value) for stage, value in seconds.items()}
    return {**stages, "decode ms": _milliseconds(decode), "images/s": float(f"{batch / decode:.4g}")}


def published_way(setting: Setting) -> Iterator[Row]:
    """Both ways without torch.compile, in turn, and the floor."""
    options = compare.Options(setting.description, setting.main_size, setting.device, precision="bf16", compiled=False)
    result = compare.measure(compare.prepare(options), REPEATS, 0)
    ours, theirs, ratios = result["runtime"], result["published"], result["ratios"]
    floor = result["floor"]
    yield _way("runtime, CUDA graphs" if setting.device.type == "cuda" else "runtime", ours)
    yield _way("published way", theirs)
    yield {"way": "floor of this device", "decode ms": _milliseconds(floor["seconds"])}
    for name, ratio in ratios.items():
        yield {"note": f"{name}: {ratio:.3f}"}


def compiled(setting: Setting) -> Iterator[Row]:
    """The runtime with torch.compile; what compiling takes is in its warm-up."""
    precisions: tuple[Precision, ...] = ("bf16", "fp8")
    for precision in precisions:
        folded = folded_network(setting)
        if precision == "fp8":
            quantise(folded)
        runtime = make_runtime(folded, setting.description, (setting.main_size,), 1, precision, compiled=True)
        yield {"precision": precision, "size": str(setting.main_size), "batch": 1, **_timed(runtime, 1)}
        del runtime, folded
        _empty(setting)


def published_compiled(setting: Setting) -> Iterator[Row]:
    """The published way as its authors time it."""
    config, size, device = setting.description.config, setting.main_size, setting.device
    latent = torch.randn(1, config.latent_channels, *config.latent_size(size), device=device)
    caption = torch.zeros(1, config.caption_tokens, config.caption_width, device=device)
    way = ReferenceDecoder(random_decoder(config, 0, device), latent, caption, size, compiled=True)
    way.autocast = True
    began = time.monotonic()
    way.decode()
    first = time.monotonic() - began
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        way.decode()
        times.append(time.perf_counter() - began)
    yield {"size": str(size), "decode ms": _milliseconds(min(times)), "first decode s": round(first, 1)}


def tensorrt(setting: Setting) -> Iterator[Row]:
    found = [package for package in PACKAGES if _installed(package)]
    if not found:
        yield {"skipped": f"neither {' nor '.join(PACKAGES)} is installed"}
        return
    if setting.bundle is None:
        yield {"skipped": f"{' and '.join(found)} installed, but no bundle of engines was given (--bundle)"}
        return
    bundle = open_bundle(setting.bundle)
    manifest = bundle.manifest
    yield {"note": f"{manifest.decoder}, {manifest.precision}, {manifest.runtime.package} {manifest.runtime.version}"}
    runtime = open_runtime(bundle, setting.device, slots=manifest.max_batch)
    began = time.monotonic()
    runtime.warm_up()
    yield {"note": f"warm-up of all sizes and batches: {time.monotonic() - began:.1f} s"}
    for size in manifest.sizes:
        for batch in range(1, manifest.max_batch + 1):
            yield {"size": str(size), "batch": batch, **_stages(runtime, size, batch)}
    yield {"note": f"peak memory: {(runtime.peak_memory() or 0) / 2**20:,.0f} MiB"}


def _installed(package: Package) -> bool:
    try:
        find(package)
    except ConfigError:
        return False
    return True


def _way(name: str, result: dict[str, Any]) -> Row:
    return {
        "way": name,
        "decode ms": _milliseconds(result["decode_seconds"]),
        "weights MiB": round(result["weight_bytes"] / 2**20),
        "activations MiB": round(result["activation_bytes"] / 2**20),
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{1000 * seconds:.4g}")


def _empty(setting: Setting) -> None:
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
