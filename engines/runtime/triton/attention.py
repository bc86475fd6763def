"""Softmax attention without a mask: in bf16, with queries and keys in FP8, or with values in FP8 as well.

It computes `scaled_dot_product_attention` of PyTorch, and with FP8 values `fp8_softmax_attention` of
`engines.pid.fp8_attention`. The numerators of the softmax are rounded to the dtype of the values, their sum is that of
the unrounded ones. Scores, sums and results are accumulated in float32.

Heads are computed in parts whose widths are powers of two: 72 channels are 64 and 16, instead of 128. Tensors are read
through descriptors, which supply zeros for tokens and channels beyond the last. From Hopper on, the hardware does that
(TMA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engines.pid.fp8 import FP8
from engines.pid.fp8_attention import Fp8Attention
from engines.runtime.triton.architectures import Architecture
from engines.runtime.triton.exponentials import exponentials

MAX_BOUND = 60.0  # of scores in log2 units, for `bounded`: float32 has room for sums of 2⁶⁷ numerators
_LOG2_FP8_MAX = tl.constexpr(math.log2(448.0))  # numerators in FP8 are multiplied by 448, the largest value


# Architectures for which values in FP8 are accurate. The tensor cores of Hopper keep about 14 bits of a sum of FP8
# products, so small numerators would not count next to the sum over thousands of keys.
FP8_VALUES: frozenset[Architecture] = frozenset({"sm_100", "sm_120"})


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of the tiles.

    Attributes:
        queries: Queries per program.
        keys: Keys per iteration.
        warps: Warps per program.
        stages: Iterations whose keys and values are in shared memory.
        polynomials: 1: a quarter of the exponentials is computed as polynomials, not by the special function units,
            which limit the speed if the tensor cores do not. 0: none.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    polynomials: int = 0

    def __str__(self) -> str:
        sizes = f"{self.queries}x{self.keys}, {self.warps} warps, {self.stages} stages"
        return f"{sizes}, polynomials" if self.polynomials else sizes

    @property
    def values(self) -> list[int]:
        """The attributes in their order, as a PyTorch operator accepts them."""
        return [self.queries, self.keys, self.warps, self.stages, self.polynomials]


CONFIGS: Mapping[Architecture, tuple[AttentionConfig, ...]] = {
    "sm_90": (
        AttentionConfig(queries=64, keys=64, warps=4, stages=3),
        AttentionConfig(queries=128, keys=64, warps=4, stages=3),
    ),
    "sm_100": (
        AttentionConfig(queries=128, keys=64, warps=4, stages=3, polynomials=1),
        AttentionConfig(queries=128, keys=64, warps=4, stages=3),
        AttentionConfig(queries=256, keys=64, warps=8, stages=2, polynomials=1),
    ),
    "sm_120": (
        AttentionConfig(queries=128, keys=64, warps=8, stages=3),
        AttentionConfig(queries=64, keys=64, warps=4, stages=3),
    ),
}
# Heads of 72 channels are read in two parts. On an H200, programs with 128 queries need 2.5 ms, although a few
# registers spill, and those with 64 queries 3.9 ms.
WIDE_CONFIGS: Mapping[Architecture, tuple[AttentionConfig, ...]] = {
    **CONFIGS,
    "sm_90": (AttentionConfig(queries=128, keys=64, warps=4, stages=4),),
}


def configs(architecture: Architecture, width: int) -> tuple[AttentionConfig, ...]:
    """Return the sizes to choose from for heads of `width` channels, the most promising first."""
    return (CONFIGS if width <= 64 else WIDE_CONFIGS)[architecture]


@triton.jit
def _load(tensor, image, head, token, channel):
    """Load a block of one head, [tokens, channels]."""
    return tensor.load([image, head, token, channel]).reshape(tensor.block_shape[2], tensor.block_shape[3])


@triton.jit
def _load_values(tensor, image, head, token, channel):
    if tensor.dtype == tl.float8e4nv:  # transposed in memory
        return _load(tensor, image, head, channel, token).T
    else:
        return _load(tensor, image, head, token, channel)


@triton.jit
def _scores(query, query_rest, k, k_rest, image, head, start):
    """Multiply queries by a tile of keys."""
    scores = tl.dot(query, _load(k, image, head, start, 0).T, input_precision="ieee")
    if k_rest is not None:
        rest = _load(k_rest, image, head, start, query.shape[1])
        scores = tl.dot(query_rest, rest.T, scores, input_precision="ieee")
    return scores


@triton.jit
def _add_values(result, result_rest, numerators, v, v_rest, image, head, start):
    """Add a tile of values, weighted by their numerators, to the results."""
    weights = numerators.to(v.dtype)
    result = tl.dot(weights, _load_values(v, image, head, start, 0), result, input_precision="ieee")
    if v_rest is not None:
        rest = _load_values(v_rest, image, head, start, result.shape[1])
        result_rest = tl.dot(weights, rest, result_rest, input_precision="ieee")
    return result, result_rest


@triton.jit
def _softmax(
    scores,
    score_scale,
    largest,
    sums,
    result,
    result_rest,
    scaled: tl.constexpr,
    bounded: tl.constexpr,
    fp8: tl.constexpr,
    polynomials: tl.constexpr,
):
    """Compute the numerators of a tile and add them to the sums; if they are relative to a maximum, update all."""
    if not bounded:
        previous = largest
        largest = tl.maximum(previous, tl.max(scores, 1) * score_scale)
        scores = scores * score_scale - (largest - _LOG2_FP8_MAX if fp8 else largest)[:, None]
        decay = tl.exp2(previous - largest)[:, None]
        sums *= decay
        result *= decay
        result_rest *= decay
    elif scaled:
        scores *= score_scale
    numerators = exponentials(scores, polynomials)
    sums += tl.sum(numerators.reshape(scores.shape[0], scores.shape[1] // 8, 8), 1)
    return numerators, largest, sums, result, result_rest


@triton.jit
def _attention(
    q,  # descriptor of [B, heads, N, d], with blocks of the first part of the channels
    q_rest,  # the same with blocks of the other channels, or None
    k,
    k_rest,
    v,
    v_rest,
    out,  # [B, N, heads, d], contiguous
    heads,
    queries,
    keys,
    score_scale,
    query_scale,  # scalars that the operands are still to be multiplied by, or None
    key_scale,
    value_scale,
    width: tl.constexpr,  # d
    v_part: tl.constexpr,
    v_rest_part: tl.constexpr,
    scaled: tl.constexpr,  # whether scores have any scale
    bounded: tl.constexpr,
    stages: tl.constexpr,
    polynomials: tl.constexpr,
):
    # Programs that run at the same time have the same head, whose keys and values stay in the L2 cache.
    rows: tl.constexpr = q.block_shape[2]
    block: tl.constexpr = k.block_shape[2]
    fp8: tl.constexpr = v.dtype == tl.float8e4nv
    first, image, head = tl.program_id(0) * rows, tl.program_id(1) // heads, tl.program_id(1) % heads
    query = _load(q, image, head, first, 0)
    query_rest = None if q_rest is None else _load(q_rest, image, head, first, query.shape[1])
    if query_scale is not None:
        score_scale *= tl.load(query_scale) * tl.load(key_scale)
    largest = tl.full([rows], float("-inf"), tl.float32)
    # Eight sums per query, because the scores of a thread are, in each group of eight columns, those of two. So threads
    # add only what they have computed, until the end.
    sums = tl.zeros([rows, 8], tl.float32)
    result = tl.zeros([rows, v_part], tl.float32)
    result_rest = tl.zeros([rows, v_rest_part], tl.float32)

    # The product with the values is one tile behind, so that tensor cores compute it during the exponentials of the
    # next tile, if there is a bound; otherwise Triton waits for it before the exponentials. The first product is with
    # zeros. Only the last tile, which may be empty, needs a mask.
    scores = _scores(query, query_rest, k, k_rest, image, head, 0)
    numerators = tl.zeros([rows, block], tl.float32)
    full = keys // block * block
    for start in tl.range(0, full, block, num_stages=stages):
        result, result_rest = _add_values(result, result_rest, numerators, v, v_rest, image, head, start - block)
        numerators, largest, sums, result, result_rest = _softmax(
            scores, score_scale, largest, sums, result, result_rest, scaled, bounded, fp8, polynomials
        )
        scores = _scores(query, query_rest, k, k_rest, image, head, start + block)
    result, result_rest = _add_values(result, result_rest, numerators, v, v_rest, image, head, full - block)
    scores = tl.where((full + tl.arange(0, block) < keys)[None], scores, float("-inf"))
    numerators, largest, sums, result, result_rest = _softmax(
        scores, score_scale, largest, sums, result, result_rest, scaled, bounded, fp8, 0
    )
    result, result_rest = _add_values(result, result_rest, numerators, v, v_rest, image, head, full)

    factor = (1 / tl.sum(sums, 1))[:, None]
    if value_scale is not None:
        factor *= tl.load(value_scale)
    row = (first + tl.arange(0, rows))[:, None]
    out += ((image.to(tl.int64) * queries + row) * heads + head) * width
    channel = tl.arange(0, v_part)[None]
    tl.store(out + channel, (result * factor).to(out.dtype.element_ty), (row < queries) & (channel < width))
    if v_rest is not None:
        channel = v_part + tl.arange(0, v_rest_part)[None]
        tl.store(out + channel, (result_rest * factor).to(out.dtype.element_ty), (row < queries) & (channel < width))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_scale: float,
    operand_scales: Sequence[Tensor | None],
    bounded: bool,
    dtype: torch.dtype,
    config: Sequence[int],
) -> Tensor:
    """Compute softmax(score_scale · ln 2 · q kᵀ) v, where q, k and v may have scales.

    All strides are multiples of 16 bytes, except that of the axis that is contiguous in memory, and so is the address.
    That axis is the last one, but for values in FP8 that of the tokens.

    Args:
        q: Queries [B, heads, N, d], float32, bf16 or FP8 (e4m3).
        k: Keys [B, heads, M, d] of the same dtype.
        v: Values [B, heads, M, d], float32, bf16 or FP8.
        score_scale: Positive factor that converts q kᵀ to logarithms to base 2. It contains log2(e), and 1/√d unless
            the queries do. 1 saves the multiplication, if there are no scales.
        operand_scales: Scales of q, k and v, scalars, or None. q and k both have one, or neither has.
        bounded: Whether no |score_scale · q kᵀ| exceeds MAX_BOUND, so that the softmax needs no maximum.
        dtype: Dtype of the result.
        config: Values of an `AttentionConfig`.

    Returns:
        [B, heads, N, d], a view of contiguous memory [B, N, heads, d].

    Raises:
        ValueError: `bounded`, and the dtype of the values cannot represent the numerators, up to 2^MAX_BOUND.
    """
    if bounded and torch.finfo(v.dtype).max < 2.0**MAX_BOUND:
        raise ValueError(f"Attention with values in {v.dtype} needs the maximum of the scores. Pass bounded=False.")
    tiles = AttentionConfig(*config)
    batch, heads, queries, width = q.shape
    qk_part, qk_rest = _parts(width, 32 if q.dtype == FP8 else 16)  # limits of the tensor cores
    v_part, v_rest = _parts(width, 16)
    out = _empty_output(q, dtype)
    _attention[(triton.cdiv(queries, tiles.queries), batch * heads)](
        _descriptor(q, tiles.queries, qk_part),
        _descriptor(q, tiles.queries, qk_rest) if qk_rest else None,
        _descriptor(k, tiles.keys, qk_part),
        _descriptor(k, tiles.keys, qk_rest) if qk_rest else None,
        _descriptor(v, tiles.keys, v_part),
        _descriptor(v, tiles.keys, v_rest) if v_rest else None,
        out,
        heads,
        queries,
        k.shape[2],
        score_scale,
        *operand_scales,
        width=width,
        v_part=v_part,
        v_rest_part=v_rest or 16,  # without a second part, nothing reads or writes its result
        scaled=score_scale != 1 or operand_scales[0] is not None,
        bounded=bounded,
        stages=tiles.stages,
        polynomials=tiles.polynomials,
        num_warps=tiles.warps,
    )
    return out


def _parts(width: int, smallest: int) -> tuple[int, int]:
    """Return two powers of two, of at least `smallest`, that sum up to at least `width`; the second may be 0."""
    first = max(smallest, 1 << (width.bit_length() - 1))
    return first, max(smallest, triton.next_power_of_2(width - first)) if width > first else 0


def _descriptor(x: Tensor, tokens: int, channels: int) -> TensorDescriptor:
    """Describe x [B, heads, N, d] for loads of `tokens` and `channels` of one head, transposed as x is in memory."""
    block = [tokens, channels]
    if x.stride(3) != 1:
        x, block = x.transpose(2, 3), [channels, tokens]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, *block])


def _empty_output(q: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


_operator = torch.library.custom_op("pid::attention", attention, mutates_args=())


@_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_scale: float,
    operand_scales: Sequence[Tensor | None],
    bounded: bool,
    dtype: torch.dtype,
    config: Sequence[int],
) -> Tensor:
    return _empty_output(q, dtype)


@dataclass(frozen=True)
class AttentionFormat:
    """What an attention needs to know of its inputs and its result; see `attention`."""

    score_scale: float
    bounded: bool
    dtype: torch.dtype


def attend(form: AttentionFormat, config: AttentionConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over q, k, v [B, heads, N, d] -> [B, heads, N, d], without scales; for `kernel` of an attention."""
    return _operator(q, k, v, form.score_scale, (None, None, None), form.bounded, form.dtype, config.values)


def attend_fp8(
    form: AttentionFormat, config: AttentionConfig, fp8: Fp8Attention, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attend as `attend` does, over q and k in FP8, and v in FP8 or not; for `Fp8Attention.kernel`."""
    scales = fp8.q_scale, fp8.k_scale, fp8.v_scale if v.dtype == FP8 else None
    return _operator(q, k, v, form.score_scale, scales, form.bounded, form.dtype, config.values)
