"""Time per kernel: attention by implementation, and FP8 products by accumulation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engines.benchmark.gpu_check.config import RunConfig
from engines.benchmark.gpu_check.findings import Finding, Measurement, Note, Skipped, Value
from engines.benchmark.gpu_check.memory import reset_memory
from engines.benchmark.gpu_check.networks import folded_network
from engines.benchmark.gpu_check.rows import milliseconds
from engines.pid.fp8 import has_fp8_products
from engines.runtime.kernels.accumulation import Product, choose_accumulation
from engines.runtime.kernels.attention import choose_kernels
from engines.runtime.kernels.timing import Timer, cuda_seconds

_TERA = 1e12


def attention_kernels(config: RunConfig, timer: Timer = cuda_seconds) -> Iterator[Finding]:
    """Time each attention kernel, for joint and pixel attention: the main size first, then the others."""
    folded = folded_network(config)
    for size in sorted(config.sizes, key=lambda size: size != config.main_size):
        for choice in choose_kernels(folded, size, folded.config.caption_tokens, timer):
            shape = choice.attention
            row: dict[str, Value] = {
                "size": str(size),
                "attention": shape.name,
                "tokens": shape.tokens,
                "heads": shape.heads,
                "head width": shape.width,
            }
            flops = 4 * shape.tokens**2 * shape.heads * shape.width
            for name, result in choice.results.items():
                row[f"{name} ms"] = None  # not supported
                if result is not None:
                    row |= _speed(name, flops, result.seconds) | {f"{name} error": f"{result.error:.1e}"}
            yield Measurement(row | {"chosen": choice.chosen or "none available"})
            if size == config.main_size:
                yield Note(str(choice))
        reset_memory(config.device)


def fp8_products(config: RunConfig, timer: Timer = cuda_seconds) -> Iterator[Finding]:
    """Time the products of the FP8 layers at the main size, with fast accumulation and without, and in bf16."""
    if not has_fp8_products(config.device):
        yield Skipped("FP8 products need compute capability 8.9")
        return
    folded = folded_network(config, "fp8")
    for choice in choose_accumulation(folded, config.main_size, folded.config.caption_tokens, timer):
        product = choice.product
        shape = {"rows": product.rows, "in": product.inputs, "out": product.outputs}
        columns: dict[str, Value] = {**shape, "layers": len(product.layers)}
        flops = 2 * product.rows * product.inputs * product.outputs
        for name, measurement in (("slow", choice.slow), ("fast", choice.fast)):
            if measurement is not None:
                columns |= _speed(name, flops, measurement.seconds) | {f"{name} error": f"{measurement.error:.1e}"}
        columns |= _speed("bf16", flops, _bf16_seconds(product, config.device, timer))
        yield Measurement(columns | {"chosen": "fast" if choice.is_fast else "slow"})


def _bf16_seconds(product: Product, device: torch.device, timer: Timer) -> float:
    x = torch.randn(product.rows, product.inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(product.outputs, product.inputs, device=device, dtype=torch.bfloat16)
    x @ weight.t()  # the first call chooses an algorithm
    return timer(lambda: x @ weight.t())


def _speed(name: str, flops: int, seconds: float) -> dict[str, Value]:
    return {f"{name} ms": milliseconds(seconds), f"{name} TFLOP/s": round(flops / seconds / _TERA)}
