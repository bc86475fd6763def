"""The published implementation: compiled, as its authors run it, and without torch.compile next to the runtime."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engines.benchmark import compare
from engines.benchmark.decoders import ReferenceDecoder, random_inputs
from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Measurement, Note, Value
from engines.benchmark.gpu_check.memory import mebibytes, reset_memory
from engines.benchmark.gpu_check.rows import milliseconds
from engines.benchmark.results import Implementation
from engines.benchmark.timing import measure_seconds
from engines.compile.inputs.random_weights import random_decoder

REPEATS = 3


def decode_reference(config: RunConfig) -> Iterator[Finding]:
    """Time the reference with torch.compile. Its compilation needs most of the time of this part."""
    network, size, device = config.description.config, config.main_size, config.device
    reset_memory(device)
    inputs = random_inputs(network, size, device)
    decoder = ReferenceDecoder(random_decoder(network, 0, device), inputs, size, compiled=True, autocast=True)
    first = measure_seconds(device, decoder.decode)
    best = min(measure_seconds(device, decoder.decode) for _ in range(REPEATS))
    row: dict[str, Value] = {"size": str(size), "decode ms": milliseconds(best), "first decode s": round(first, 1)}
    if config.on_cuda:
        row["PyTorch peak MiB"] = mebibytes(torch.cuda.max_memory_reserved(device))
    yield Measurement(row)


def compare_eager(config: RunConfig) -> Iterator[Finding]:
    """Time the runtime and the reference in turn, without torch.compile, and compute the lower bound."""
    reset_memory(config.device)
    options = compare.Options(config.description, config.main_size, config.device, precision="bf16", compiled=False)
    result = compare.measure(compare.prepare(options), REPEATS, 0)
    yield _implementation("runtime, CUDA graphs" if config.on_cuda else "runtime", result.serving)
    if result.reference is not None:
        yield _implementation("reference", result.reference)
    yield Measurement({"implementation": "lower bound", "decode ms": milliseconds(result.bound.seconds)})
    for name, ratio in result.ratios.items():
        yield Note(f"{name}: {ratio:.3f}")


def _implementation(name: str, result: Implementation) -> Measurement:
    return Measurement(
        {
            "implementation": name,
            "decode ms": milliseconds(result.decode_seconds),
            "weights MiB": mebibytes(result.weight_bytes),
            "activations MiB": mebibytes(result.activation_bytes),
        }
    )
