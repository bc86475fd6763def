"""Choice of the attention kernels on a device: attention is more than half of the work.

An implementation makes the heads, in the layout that its kernel reads, and attends.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from engines.accuracy import relative_error
from engines.pid.blocks import AttentionKernel, JointAttention, SelfAttention
from engines.pid.fold import FoldedDecoder
from engines.runtime.kernels.attention_group import AttentionGroup, MakeHeads
from engines.runtime.kernels.choice import Operation
from engines.runtime.kernels.workload import Workload

CHECKED_ROWS = 64  # queries whose result is checked, spread over all tokens


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
    for group in _groups(decoder, workload):
        yield _operation(group, workload, kernels)


def _groups(decoder: FoldedDecoder, workload: Workload) -> Iterator[AttentionGroup]:
    """Yield the attentions by kind, and those in FP8 by themselves."""
    by_kind = defaultdict(list)
    for module in decoder.modules():
        if isinstance(module, JointAttention | SelfAttention):
            by_kind[type(module), module.fp8 is not None].append(module)
    config, device = decoder.config, decoder.y_pos_embedding.device
    geometry = decoder.geometry(workload.size, device)

    def random(tokens: int, width: int) -> Tensor:
        return torch.randn(1, tokens, width, dtype=decoder.dtype, device=device)

    tokens, caption = workload.tokens, workload.caption_tokens
    for (kind, fp8), modules in by_kind.items():
        suffix = " in FP8" if fp8 else ""
        if kind is SelfAttention:
            inputs = random(tokens, config.pixel_attention_size), geometry.pixel_tokens
            yield AttentionGroup(f"pixel attention{suffix}", tuple(modules), inputs)
        else:
            streams = random(tokens, config.hidden_size), random(caption, config.hidden_size)
            rotary = geometry.image, decoder.caption_rotary(caption, device)
            yield AttentionGroup(f"joint attention{suffix}", tuple(modules), (*streams, *rotary))


def _unsupported(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("PyTorch does not support this attention on this device.")


def _operation(group: AttentionGroup, workload: Workload, kernels: Mapping[str, Kernel]) -> Operation:
    plain: MakeHeads = type(group.sample).make_heads
    q, k, v = (t.transpose(1, 2) for t in plain(group.sample, *group.inputs))  # each [1, heads, N, d]
    (_, heads, queries, width), keys = q.shape, k.shape[2]
    rows = checked_rows(queries, q.device)
    expected = expected_rows(q, k, v, rows).transpose(1, 2).flatten(2)  # [1, rows, heads · d]
    compiled, parameters = workload.optimise(plain), SDPAParams(q, k, v, None, 0.0, False, False)
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


def checked_rows(tokens: int, device: torch.device) -> Tensor:
    """Return the indices of the queries to check: evenly spaced, with the first and the last."""
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=device).round().long()


def expected_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Compute attention of some queries in float32 by its definition; q, k, v [B, heads, N, d]."""
    scores = q[:, :, rows].float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[3])
    return F.softmax(scores, dim=3) @ v.float()
