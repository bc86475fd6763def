"""Where a step's time goes: the slowest kernels and what part of all they take."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from engines.benchmark.decoders import quantise
from engines.benchmark.gpu_check.setting import Row, Setting, folded_network
from engines.benchmark.roofline import synchronize
from engines.pid import FoldedDecoder
from engines.pid.graphs import ConditionGraph, StepGraph
from engines.runtime.attention import choose_kernels, cuda_seconds

SLOWEST = 20
_NAME = 100  # characters of a kernel's name that are shown


def kernels(setting: Setting) -> Iterator[Row]:
    """One step at the main size, run without a CUDA graph, in bf16 and in FP8."""
    folded = folded_network(setting)
    if setting.device.type == "cuda":
        choose_kernels(folded, setting.main_size, folded.config.caption_tokens, cuda_seconds)
    yield from _step(setting, folded, "bf16")
    quantise(folded)
    yield from _step(setting, folded, "fp8")


@torch.inference_mode()
def _step(setting: Setting, folded: FoldedDecoder, precision: str) -> Iterator[Row]:
    config, size, device = folded.config, setting.main_size, setting.device
    on_cuda = device.type == "cuda"
    latent = torch.randn(1, config.latent_channels, *config.latent_size(size), device=device)
    caption = torch.zeros(1, config.caption_tokens, config.caption_width, device=device)
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
    yield {"note": f"{precision}, one step at {size!s}: {total / 1000:,.1f} ms in kernels"}
    for microseconds, count, name in sorted(times, reverse=True)[:SLOWEST]:
        yield {
            "precision": precision,
            "share": f"{microseconds / total:.1%}",
            "ms": float(f"{microseconds / 1000:.4g}"),
            "calls": count,
            "kernel": name if len(name) <= _NAME else f"{name[:_NAME]}…",
        }
