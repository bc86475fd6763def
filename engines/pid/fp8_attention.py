"""Attention in FP8 (e4m3): queries, keys, values and softmax numerators are rounded to FP8, sums are float32.

This is what TensorRT's fused FP8 attention computes. PyTorch has no such kernel: unless the runtime brings its own, the
same is computed with rounded values in float32, which is slower than attention in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.pid.fp8 import FP8_MAX, fp8_round, power_of_two_scale, to_fp8

NUMERATOR_SCALE = 1 / FP8_MAX  # numerators of the softmax, exp(score - largest score), are in 0..1
_SCORE_BYTES = 64 * 2**20  # float32 scores that the emulation holds at a time


@dataclass(frozen=True)
class AttentionRange:
    """Largest magnitudes of the queries, keys and values that one attention reads."""

    q: float
    k: float
    v: float


class Fp8Attention(nn.Module):
    """Softmax attention over values in FP8, with one static scale each for queries, keys and values.

    Queries are multiplied by 1/√d before they are rounded, and not afterwards, so that nothing stands between the
    rounded values and the matrix product; otherwise TensorRT does not use its FP8 kernel.

    Attributes:
        kernel: What a runtime computes instead of the emulation. It takes this module, and heads in the layout and
            dtype that `heads` of the attention, which the runtime sets as well, has written.
        rounds_numerators: Whether PyTorch rounds the numerators of the softmax too. Exported graphs cannot express it.
    """

    kernel: Callable[[Fp8Attention, Tensor, Tensor, Tensor], Tensor] | None = None
    rounds_numerators: bool = True  # not a tensor: torch.compile treats it as a constant

    q_scale: Tensor  # scalar float32, for queries times 1/√d
    k_scale: Tensor  # scalar float32
    v_scale: Tensor  # scalar float32

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_scale", "k_scale", "v_scale"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend over q, k, v [B, heads, N, d] -> [B, heads, N, d], in the dtype of q."""
        if self.kernel is not None:
            return self.kernel(self, q, k, v)
        q, k, v = fp8_round(scale_queries(q), self.q_scale), fp8_round(k, self.k_scale), fp8_round(v, self.v_scale)
        if torch.compiler.is_exporting() or not self.rounds_numerators:
            return F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return fp8_softmax_attention(q, k, v)


def scale_queries(q: Tensor) -> Tensor:
    """Multiply queries [..., d] by 1/√d, in float32: in a graph of 16 bits, the factor would be rounded."""
    return (q.float() * q.shape[-1] ** -0.5).to(q.dtype)


# A custom operator, so that torch.compile does not unroll the loop.
@torch.library.custom_op("pid::fp8_softmax_attention", mutates_args=())
def fp8_softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the numerators of the softmax rounded to FP8: round(exp(s - max s)) v / Σ exp(s - max s), s = q kᵀ.

    Scores and sums are float32. Queries are processed in chunks, because the scores of a large image need gigabytes.

    Args:
        q: Queries [B, heads, N, d], already multiplied by 1/√d.
        k: Keys [B, heads, M, d].
        v: Values [B, heads, M, d].

    Returns:
        [B, heads, N, d] in the dtype of q.
    """
    keys, values = k.float().transpose(2, 3), v.float()
    scale = torch.full((), NUMERATOR_SCALE, device=q.device)
    chunk = max(1, _SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows, result in zip(q.split(chunk, dim=2), out.split(chunk, dim=2), strict=True):
        scores = rows.float() @ keys  # [B, heads, chunk, M]
        numerators = (scores - scores.amax(dim=3, keepdim=True)).exp()
        sums = numerators.sum(dim=3, keepdim=True)
        rounded = to_fp8(numerators, scale).float()
        result.copy_((rounded @ values) * (scale / sums))
    return out


@fp8_softmax_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def quantise_attention(attention: nn.Module, largest: AttentionRange) -> None:
    """Compute an attention module of `engines.pid.blocks` in FP8, in place, with scales for the given magnitudes."""
    head_width: int = attention.head_width  # type: ignore[assignment]
    device = next(attention.parameters()).device
    magnitudes = torch.tensor((largest.q / math.sqrt(head_width), largest.k, largest.v), dtype=torch.float64)
    scales = power_of_two_scale(magnitudes).to(device)
    attention.fp8 = Fp8Attention()
    state = dict(zip(("q_scale", "k_scale", "v_scale"), scales.unbind(), strict=True))
    attention.fp8.load_state_dict({name: scale.clone() for name, scale in state.items()}, strict=True, assign=True)


def add_fp8_attention(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add an empty `Fp8Attention`, in place, to each attention that has scales in the state dictionary."""
    for name, module in list(network.named_modules()):
        if hasattr(module, "fp8") and f"{name}.fp8.q_scale" in state:
            with torch.device(next(module.parameters()).device):
                module.fp8 = Fp8Attention()
