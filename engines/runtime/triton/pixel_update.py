"""Second half of a pixel block in one pass over memory: `PixelBlock.update` (`engines.pid.blocks`), in place.

Everything is float32 except the operands of the two matrix products, which have the dtype of the weights. In bf16, the
plain function also rounds the results in between.

Pixels stay in the registers of the thread that loads them. The instruction m16n8k16 wants columns 2t, 2t + 1, 2t + 8
and 2t + 9 of each 16 in thread t of four, for its operands and for its result. `_to_columns` makes these columns of the
four adjacent channels that thread t has loaded. Weights and biases follow this order. It requires programs of one warp:
with more, Triton distributes the rows of loads and of products differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.pid.blocks import PixelBlock
from engines.runtime.triton.architectures import Architecture


@dataclass(frozen=True)
class PixelConfig:
    """Division of the work among programs of one warp."""

    tile: int  # pixels computed at a time, a multiple of 16
    tiles: int  # per program; tile · tiles divides the pixels of a token

    def __str__(self) -> str:
        return f"{self.tiles}x{self.tile} pixels"


_MANY_WARPS, _FEWEST_INSTRUCTIONS = PixelConfig(16, 1), PixelConfig(16, 8)  # weights are loaded once per program
CONFIGS: Mapping[Architecture, tuple[PixelConfig, ...]] = {
    "sm_90": (_MANY_WARPS, PixelConfig(32, 1)),
    "sm_100": (_MANY_WARPS, PixelConfig(32, 1), _FEWEST_INSTRUCTIONS),
    "sm_120": (_MANY_WARPS, PixelConfig(32, 1), _FEWEST_INSTRUCTIONS),
}


@triton.jit
def gelu(x):
    """Compute x · Φ(x) with an error of at most 2⁻¹⁰ of the result and 10⁻⁶ · |x|.

    That is less than the rounding of bf16, except for x < −3, where the result is close to 0.

    Φ is approximated by 1 / (1 + 2^(x · p(x²))). The coefficients of p are a fit to this error; the first and the last
    have the same sign, so that large x need no limit. The reciprocal is the square of an approximate reciprocal root,
    because Triton's division costs more instructions.
    """
    square = x * x
    odds = tl.exp2(x * (((-4.328085e-6 * square + 1.2122005e-3) * square - 0.10807025) * square - 2.2994418))
    root = tl.rsqrt(1.0 + odds)
    return x * root * root


@triton.jit
def _to_columns(x, rows: tl.constexpr, width: tl.constexpr):
    """Reorder channels [rows, width / 4, 4] as columns of a matrix [rows, width]."""
    return x.reshape(rows, width // 16, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(rows, width)


@triton.jit
def _to_channels(x, rows: tl.constexpr, width: tl.constexpr):
    """Invert `_to_columns`."""
    return x.reshape(rows, width // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(rows, width // 4, 4)


@triton.jit
def _column_channel(column):
    """Return the channel of a column: the bits ijjk at the end of a column are bits jjik of its channel."""
    return column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2


@triton.jit
def _load(tensor, offset, mask, rows: tl.constexpr, width: tl.constexpr):
    return tl.load(tensor + offset, mask, 0.0).to(tl.float32).reshape(rows, width // 4, 4)


@triton.jit
def _load_weight(
    weight, outputs: tl.constexpr, inputs: tl.constexpr, padded_outputs: tl.constexpr, padded_inputs: tl.constexpr
):
    """Load a weight [outputs, inputs] as the right operand of a product, [inputs, outputs] in the order of columns."""
    index = tl.arange(0, padded_outputs * padded_inputs // 4)[:, None]  # of [inputs / 16, outputs, 4], four inputs each
    block, row = index // (4 * padded_outputs), _column_channel(index // 4 % padded_outputs)
    column = block * 16 + index % 4 * 4 + tl.arange(0, 4)[None]
    values = tl.load(weight + row * inputs + column, (row < outputs) & (column < inputs), 0.0)
    values = values.reshape(padded_inputs // 16, padded_outputs, 4, 2, 2).permute(1, 0, 3, 2, 4)
    return values.reshape(padded_outputs, padded_inputs).trans()


@triton.jit
def _update_pixels(
    pixels,  # [B, tokens, token_pixels, channels], contiguous except for the stride of the batch
    modulation,  # [B, tokens, 4, token_pixels, channels]
    expanded,  # [B, tokens, token_pixels, channels]
    norm,  # [channels]
    weight1,  # [4 · channels, channels]
    bias1,
    weight2,  # [channels, 4 · channels]
    bias2,
    batch_stride,
    tokens,
    token_pixels: tl.constexpr,
    channels: tl.constexpr,
    width: tl.constexpr,  # at least `channels` and 16, a power of two
    tile: tl.constexpr,
    tiles: tl.constexpr,
):
    hidden: tl.constexpr = 4 * channels
    quad, one = tl.arange(0, width // 4)[:, None], tl.arange(0, 4)[None]
    norm = _load(norm, quad * 4 + one, quad * 4 + one < channels, 1, width)
    bias2 = _load(bias2, quad * 4 + one, quad * 4 + one < channels, 1, width)
    column = _column_channel(tl.arange(0, 4 * width))
    bias1 = tl.load(bias1 + column, column < hidden, 0.0).to(tl.float32)
    weight1 = _load_weight(weight1, hidden, channels, 4 * width, width)
    weight2 = _load_weight(weight2, channels, hidden, width, 4 * width)

    programs: tl.constexpr = token_pixels // (tile * tiles)  # per token
    part: tl.constexpr = token_pixels * channels
    token, image = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(1).to(tl.int64)
    pixels += image * batch_stride + token * part
    modulation += (image * tokens + token) * (4 * part)
    expanded += (image * tokens + token) * part
    first = tl.program_id(0) % programs * (tile * tiles)
    index = tl.arange(0, tile * width // 4)[:, None]  # of [tile, width / 4], four channels each
    channel = index % (width // 4) * 4 + one
    mask = channel < channels
    for i in tl.range(tiles, num_stages=1):  # other warps hide the latency of loads
        offset = (first + i * tile + index // (width // 4)) * channels + channel
        x = _load(pixels, offset, mask, tile, width)
        added = _load(expanded, offset, mask, tile, width)
        gate = _load(modulation, offset, mask, tile, width)
        shift = _load(modulation + part, offset, mask, tile, width)
        scale = _load(modulation + 2 * part, offset, mask, tile, width)
        gate_mlp = _load(modulation + 3 * part, offset, mask, tile, width)
        x += gate * added
        mean = tl.sum(tl.sum(x * x, 2), 1) / channels  # [tile]
        z = x * tl.rsqrt(mean + 1e-6)[:, None, None] * norm * (1.0 + scale) + shift
        z = _to_columns(z.to(weight1.dtype), tile, width)
        h = tl.dot(z, weight1, bias1[None].broadcast_to(tile, 4 * width), input_precision="ieee")
        y = tl.dot(gelu(h).to(weight2.dtype), weight2, input_precision="ieee")
        x += gate_mlp * (_to_channels(y, tile, width) + bias2)
        tl.store(pixels + offset, x.to(pixels.dtype.element_ty).reshape(tile * width // 4, 4), mask)


def update_pixels(
    pixels: Tensor,
    modulation: Tensor,
    expanded: Tensor,
    norm: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    tile: int,
    tiles: int,
) -> None:
    """Compute `PixelBlock.update` in place.

    Args:
        pixels: [B, L, P, C], a chunk of the tokens of a contiguous tensor.
        modulation: [B, L, 4·P·C], contiguous, with the parts gate, shift, scale and gate of the MLP.
        expanded: [B, L, P·C], contiguous.
        norm: Weight of the norm, [C].
        weight1: Weight of the MLP's first layer, [4C, C].
        bias1: Its bias.
        weight2: Weight of the second layer, [C, 4C].
        bias2: Its bias.
        tile: See `PixelConfig`.
        tiles: See `PixelConfig`.

    Raises:
        ValueError: A tensor is not contiguous.
    """
    batch, tokens, token_pixels, channels = pixels.shape
    if not (pixels[0].is_contiguous() and modulation.is_contiguous() and expanded.is_contiguous()):
        raise ValueError("The tokens of an image must be contiguous, as must modulation and expanded.")
    _update_pixels[(tokens * (token_pixels // (tile * tiles)), batch)](
        pixels,
        modulation,
        expanded,
        norm,
        weight1,
        bias1,
        weight2,
        bias2,
        pixels.stride(0),
        tokens,
        token_pixels=token_pixels,
        channels=channels,
        width=max(16, triton.next_power_of_2(channels)),
        tile=tile,
        tiles=tiles,
        num_warps=1,
    )


_operator = torch.library.custom_op("pid::update_pixels", update_pixels, mutates_args=("pixels",))


@_operator.register_fake
def _(*inputs: object) -> None:
    pass


def update(config: PixelConfig, block: PixelBlock, pixels: Tensor, modulation: Tensor, expanded: Tensor) -> None:
    """Compute `block.update` in place; with its first argument bound, a `PixelBlock.kernel`."""
    first, second = block.mlp.fc1, block.mlp.fc2
    _operator(
        pixels,
        modulation,
        expanded,
        block.norm2.weight,
        first.weight,
        first.bias,
        second.weight,
        second.bias,
        config.tile,
        config.tiles,
    )
