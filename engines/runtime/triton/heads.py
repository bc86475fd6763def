"""Per-head norms, rotary positions and concatenation in one pass, written in the layout that an attention reads.

It computes `make_heads` of `JointAttention` and `SelfAttention` (`engines.pid.blocks`). Everything is float32 between
the product that it reads and the heads that it writes; the plain functions round the normalised heads in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from engines.pid.blocks import Attention, Heads, JointAttention, SelfAttention
from engines.pid.fp8 import FP8, Fp8Linear
from engines.pid.fp8_attention import Fp8Attention
from engines.pid.positions import Rotary

_BLOCK_TOKENS = 16
_THREAD_CHANNELS = 8  # 16 bytes in 16 bits; with more, Triton moves values between threads
_ROW_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class HeadsFormat:
    """How heads are written, which depends on the attention that reads them.

    Values in FP8 are transposed in memory: tensor cores that multiply 8-bit values need the summed axis, that of the
    tokens, contiguous. What is in FP8 has the scales of the `Fp8Attention` of the module.

    Attributes:
        query_factor: Factor of the queries. In FP8, it is in addition to their scale, as their scale is for queries
            times 1/√d.
        fp8_scores: Whether queries and keys are in FP8.
        fp8_values: Whether values are, too.
    """

    query_factor: float = 1.0
    fp8_scores: bool = False
    fp8_values: bool = False


@triton.jit
def _normalised(pointer, scale, weight, channel, mask, width: tl.constexpr):
    """Load heads [tokens, channels] and normalise them."""
    x = tl.load(pointer + channel, mask, 0.0).to(tl.float32)
    if scale is not None:
        x *= tl.load(scale + channel, channel < width, 0.0)
    mean = tl.sum(x * x, 1) / width  # [tokens]
    weight = tl.load(weight + channel, channel < width, 0.0).to(tl.float32)
    return x * tl.rsqrt(mean + 1e-6)[:, None] * weight


@triton.jit
def _rotated(x, cos, sin):
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    return tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(x.shape[0], x.shape[1])


@triton.jit
def _make_heads(
    product,  # [B, tokens, parts · heads · width], contiguous; parts: queries if there are any, keys, values
    scale,  # [parts · heads · width] or None
    query_weight,  # [width]; None without queries
    key_weight,
    cosines,  # [tokens, width / 2]
    sines,
    queries,  # [B, heads, query_rows, pitch]; conversion to FP8 saturates
    keys,  # [B, heads, key_rows, pitch]
    values,  # [B, heads, key_rows, width] or, transposed, [B, heads, width, key_rows]
    tokens,
    heads,
    query_rows,  # tokens that `queries` has room for
    key_rows,
    query_offset,  # position of the first token
    key_offset,
    query_factor,
    query_scale,  # scalars, by which the heads are divided, or None
    key_scale,
    value_scale,
    width: tl.constexpr,
    pairs: tl.constexpr,  # at least width / 2, a power of two
    pitch: tl.constexpr,  # channels of a row of queries and keys
    transposed: tl.constexpr,  # whether `values` is transposed
    block_tokens: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    head, image = tl.program_id(1), tl.program_id(2)
    row = token.to(tl.int64)[:, None]
    inside = (token < tokens)[:, None]
    channel, pair = tl.arange(0, 2 * pairs)[None], tl.arange(0, pairs)[None]
    mask = inside & (channel < width)
    parts: tl.constexpr = 2 if query_weight is None else 3
    part = heads * width
    product += (image.to(tl.int64) * tokens + row) * (parts * part) + head * width
    if scale is not None:
        scale += head * width
    angles, angle_mask = row * (width // 2) + pair, inside & (pair < width // 2)
    cos = tl.load(cosines + angles, angle_mask, 0.0)
    sin = tl.load(sines + angles, angle_mask, 0.0)
    plane = (image * heads + head).to(tl.int64)  # of the outputs
    written = inside & (channel < pitch)  # zeros behind the last channel
    if query_weight is not None:
        q = _rotated(_normalised(product, scale, query_weight, channel, mask, width), cos, sin) * query_factor
        if query_scale is not None:
            q /= tl.load(query_scale)
        target = queries + (plane * query_rows + query_offset + row) * pitch + channel
        tl.store(target, q.to(queries.dtype.element_ty), written)
        product += part
        if scale is not None:
            scale += part
    k = _rotated(_normalised(product, scale, key_weight, channel, mask, width), cos, sin)
    if key_scale is not None:
        k /= tl.load(key_scale)
    target = keys + (plane * key_rows + key_offset + row) * pitch + channel
    tl.store(target, k.to(keys.dtype.element_ty), written)
    v = tl.load(product + part + channel, mask, 0.0).to(tl.float32)
    if scale is not None:
        v *= tl.load(scale + part + channel, channel < width, 0.0)
    if value_scale is not None:
        v /= tl.load(value_scale)
    if transposed:
        target = values + (plane * width + channel) * key_rows + key_offset + row
    else:
        target = values + (plane * key_rows + key_offset + row) * width + channel
    tl.store(target, v.to(values.dtype.element_ty), mask)


def write_heads(
    products: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    query_weights: Sequence[Tensor | None],
    key_weights: Sequence[Tensor],
    cosines: Sequence[Tensor],
    sines: Sequence[Tensor],
    query_factor: float,
    head_scales: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the heads of one or more streams of tokens, concatenated in their order.

    Args:
        products: Output [B, n, 3·heads·d] of each stream's projection, or [B, n, 2·heads·d] without queries.
        scales: Scale of each output channel, [3·heads·d] float32, that has not been applied yet; or None.
        query_weights: Weight [d] of the norm of each stream's queries; None for a stream without queries.
        key_weights: The same for keys.
        cosines: Rotary table [n, d/2] float32 of each stream.
        sines: Rotary table.
        query_factor: Factor of the queries.
        head_scales: Scales of queries, keys and values, scalars. What has a scale is divided by it and written in FP8;
            what has None is written in the dtype of the products.

    Returns:
        Queries and keys [B, heads, N, pitch] and values [B, heads, N, d]. The pitch is d, in FP8 the next multiple of
        16; nothing reads the channels behind d. Values in FP8 are transposed in memory.

    Raises:
        ValueError: A product or a table is not contiguous.
    """
    if not all(tensor.is_contiguous() for tensor in (*products, *cosines, *sines)):
        raise ValueError("Products and rotary tables must be contiguous.")
    queries, keys, values = _empty_heads(products, query_weights, key_weights, head_scales)
    transposed = head_scales[2] is not None
    (batch, heads, query_rows, pitch), key_rows = queries.shape, keys.shape[2]
    width = key_weights[0].shape[0]
    pairs = triton.next_power_of_2(pitch // 2)
    query_offset = key_offset = 0
    for stream, product in enumerate(products):
        length = product.shape[1]
        _make_heads[(triton.cdiv(length, _BLOCK_TOKENS), heads, batch)](
            product,
            scales[stream],
            query_weights[stream],
            key_weights[stream],
            cosines[stream],
            sines[stream],
            queries,
            keys,
            values,
            length,
            heads,
            query_rows,
            key_rows,
            query_offset,
            key_offset,
            query_factor,
            *head_scales,
            width=width,
            pairs=pairs,
            pitch=pitch,
            transposed=transposed,
            block_tokens=_BLOCK_TOKENS,
            num_warps=max(1, _BLOCK_TOKENS * 2 * pairs // (32 * _THREAD_CHANNELS)),
        )
        key_offset += length
        query_offset += length if query_weights[stream] is not None else 0
    return _views(products, queries, keys, values, transposed)


def _empty_heads(
    products: Sequence[Tensor],
    query_weights: Sequence[Tensor | None],
    key_weights: Sequence[Tensor],
    head_scales: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `_make_heads` writes; if values are in FP8, with room for a multiple of 16 tokens."""
    fp8_queries, fp8_keys, fp8_values = (scale is not None for scale in head_scales)
    first, width = products[0], key_weights[0].shape[0]
    heads = first.shape[2] // ((2 if query_weights[0] is None else 3) * width)
    streams = zip(products, query_weights, strict=True)
    query_rows = sum(product.shape[1] for product, weight in streams if weight is not None)
    key_rows = sum(product.shape[1] for product in products)
    pitch, key_rows = aligned(width) if fp8_queries else width, aligned(key_rows) if fp8_values else key_rows

    def empty(fp8: bool, *shape: int) -> Tensor:
        return first.new_empty((first.shape[0], heads, *shape), dtype=FP8 if fp8 else first.dtype)

    queries, keys = empty(fp8_queries, query_rows, pitch), empty(fp8_keys, key_rows, pitch)
    return queries, keys, empty(fp8_values, width, key_rows) if fp8_values else empty(fp8_values, key_rows, width)


def _views(
    products: Sequence[Tensor], queries: Tensor, keys: Tensor, values: Tensor, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = sum(product.shape[1] for product in products)
    return queries, keys[:, :, :tokens], (values.transpose(2, 3) if transposed else values)[:, :, :tokens]


def aligned(count: int) -> int:
    """Round the number of 8-bit values in a row up, so that rows begin at multiples of 16 bytes."""
    return -(-count // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


_operator = torch.library.custom_op("pid::write_heads", write_heads, mutates_args=())


@_operator.register_fake
def _(
    products: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    query_weights: Sequence[Tensor | None],
    key_weights: Sequence[Tensor],
    cosines: Sequence[Tensor],
    sines: Sequence[Tensor],
    query_factor: float,
    head_scales: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _empty_heads(products, query_weights, key_weights, head_scales)
    return _views(products, *heads, head_scales[2] is not None)


def _product(layer: nn.Linear | Fp8Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the output of a layer without bias, and the scale of its channels if that has not been applied."""
    return (layer.unscaled(x), layer.weight_scale) if isinstance(layer, Fp8Linear) else (layer(x), None)


def joint_heads(
    form: HeadsFormat, attention: JointAttention, x: Tensor, y: Tensor, image: Rotary, caption: Rotary
) -> Heads:
    """Compute `JointAttention.make_heads` in a format."""
    caption_product, caption_scale = _product(attention.qkv_y, y)
    image_product, image_scale = _product(attention.qkv_x, x)
    query_norm = attention.q_norm_y.weight if attention.caption_output else None
    return _heads(
        form,
        attention,
        (caption_product, image_product),
        (caption_scale, image_scale),
        (query_norm, attention.q_norm_x.weight),
        (attention.k_norm_y.weight, attention.k_norm_x.weight),
        (caption, image),
    )


def self_heads(form: HeadsFormat, attention: SelfAttention, x: Tensor, rotary: Rotary) -> Heads:
    """Compute `SelfAttention.make_heads` in a format."""
    product, scale = _product(attention.qkv, x)
    weights = (attention.q_norm.weight,), (attention.k_norm.weight,)
    return _heads(form, attention, (product,), (scale,), *weights, (rotary,))


def _heads(
    form: HeadsFormat,
    attention: Attention,
    products: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    query_weights: Sequence[Tensor | None],
    key_weights: Sequence[Tensor],
    rotaries: Sequence[Rotary],
) -> Heads:
    cosines, sines = zip(*rotaries, strict=True)
    width, head_scales = attention.head_width, _head_scales(form, attention.fp8)
    q, k, v = _operator(products, scales, query_weights, key_weights, cosines, sines, form.query_factor, head_scales)
    return q[..., :width].transpose(1, 2), k[..., :width].transpose(1, 2), v.transpose(1, 2)


def _head_scales(form: HeadsFormat, fp8: Fp8Attention | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not form.fp8_scores:
        return None, None, None
    if fp8 is None:
        raise ValueError("Heads in FP8 need an attention with scales. Quantise it.")
    return fp8.q_scale, fp8.k_scale, fp8.v_scale if form.fp8_values else None
