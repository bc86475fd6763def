"""Variants of decoding in tiles, written directly over the network, and how their images are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled.decoder import CAPTION_TOKENS
from engines.compile.comparison import psnr
from engines.pid import FoldedDecoder, NoiseSource, sample
from engines.pid.config import PATCH
from engines.pid.network import Conditioning
from engines.pid.positions import Geometry
from engines.pid.sampler import MAX_STEPS, VelocityNetwork
from engines.runtime.tiles import TilePlan
from engines.size import Size

OWN_TABLES, CROPPED_TABLES, CROPPED_PIXELS, CROPPED_TOKENS = TABLE_NAMES = (
    "tables of the tile's size",
    "parts of the whole image's tables",
    "rotary tables of the tile's size, pixel positions of the whole image",
    "rotary tables of the whole image, pixel positions of the tile's size",
)
LINEAR, SMOOTH, MIDDLE, CUT, WHOLE_CONDITION = BLEND_NAMES = (
    "linear ramp",
    "smooth ramp, 3w² − 2w³",
    "linear ramp in the middle half of the overlap",
    "cut in the middle of the overlap",
    "linear ramp, latent conditioned as a whole",
)


def decode_whole(decoder: FoldedDecoder, latent: Tensor, size: Size) -> Tensor:
    """Decode a latent [c, h, w] as a whole, with the noise of the seed 0; return [3, H, W] in [-1, 1]."""
    return _decode(decoder, _condition(decoder, latent, size), size)


def decode_variant(decoder: FoldedDecoder, latent: Tensor, plan: TilePlan, variant: str = OWN_TABLES) -> Tensor:
    """Decode a latent [c, h, w] in tiles, with one of TABLE_NAMES or BLEND_NAMES; return [3, H, W] in [-1, 1]."""
    whole = _condition(decoder, latent, plan.image)
    tiles = []
    for number in range(len(plan)):
        area, cells, tokens = (_area(plan, number, side) for side in (1, decoder.config.cell_side, PATCH))
        tile = _condition(decoder, latent[cells], plan.tile)
        if variant == WHOLE_CONDITION:
            assert whole.pixel is not None  # noqa: S101  the bundled decoder has it
            adapter = [values[:, *tokens[1:]] for values in whole.adapter]
            tile = replace(tile, adapter=adapter, pixel=whole.pixel[:, *tokens[1:]])
        tile = replace(tile, geometry=_tables(whole.geometry, tile.geometry, tokens, area, variant))
        tiles.append(_Tile(area, tile, _weights(plan, number, variant)))
    return _decode(_BlendedVelocities(decoder, tiles), whole, plan.image)


@dataclass(frozen=True)
class Comparison:
    """An image in tiles, compared with the same image decoded as a whole.

    Attributes:
        psnr: In dB.
        block: Largest difference of the mean of 16×16 pixels, in levels of 255.
        border: Largest ratio of the mean step between the pixels at an edge of a tile to that of the whole image; 1 if
            the edge is invisible.
        elsewhere: The same for the borders of patches that are no edges of tiles.
    """

    psnr: float
    block: float
    border: float
    elsewhere: float


def compare(tiled: Tensor, whole: Tensor, plan: TilePlan) -> Comparison:
    """Compare two images [3, H, W] in [-1, 1]."""
    block = F.avg_pool2d(tiled - whole, PATCH).abs().max().item() * 127.5
    border, elsewhere = [1.0], [1.0]
    for axis, (edges, length) in enumerate(((plan.rows, plan.tile.height), (plan.columns, plan.tile.width)), start=1):
        ratios = _steps(tiled, axis) / _steps(whole, axis)  # [patches − 1], between patches
        at_edges = {edge for start in edges for edge in (start, start + length)}
        for i, ratio in enumerate(ratios.tolist(), start=1):
            (border if i * PATCH in at_edges else elsewhere).append(ratio)
    return Comparison(psnr(tiled, whole), block, max(border), max(elsewhere))


def _steps(image: Tensor, axis: int) -> Tensor:
    """Return the mean absolute difference between the two pixels at each border of patches along an axis."""
    steps = image.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
    return steps[PATCH - 1 :: PATCH]


@dataclass(frozen=True)
class _Tile:
    area: tuple[slice, ...]  # in [3, H, W]
    conditioning: Conditioning
    weights: Tensor  # [h, w]


class _BlendedVelocities:
    """The network, applied to tiles; implements `VelocityNetwork`."""

    def __init__(self, decoder: FoldedDecoder, tiles: Sequence[_Tile]) -> None:
        self._decoder, self._tiles = decoder, tiles

    def velocity(self, x: Tensor, t: Tensor | float, conditioning: Conditioning, sigma: Tensor | float) -> Tensor:
        """Blend the velocities of the tiles; `conditioning` is ignored."""
        total = torch.zeros_like(x)
        for tile in self._tiles:
            velocity = self._decoder.velocity(x[:, *tile.area], t, tile.conditioning, sigma)
            total[:, *tile.area] += tile.weights * velocity
        return total


def _condition(decoder: FoldedDecoder, latent: Tensor, size: Size) -> Conditioning:
    return decoder.condition(latent[None], torch.zeros(1, CAPTION_TOKENS, decoder.config.caption_width), size)


def _decode(network: VelocityNetwork, conditioning: Conditioning, size: Size) -> Tensor:
    noise = NoiseSource(0, "cpu")
    start, *step_noise = [noise.draw(size)[None] for _ in range(MAX_STEPS)]
    return sample(network, conditioning, start, 0.0, step_noise)[0].clamp(-1, 1)


def _area(plan: TilePlan, number: int, side: int) -> tuple[slice, ...]:
    """Return the slices of a tile in a tensor [C, rows, columns] with one value per `side` pixels."""
    corner = plan.corner(number)
    return (
        slice(None),
        *(slice(edge // side, (edge + length) // side) for edge, length in zip(corner, plan.tile, strict=True)),
    )


def _tables(
    whole: Geometry, tile: Geometry, tokens: tuple[slice, ...], area: tuple[slice, ...], variant: str
) -> Geometry:
    *rotary, rows, columns = whole
    cropped = [*(table[tokens[1:]].contiguous() for table in rotary), rows[area[1]], columns[area[2]]]
    if variant == CROPPED_TABLES:
        return Geometry._make(cropped)
    if variant == CROPPED_PIXELS:
        return Geometry._make([*tile[:4], *cropped[4:]])
    return Geometry._make([*cropped[:4], *tile[4:]]) if variant == CROPPED_TOKENS else tile


def _weights(plan: TilePlan, number: int, variant: str) -> Tensor:
    rows, columns = (_reshape(torch.tensor(weights), variant) for weights in plan.weights(number))
    return rows[:, None] * columns


def _reshape(weights: Tensor, variant: str) -> Tensor:
    """Change the shape of linear ramps that do not overlap each other."""
    if variant == SMOOTH:
        return weights**2 * (3 - 2 * weights)
    if variant == MIDDLE:
        return (2 * weights - 0.5).clamp(0, 1)
    return (weights > 0.5).float() if variant == CUT else weights  # no weight of a pixel is exactly 0.5
