"""The parts of the check by call, in the order in which they run, with the time that each may need.

A part is imported when it runs, so that the others work if a package that it needs is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

from engines.benchmark.gpu_check.config import Part, RunConfig
from engines.benchmark.gpu_check.findings import Finding

_MANIFEST = ("pydantic",)  # bundles and precisions are declared with it
_TESTS = (*_MANIFEST, "pytest", "hypothesis", "filelock")
_SERVER = (*_MANIFEST, "fastapi", "uvicorn", "httptools", "numba", "PIL", "prometheus_client", "pynvml", "psutil")


def run_lazily(function: str) -> Callable[[RunConfig], Iterator[Finding]]:
    """Return a function that imports `function`, "module.name" in this package, when it is called, and runs it."""

    def run(config: RunConfig) -> Iterator[Finding]:
        module, name = function.split(".")
        implementation = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        yield from implementation(config)

    return run


def _part(
    name: str,
    title: str,
    seconds: float,
    function: str,
    requires: tuple[str, ...] = _MANIFEST,
    only_on_cuda: bool = False,
) -> Part:
    return Part(name, title, seconds, run_lazily(function), requires, only_on_cuda)


# Correctness, then the numbers that matter most. The budgets follow the times on an H200 with 16 cores that had just
# been started, where the first warm-up of a network for 2048×2048 lasted about a minute. The reference compiles for as
# long. The profile, which compiles nothing new, comes last.
FIRST = (
    _part("machine", "Device", 10, "machine.device_properties", requires=()),
    _part("contract", "Runtime contract, on a toy network", 20, "checks.check_contract"),
    _part("parity", "Relative errors against the reference vectors", 15, "parity.compare_vectors", requires=()),
    _part("fp8", "Decoding in FP8", 110, "speed.decode_fp8"),
    _part("bf16", "Decoding in bf16", 90, "speed.decode_bf16"),
    _part("published-compiled", "Reference with torch.compile", 125, "reference.decode_reference", only_on_cuda=True),
    _part("profile", "Slowest kernels of a step", 50, "profile.slowest_kernels"),
)
# What needs little time, then the most important of the rest.
SECOND = (
    _part("kernels", "Kernels, FP8", 85, "kernels.all_kernels", only_on_cuda=True),
    _part("attention", "Attention, bf16", 40, "kernels.attention_kernels", only_on_cuda=True),
    _part("large", "Decoding at the largest size", 110, "speed.decode_large"),
    _part("tests", "Tests marked gpu", 90, "marked_tests.run_marked_tests", _TESTS, only_on_cuda=True),
    _part("batches", "Decoding in large batches", 110, "speed.decode_batches"),
    _part("small", "Decoding at the smallest size", 35, "speed.decode_small"),
    _part("eager", "Serving runtime and reference, without torch.compile", 20, "reference.compare_eager"),
    _part("tensorrt", "TensorRT", 10, "bundles.decode_with_engines"),
)
THIRD = (_part("server", "Server", 150, "serving.measure_server", _SERVER),)

CALLS = {"first": FIRST, "second": SECOND, "third": THIRD}
PARTS = (*FIRST, *SECOND, *THIRD)
