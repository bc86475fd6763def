"""The slowest kernels of a step, as the profiler of PyTorch records them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch.profiler import ProfilerActivity, profile

from engines.benchmark.decoders import make_runtime, random_sample
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Measurement, Note, Skipped
from engines.benchmark.gpu_check.networks import folded_network
from engines.benchmark.gpu_check.precisions import in_both_precisions
from engines.benchmark.gpu_check.rows import milliseconds
from engines.benchmark.timing import synchronize
from engines.manifest import Precision
from engines.pid.sampler import MAX_STEPS, step_indices

SLOWEST = 20
_NAME_LENGTH = 100  # characters of a kernel's name that are shown


def slowest_kernels(config: RunConfig) -> Iterator[Finding]:
    """Profile one step of one image at the main size, as the server runs it, in FP8 and in bf16."""
    yield from in_both_precisions(config, partial(_profile_step, config))


def _profile_step(config: RunConfig, precision: Precision) -> Iterator[Finding]:
    size, on_cuda = config.main_size, config.on_cuda
    folded = folded_network(config, precision)
    runtime = make_runtime(folded, config.description, (size,), 1, precision, compiled=on_cuda)
    runtime.warm_up()
    slot, index = runtime.start(random_sample(runtime, size)), step_indices(MAX_STEPS)[0]
    runtime.step([slot], [index])
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        runtime.step([slot], [index])
        synchronize(config.device)
    times = [
        (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
    ]
    total = sum(microseconds for microseconds, _, _ in times)
    if not total:
        yield Skipped(f"{precision}: the profiler recorded no kernels on this device")
        return
    yield Note(f"{precision}, one step at {size}: {total / 1000:,.1f} ms in kernels")
    for microseconds, count, name in sorted(times, reverse=True)[:SLOWEST]:
        yield Measurement(
            {
                "precision": precision,
                "share": f"{microseconds / total:.1%}",
                "ms": milliseconds(microseconds / 1e6),
                "calls": count,
                "kernel": name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…",
            }
        )
