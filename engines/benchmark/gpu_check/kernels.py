"""Choice of kernels: all at the main size in FP8, attention in bf16 at every size; error, time and rate of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Measurement, Note, Value
from engines.benchmark.gpu_check.memory import reset_memory
from engines.benchmark.gpu_check.networks import folded_network
from engines.benchmark.gpu_check.rows import milliseconds
from engines.benchmark.roofline import Rates, measure_rates
from engines.pid import FoldedDecoder
from engines.pid.blocks import attentions
from engines.pid.fp8_attention import AttentionRange, quantise_attention
from engines.runtime.kernels.attention import attention_operations
from engines.runtime.kernels.choice import Measured, Operation, choose
from engines.runtime.kernels.operations import decoder_operations
from engines.runtime.kernels.timing import Timer, cuda_seconds
from engines.runtime.kernels.workload import Unavailable, Workload, own_kernels
from engines.size import Size

_TERA = 1e12


def all_kernels(config: RunConfig, timer: Timer = cuda_seconds) -> Iterator[Finding]:
    """Measure every operation of a decoder in FP8, attention included, that has several implementations.

    The ceiling is the time of its operations at the rate of large bf16 products, or that of its bytes at the rate of
    copies, whichever is longer: FP8 can be faster, exponentials in attention are not counted.
    """
    rates = measure_rates(config.device, torch.bfloat16)
    folded = folded_network(config, "fp8")
    for attention in attentions(folded).values():
        quantise_attention(attention, AttentionRange(8.0, 8.0, 8.0))  # norms limit queries and keys to about √d
    yield from _rows(config, decoder_operations(folded, _workload(config, folded, config.main_size)), rates, timer)


def attention_kernels(config: RunConfig, timer: Timer = cuda_seconds) -> Iterator[Finding]:
    """Measure attention in bf16, the main size first."""
    rates = measure_rates(config.device, torch.bfloat16)
    folded = folded_network(config)
    for size in sorted(config.sizes, key=lambda size: size != config.main_size):
        yield from _rows(config, attention_operations(folded, _workload(config, folded, size)), rates, timer)
        reset_memory(config.device)


def _workload(config: RunConfig, folded: FoldedDecoder, size: Size) -> Workload:
    architecture = own_kernels(config.device, folded.dtype) if config.on_cuda else None
    usable = None if isinstance(architecture, Unavailable) else architecture
    return Workload(size, folded.config.caption_tokens, usable, compiled=config.on_cuda)


def _rows(config: RunConfig, operations: Iterable[Operation], rates: Rates, timer: Timer) -> Iterator[Finding]:
    for choice in choose(operations, timer):
        ceiling = max(choice.flops / rates.matmul_flops, choice.nbytes / rates.copy_bytes)
        yield Note(str(choice))
        for name, result in choice.results.items():
            row: dict[str, Value] = {
                "operation": choice.name,
                "shape": choice.shape,
                "implementation": name,
                "ms": None,
            }
            if isinstance(result, Measured):
                row |= {
                    "ms": milliseconds(result.seconds),
                    "TFLOP/s": round(choice.flops / result.seconds / _TERA),
                    "of ceiling": f"{ceiling / result.seconds:.0%}",
                    "error": f"{result.error:.1e}",
                    "chosen": "yes" if name == choice.chosen else "" if result.correct else "wrong",
                }
            yield Measurement(row)
