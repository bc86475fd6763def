"""Measure a decode against the same network run the published way, and against the floor that the device sets.

python -m engines.benchmark --decoder flux-2k --random-weights --size 2048 --json result.json

The published way: float32 weights (under bf16 autocast unless the precision is fp32), modulations computed live, the
adapter at every step, the pixel blocks whole. Both run in one process, in turn, on equal weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engines.bundle import DTYPES
from engines.compile.load import random_decoder
from engines.compile.plan import describe
from engines.compile.verify import cast
from engines.errors import ConfigError, PidError
from engines.machine import device_name
from engines.manifest import Precision
from engines.memory import PeakActivations
from engines.pid import FoldedDecoder, PidConfig, PidDecoder, fold, load_checkpoint, sample
from engines.pid.config import Size
from engines.pid.sampler import CALL_TIMES, MAX_STEPS, step_indices
from engines.runtime.device_runtime import DeviceRuntime
from engines.runtime.protocol import RuntimeInfo, Sample
from engines.runtime.torch_runtime import TorchStages

UNLIMITED = 2**62


@dataclass(frozen=True)
class Rates:
    """What the device does at best, measured: large square matrix products, and copies in its own memory."""

    matmul_flops: float  # per second, in the benchmark's precision
    copy_bytes: float  # per second, read plus written


class PublishedWay:
    """The network as published code runs it: everything live, at every step."""

    def __init__(self, decoder: PidDecoder, latent: Tensor, caption: Tensor, size: Size, compiled: bool) -> None:
        self._decoder, self._latent, self._caption, self._size = decoder, latent, caption, size
        self.device = latent.device
        self.autocast = False
        decoder.pixel_memory_budget = UNLIMITED
        self._call = torch.compile(self._velocity) if compiled else self._velocity

    def _velocity(self, x: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
        conditioning = self._decoder.condition(self._latent, self._caption, self._size)
        return self._decoder.velocity(x, t, conditioning, sigma)

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: object, sigma: Tensor | float) -> Tensor:
        batch = x.shape[0]
        times, sigmas = (torch.full((batch,), float(value), device=x.device) for value in (t, sigma))
        return self._call(x, times, sigmas)

    @torch.no_grad()
    def decode(self) -> None:
        shape = (self._latent.shape[0], 3, *self._size)
        start, *step_noise = (torch.randn(shape, device=self.device) for _ in range(MAX_STEPS))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            conditioning = self._decoder.condition(self._latent, self._caption, self._size)
            sample(self, conditioning, start, 0.0, step_noise)
        synchronize(self.device)


class RuntimeWay:
    """The same network folded, in the runtime that serves."""

    def __init__(self, runtime: DeviceRuntime, batch: int) -> None:
        self._runtime, self._batch = runtime, batch
        size = runtime.info.sizes[0]
        self._sample = Sample(torch.randn(runtime.info.latent_channels, *runtime.info.latent_size(size)), size)
        self.stages: dict[str, list[float]] = {"condition": [], "step": [], "finish": []}

    def decode(self) -> None:
        runtime = self._runtime
        slots = [self._timed("condition", runtime.start, self._sample) for _ in range(self._batch)]
        for index in step_indices(MAX_STEPS):
            self._timed("step", runtime.step, slots, [index] * self._batch)
        for slot in slots:
            self._timed("finish", self._finish, slot)

    def _finish(self, slot: int) -> None:
        rows = self._runtime.finish(slot)
        rows.wait(rows.pixels.shape[0])
        rows.close()
        self._runtime.release(slot)

    def _timed(self, stage: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        synchronize(self._runtime.device)
        self.stages[stage].append(time.perf_counter() - began)
        return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    side, count = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    matmul = _best(device, lambda: a @ b)
    copy = _best(device, lambda: target.copy_(source))
    return Rates(2 * side**3 / matmul, 2 * count / copy)


def _best(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def count_flops(config: PidConfig, size: Size, caption_tokens: int, batch: int) -> tuple[int, int]:
    """Floating-point operations of one condition and of one step, counted on the meta device."""
    with torch.device("meta"), torch.no_grad():
        decoder = FoldedDecoder(config, CALL_TIMES)
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


@dataclass(frozen=True)
class Bench:
    """Both ways of running one network, ready to be timed."""

    config: PidConfig
    size: Size
    batch: int
    precision: Precision
    runtime: DeviceRuntime
    ours: RuntimeWay
    published: PublishedWay | None
    buffer_bytes: int  # what the runtime allocates once, at warm-up
    weights: tuple[int, int]  # bytes of ours and of the published way's, in one precision


def prepare(arguments: argparse.Namespace) -> Bench:
    device, size, batch = torch.device(arguments.device), arguments.size, arguments.batch
    precision: Precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    description = describe(arguments.decoder)
    config = description.config
    say(f"{description.name} at {size[0]}x{size[1]}, {precision}, on {device_name(device)}")
    if not (arguments.checkpoint or arguments.random_weights):
        raise ConfigError("Say --checkpoint FILE, or --random-weights.")
    live = load_checkpoint(arguments.checkpoint, config, torch.float32) if arguments.checkpoint else None
    live = (live or random_decoder(config, seed=0)).to(device)
    folded = fold(live, CALL_TIMES)
    cast(folded, DTYPES[precision])
    weights = _weight_bytes(folded), sum(p.numel() for p in live.parameters()) * DTYPES[precision].itemsize
    caption = torch.zeros(config.caption_tokens, config.caption_width)
    info = RuntimeInfo(
        decoder=description.name,
        latent_space=description.latent_space.name,
        latent_channels=config.latent_channels,
        pixels_per_cell=config.pixels_per_cell,
        upscale=config.upscale,
        sigma_frame=description.latent_space.sigma_frame,
        caption_tokens=len(caption),
        caption_width=config.caption_width,
        sizes=(size,),
        max_batch=batch,
        slots=batch,
        precision=precision,
        kind="torch",
        device=device_name(device),
    )
    compiled = device.type == "cuda" if arguments.compile is None else arguments.compile
    published = None
    if not arguments.skip_published:
        latent = torch.randn(batch, config.latent_channels, *config.latent_size(size), device=device)
        published = PublishedWay(live, latent, caption.to(device).expand(batch, -1, -1), size, compiled)
        published.autocast = precision != "fp32"
    del live
    runtime = DeviceRuntime(TorchStages(folded, compiled), caption, info)
    buffers = _resident(device, runtime.warm_up)
    return Bench(config, size, batch, precision, runtime, RuntimeWay(runtime, batch), published, buffers, weights)


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
            "stage_seconds": {stage: statistics.median(times) for stage, times in ours.stages.items()},
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


def _weight_bytes(folded: FoldedDecoder) -> int:
    return sum(tensor.nbytes for tensor in folded.state_dict().values())


def _resident(device: torch.device, work: Callable[[], None]) -> int:
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
    """Bytes held now: of the device's allocator on CUDA, of the process elsewhere."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engines.benchmark", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--decoder", required=True, help="a released decoder's name, or dct-demo")
    add("--checkpoint", type=Path, help="weights to measure with")
    add("--random-weights", action="store_true", help="full-size noise instead: as fast, and needs no checkpoint")
    add("--size", type=_size, default=(2048, 2048), help="output side, or HEIGHTxWIDTH (default 2048)")
    add("--batch", type=int, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=get_args(Precision), help="default bf16 on CUDA, fp32 on the CPU")
    add("--repeats", type=int, default=5, help="decodes timed each way (default 5)")
    add("--decodes", type=int, default=0, help="go on to this many of ours, to see that memory does not grow")
    add("--skip-published", action="store_true", help="measure the runtime alone")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for both ways (default on CUDA)")
    add("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    try:
        result = measure(prepare(arguments), arguments.repeats, arguments.decodes)
    except PidError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _size(text: str) -> Size:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


if __name__ == "__main__":
    sys.exit(main())
