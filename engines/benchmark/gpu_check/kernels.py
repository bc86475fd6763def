"""Time per kernel: the candidates for attention, and the slowest kernels of a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from engines.benchmark.decoders import calibrate_and_quantise, random_inputs
from engines.benchmark.gpu_check.config import RunConfig, folded_network
from engines.benchmark.gpu_check.findings import Finding, Measurement, Note, Value
from engines.benchmark.timing import synchronize
from engines.pid import FoldedDecoder
from engines.pid.graphs import ConditionGraph, StepGraph
from engines.runtime.kernels.attention import KERNELS, choose_kernels
from engines.runtime.kernels.timing import Timer, cuda_seconds

SLOWEST = 20
_NAME_LENGTH = 100  # characters of a kernel's name that are shown


def attention_kernels(config: RunConfig, timer: Timer = cuda_seconds) -> Iterator[Finding]:
    """Time each attention kernel at every size, for joint and pixel attention."""
    folded = folded_network(config)
    for size in config.sizes:
        for choice in choose_kernels(folded, size, folded.config.caption_tokens, timer):
            shape = choice.attention
            row: dict[str, Value] = {
                "size": str(size),
                "attention": shape.name,
                "tokens": shape.tokens,
                "head width": shape.width,
            }
            for name in KERNELS:
                result = choice.results[name]
                row[f"{name} ms"] = None if result is None else float(f"{1000 * result.seconds:.4g}")
                row[f"{name} error"] = None if result is None else float(f"{result.error:.2g}")
            yield Measurement(row | {"fastest": choice.chosen or "none available"})


def slowest_kernels(config: RunConfig) -> Iterator[Finding]:
    """Profile one step at the main size without a CUDA graph, in bf16 and in FP8."""
    folded = folded_network(config)
    if config.device.type == "cuda":
        choose_kernels(folded, config.main_size, folded.config.caption_tokens, cuda_seconds)
    yield from _profile_step(config, folded, "bf16")
    calibrate_and_quantise(folded)
    yield from _profile_step(config, folded, "fp8")


@torch.inference_mode()
def _profile_step(config: RunConfig, folded: FoldedDecoder, precision: str) -> Iterator[Finding]:
    size, device = config.main_size, config.device
    on_cuda = device.type == "cuda"
    latent, caption = random_inputs(folded.config, size, device)
    caption_tokens, *tokens = ConditionGraph(folded, size)(latent, caption)
    x, noise = torch.randn(2, 1, 3, *size, device=device)
    sigma, index = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.long, device=device)
    step = StepGraph(folded, size)
    step(x, sigma, index, noise, caption_tokens, tokens)
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        step(x, sigma, index, noise, caption_tokens, tokens)
        synchronize(device)
    times = [
        (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
    ]
    total = sum(microseconds for microseconds, _, _ in times)
    yield Note(f"{precision}, one step at {size}: {total / 1000:,.1f} ms in kernels")
    for microseconds, count, name in sorted(times, reverse=True)[:SLOWEST]:
        yield Measurement(
            {
                "precision": precision,
                "share": f"{microseconds / total:.1%}",
                "ms": float(f"{microseconds / 1000:.4g}"),
                "calls": count,
                "kernel": name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…",
            }
        )
