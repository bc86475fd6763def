"""Choice of the attention kernels on a device: attention is more than half of the work.

An implementation makes the heads, in the layout that its kernel reads, and attends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from engines.accuracy import relative_error
from engines.pid.blocks import AttentionKernel, SelfAttention, attentions
from engines.pid.fold import FoldedDecoder
from engines.pid.positions import Rotary
from engines.runtime.kernels.attention_group import AttentionGroup, checked_rows, expected_rows
from engines.runtime.kernels.choice import Operation
from engines.runtime.kernels.workload import Workload

_FEW = 208  # image tokens of the second check: a few tiles, the last of which is incomplete


# Operators rather than `sdpa_kernel`, which changes flags of the whole process, and so of other devices' threads. None
# of them stores the scores of all pairs of tokens, which are hundreds of MB per head at 2048².


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by cuDNN; q, k, v [B, heads, N, d]."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by FlashAttention; q, k, v [B, heads, N, d]."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the memory-efficient kernels of PyTorch; q, k, v [B, heads, N, d]."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]


@dataclass(frozen=True)
class Kernel:
    """Attention of PyTorch, and PyTorch's test whether it supports a device, dtype and shape."""

    attend: AttentionKernel
    supports: Callable[[SDPAParams], bool]


def _on_cuda(supports: Callable[[SDPAParams], bool], parameters: SDPAParams) -> bool:
    return parameters.query.is_cuda and supports(parameters)  # without a GPU, a build of PyTorch for CUDA would fail


KERNELS: Mapping[str, Kernel] = {
    "cuDNN": Kernel(cudnn, partial(_on_cuda, can_use_cudnn_attention)),
    "flash": Kernel(flash, partial(_on_cuda, can_use_flash_attention)),
    "memory-efficient": Kernel(memory_efficient, partial(_on_cuda, can_use_efficient_attention)),
}


def attention_operations(
    decoder: FoldedDecoder, workload: Workload, kernels: Mapping[str, Kernel] = KERNELS
) -> Iterator[Operation]:
    """Yield the attention of the patch blocks and that of the pixel blocks, for one image with random tokens."""
    for group in attention_groups(decoder, workload):
        yield _operation(group, workload, kernels)


def attention_groups(decoder: FoldedDecoder, workload: Workload) -> Iterator[AttentionGroup]:
    """Yield the attentions by kind, and those in FP8 by themselves, with random inputs for an image."""
    by_kind = defaultdict(list)
    for module in attentions(decoder).values():
        by_kind[type(module), module.fp8 is not None].append(module)
    config, device = decoder.config, decoder.y_pos_embedding.device
    geometry, caption = decoder.geometry(workload.size, device), workload.caption_tokens

    def random(tokens: int, width: int) -> Tensor:
        return torch.randn(1, tokens, width, dtype=decoder.dtype, device=device)

    def first(tokens: int, rotary: Rotary) -> Rotary:
        return rotary[0][:tokens], rotary[1][:tokens]

    def pixel_inputs(tokens: int) -> tuple[Any, ...]:
        return random(tokens, config.pixel_attention_size), first(tokens, geometry.pixel_tokens)

    def joint_inputs(tokens: int) -> tuple[Any, ...]:
        streams = random(tokens, config.hidden_size), random(caption, config.hidden_size)
        return *streams, first(tokens, geometry.image), decoder.caption_rotary(caption, device)

    tokens = workload.tokens
    few = min(tokens, _FEW + tokens % 16)  # Triton compiles another variant for multiples of 16
    for (kind, fp8), modules in by_kind.items():
        name, inputs = ("pixel", pixel_inputs) if kind is SelfAttention else ("joint", joint_inputs)
        name += " attention in FP8" if fp8 else " attention"
        yield AttentionGroup(name, tuple(modules), inputs(tokens), inputs(few))


def _unsupported(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("PyTorch does not support this attention on this device.")


def _operation(group: AttentionGroup, workload: Workload, kernels: Mapping[str, Kernel]) -> Operation:
    q, k, v = (t.transpose(1, 2) for t in group.plain(group.sample, *group.inputs))  # each [1, heads, N, d]
    (_, heads, queries, width), keys = q.shape, k.shape[2]
    rows = checked_rows(queries, q.device)
    expected = expected_rows(q, k, v, rows)  # [1, rows, heads · d]
    compiled, parameters = workload.optimise(group.plain), SDPAParams(q, k, v, None, 0.0, False, False)
    supported = {name: kernel.attend for name, kernel in kernels.items() if kernel.supports(parameters)}
    candidates = {name: group.candidate(compiled, supported.get(name, _unsupported)) for name in kernels}
    if workload.architecture is not None:
        from engines.runtime.kernels.triton_attention import triton_candidates

        candidates |= triton_candidates(group, workload, workload.architecture, supported)
    return Operation(
        name=group.name,
        shape=f"{keys} tokens, {heads} heads of {width}",
        flops=4 * queries * keys * heads * width,
        nbytes=sum(t.nbytes for t in (q, k, v, q)),
        candidates=candidates,
        error=lambda result: relative_error(result[:, rows], expected),
    )
