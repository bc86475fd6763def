"""Launches of every kernel of this project at the shapes of a decode, on tensors without data, to be compiled.

The decoder is that of `work`. Importing this module needs Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engines.benchmark.kernels.resources import Resources, compiled_resources
from engines.benchmark.kernels.work import (
    CHUNK,
    JOINT,
    MODES,
    NETWORK,
    SHAPES,
    TOKENS,
    AttentionShape,
    KernelWork,
    Mode,
    attention_work,
    gated_work,
    heads_work,
    pixel_work,
)
from engines.pid.config import PATCH_PIXELS
from engines.pid.fp8 import FP8
from engines.runtime.triton.architectures import Architecture
from engines.runtime.triton.attention import FP8_VALUES, AttentionConfig, attention, configs
from engines.runtime.triton.gated_product import CONFIGS as GATED_CONFIGS
from engines.runtime.triton.gated_product import GatedConfig, gated_product
from engines.runtime.triton.heads import aligned, write_heads
from engines.runtime.triton.pixel_update import CONFIGS as PIXEL_CONFIGS
from engines.runtime.triton.pixel_update import PixelConfig, update_pixels


@dataclass(frozen=True)
class Case:
    """A kernel with one choice of tile sizes.

    Attributes:
        work: The kernel and what it computes.
        tiles: The tile sizes, or an empty string for a kernel with fixed ones.
        launch: Launches it in each variant that Triton compiles separately.
    """

    work: KernelWork
    tiles: str
    launch: Callable[[], object]

    def compile(self, architecture: Architecture) -> tuple[Resources, ...]:
        """Compile all variants, and return what each needs."""
        return compiled_resources(architecture, self.launch)


def cases(architecture: Architecture) -> Iterator[Case]:
    """Yield all kernels with all their tile sizes for an architecture."""
    modes = [mode for mode in MODES if not mode.fp8_values or architecture in FP8_VALUES]
    for shape in SHAPES:
        for mode in modes:
            yield Case(heads_work(shape, mode), "", partial(_heads, shape, mode))
    for shape in SHAPES:
        for mode in modes:
            for tiles in configs(architecture, shape.width):
                yield Case(attention_work(shape, mode), str(tiles), partial(_attention, shape, mode, tiles))
    for gated in GATED_CONFIGS[architecture]:
        yield Case(gated_work(), str(gated), partial(_gated_product, gated))
    for pixels in PIXEL_CONFIGS[architecture]:
        yield Case(pixel_work(), str(pixels), partial(_pixel_update, pixels))


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _fp8(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=FP8, device="meta")


def _float32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _heads(shape: AttentionShape, mode: Mode) -> None:
    """Make heads of the outputs of FP8 layers; those of captions have no queries in the last block."""
    streams = (NETWORK.caption_tokens, TOKENS) if shape is JOINT else (TOKENS,)
    norm, angles = _bf16(shape.width), [_float32(length, shape.width // 2) for length in streams]
    score_scale, value_scale = (_float32() if fp8 else None for fp8 in (mode.fp8_scores, mode.fp8_values))
    for last in (False, True) if shape is JOINT else (False,):
        queries = [not last, True][-len(streams) :]  # by stream
        channels = [(3 if has_queries else 2) * shape.heads * shape.width for has_queries in queries]
        write_heads(
            products=[_bf16(1, length, count) for length, count in zip(streams, channels, strict=True)],
            scales=[_float32(count) for count in channels],
            query_weights=[norm if has_queries else None for has_queries in queries],
            key_weights=[norm] * len(streams),
            cosines=angles,
            sines=angles,
            query_factor=shape.width**-0.5,
            head_scales=(score_scale, score_scale, value_scale),
        )


def _attention(shape: AttentionShape, mode: Mode, tiles: AttentionConfig) -> None:
    """Attend over heads in the layout that the kernel for heads writes, with bounded scores and, if any, others."""
    if mode.fp8_scores:
        q = k = _fp8(1, shape.heads, shape.tokens, aligned(shape.width))[..., : shape.width]
    else:
        q = k = _bf16(1, shape.heads, shape.tokens, shape.width)
    if mode.fp8_values:
        v = _fp8(1, shape.heads, shape.width, aligned(shape.tokens)).transpose(2, 3)[:, :, : shape.tokens]
    else:
        v = _bf16(1, shape.heads, shape.tokens, shape.width)
    score_scale, value_scale = (_float32() if fp8 else None for fp8 in (mode.fp8_scores, mode.fp8_values))
    factor, scales = math.log2(math.e) if mode.fp8_scores else 1.0, (score_scale, score_scale, value_scale)
    for bounded in (False,) if mode.fp8_values else (False, True):
        attention(q, k, v, factor, scales, bounded, torch.bfloat16, tiles.values)


def _gated_product(tiles: GatedConfig) -> None:
    width, inner = NETWORK.hidden_size, NETWORK.mlp_width
    weight, scales, scale = _fp8(inner, width), _float32(inner), _float32()
    gated_product(_fp8(TOKENS, width), weight, weight, scales, scales, scale, scale, tiles.values)


def _pixel_update(tiles: PixelConfig) -> None:
    channels = NETWORK.pixel_channels
    values = PATCH_PIXELS * channels
    update_pixels(
        pixels=_bf16(1, CHUNK, PATCH_PIXELS, channels),
        modulation=_bf16(1, CHUNK, 4 * values),
        expanded=_bf16(1, CHUNK, values),
        norm=_bf16(channels),
        weight1=_bf16(4 * channels, channels),
        bias1=_bf16(4 * channels),
        weight2=_bf16(channels, 4 * channels),
        bias2=_bf16(channels),
        tile=tiles.tile,
        tiles=tiles.tiles,
    )
