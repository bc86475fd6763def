"""A decode against the same network run the published way, and against the floor that the device sets."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engines.benchmark.decoders import ReferenceDecoder, ServingDecoder, make_runtime, quantise, weight_bytes
from engines.benchmark.roofline import (
    count_flops,
    floor_seconds,
    measure_rates,
    memory_in_use,
    peak_activations,
    resident,
)
from engines.bundle import DTYPES
from engines.compile.load import random_decoder
from engines.compile.verify_fold import cast
from engines.machine import device_name
from engines.manifest import Precision
from engines.pid import PidConfig, fold, load_checkpoint
from engines.pid.released import DecoderDescription
from engines.pid.sampler import MAX_STEPS, MODEL_TIMESTEPS
from engines.runtime.device_runtime import DeviceRuntime
from engines.size import Size


@dataclass(frozen=True)
class Options:
    """What is measured; None takes the device's default."""

    description: DecoderDescription
    size: Size
    device: torch.device
    batch: int = 1
    precision: Precision | None = None
    checkpoint: Path | None = None  # None: random weights
    compiled: bool | None = None
    skip_published: bool = False


@dataclass(frozen=True)
class Bench:
    """Both ways of running one network, ready to be timed."""

    config: PidConfig
    size: Size
    batch: int
    precision: Precision
    runtime: DeviceRuntime
    ours: ServingDecoder
    published: ReferenceDecoder | None
    buffer_bytes: int  # what the runtime allocates once, at warm-up
    weights: tuple[int, int]  # bytes of ours and of the published way's, in one precision


def prepare(options: Options) -> Bench:
    device, size, batch = options.device, options.size, options.batch
    precision: Precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    description = options.description
    config = description.config
    say(f"{description.name} at {size}, {precision}, on {device_name(device)}")
    if options.checkpoint:
        live = load_checkpoint(options.checkpoint, config, torch.float32).to(device)
    else:
        live = random_decoder(config, seed=0, device=device)
    folded = fold(live, MODEL_TIMESTEPS)
    cast(folded, DTYPES[precision])
    if precision == "fp8":
        quantise(folded)
    weights = weight_bytes(folded), sum(p.numel() for p in live.parameters()) * DTYPES[precision].itemsize
    compiled = device.type == "cuda" if options.compiled is None else options.compiled
    published = None
    if not options.skip_published:
        latent = torch.randn(batch, config.latent_channels, *config.latent_size(size), device=device)
        caption = torch.zeros(batch, config.caption_tokens, config.caption_width, device=device)
        published = ReferenceDecoder(live, latent, caption, size, compiled)
        published.autocast = precision != "fp32"
    del live
    runtime = make_runtime(folded, description, (size,), batch, precision, compiled)
    buffers = resident(device, runtime.warm_up)
    return Bench(config, size, batch, precision, runtime, ServingDecoder(runtime, batch), published, buffers, weights)


def measure(bench: Bench, repeats: int, decodes: int) -> dict[str, Any]:
    """Time both ways in turn, then ours alone up to `decodes`, watching the memory."""
    device = bench.runtime.device
    ours, published = bench.ours, bench.published
    activations = bench.buffer_bytes + peak_activations(device, ours.decode)  # and a warm-up of both
    published_activations = None if published is None else peak_activations(device, published.decode)
    for times in ours.stages.values():
        times.clear()
    our_seconds, published_seconds, resident = [], [], []
    for number in range(max(repeats, decodes)):
        if number < repeats or number % 20 == 0:
            say(f"decode {number + 1} of {max(repeats, decodes)}")
        if published is not None and number < repeats:
            published_seconds.append(_seconds(published.decode))
        our_seconds.append(_seconds(ours.decode))
        resident.append(memory_in_use(device))
    rates = measure_rates(device, DTYPES[bench.precision])
    flops = count_flops(bench.config, bench.size, bench.runtime.info.caption_tokens, bench.batch)
    floor = floor_seconds(rates, flops, bench.weights[0])
    median = statistics.median(our_seconds)
    result: dict[str, Any] = {
        "machine": {"device": bench.runtime.info.device, "processor": platform.processor() or platform.machine(),
                    "threads": torch.get_num_threads(), "torch": torch.__version__},
        "decoder": bench.runtime.info.decoder, "size": bench.size, "batch": bench.batch, "precision": bench.precision,
        "runtime": {
            "decode_seconds": median,
            "images_per_second": bench.batch / median,
            "stage_seconds": ours.stage_seconds(),
            "weight_bytes": bench.weights[0],
            "activation_bytes": activations,
        },
        "floor": {"seconds": floor, "condition_flops": flops[0], "step_flops": flops[1], **asdict(rates)},
        "memory_over_decodes": {"decodes": len(resident), "first": resident[0], "last": resident[-1],
                                "largest": max(resident)},
        "ratios": {"decode over floor": median / floor},
    }  # fmt: skip
    if published is not None:
        reference = statistics.median(published_seconds)
        result["published"] = {
            "decode_seconds": reference,
            "weight_bytes": bench.weights[1],
            "activation_bytes": published_activations,
        }
        result["ratios"] |= {
            "time over published": statistics.median(
                a / b for a, b in zip(our_seconds, published_seconds, strict=False)
            ),
            "weight bytes over published": bench.weights[0] / bench.weights[1],
            "activation bytes over published": activations / (published_activations or 1),
        }
    return result


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    ours, floor = result["runtime"], result["floor"]
    rows = [("", "runtime", "published way")]
    published = result.get("published", {})

    def row(name: str, text: Callable[[float], str], *keys: str) -> None:
        values = []
        for way in (ours, published):
            value: Any = way
            for key in keys:
                value = value.get(key) if value else None
            values.append("" if value is None else text(value))
        rows.append((name, values[0], values[1]))

    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:,.1f} ms"

    def mebibytes(count: float) -> str:
        return f"{count / 2**20:,.0f} MiB"

    row("decode", milliseconds, "decode_seconds")
    for stage in ours["stage_seconds"]:
        row(f"  {stage}", milliseconds, "stage_seconds", stage)
    row("images a second", "{:.3f}".format, "images_per_second")
    row("weights", mebibytes, "weight_bytes")
    row("peak activations", mebibytes, "activation_bytes")
    lines = [f"{name:<18}{mine:>16}{theirs:>16}" for name, mine, theirs in rows]
    memory = result["memory_over_decodes"]
    lines += [
        f"floor             {milliseconds(floor['seconds']):>16}  ({floor['condition_flops'] / 1e12:.3g} + "
        f"{MAX_STEPS}×{floor['step_flops'] / 1e12:.3g} TFLOP at {floor['matmul_flops'] / 1e12:.3g} TFLOP/s)",
        f"memory in use after 1 decode {mebibytes(memory['first'])}, after {memory['decodes']} "
        f"{mebibytes(memory['last'])}, at most {mebibytes(memory['largest'])}",
        *(f"{name:<34}{ratio:6.3f}" for name, ratio in result["ratios"].items()),
    ]
    return "\n".join(lines)
