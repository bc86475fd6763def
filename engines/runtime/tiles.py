"""Tiles of images that are larger than the sizes of a runtime: which size to use, where they are, how they blend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.size import MAX_SIDE, Size

# Pixels that neighbouring tiles share at least, unless that is more than half of a tile. Tiles are less accurate near
# their edges; with this overlap, they are as accurate there as elsewhere (docs/measurements/tiles.md).
OVERLAP = 128
# Area in pixels at which the attention of a released decoder costs as much as everything else, condition included.
ATTENTION_AREA = 3.2e6


@dataclass(frozen=True)
class TilePlan:
    """Overlapping tiles of equal size that cover an image, numbered row by row.

    Attributes:
        image: Size of the image in pixels.
        tile: Size of a tile in pixels.
        rows: Top edge of each row of tiles, in pixels.
        columns: Left edge of each column of tiles, in pixels.
    """

    image: Size
    tile: Size
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.rows) * len(self.columns)

    def corner(self, number: int) -> tuple[int, int]:
        """Return the top and left edge of a tile in pixels."""
        row, column = divmod(number, len(self.columns))
        return self.rows[row], self.columns[column]

    def weights(self, number: int) -> tuple[list[float], list[float]]:
        """Return the weights of a tile by row and by column; their products, over all tiles, add up to 1 per pixel."""
        row, column = divmod(number, len(self.columns))
        return _weights(self.rows, row, self.tile.height), _weights(self.columns, column, self.tile.width)


def plan_tiles(image: Size, sizes: Sequence[Size], cell: int) -> TilePlan | None:
    """Choose the tiles of an image with the least predicted cost: of one size, evenly spread.

    Args:
        image: Size of the image in pixels.
        sizes: Sizes that tiles may have, multiples of `cell`.
        cell: Side of a latent cell in pixels.

    Returns:
        The plan, with edges that are multiples of `cell`; None if `image` is not a multiple of `cell`, or if no tile
        fits into it.
    """
    if image.height % cell or image.width % cell:
        return None
    plans = []
    for tile in sizes:
        rows, columns = (_edges(side, length, cell) for side, length in zip(image, tile, strict=True))
        if rows and columns:
            plans.append(TilePlan(image, tile, rows, columns))
    return min(plans, key=_cost, default=None)


def smallest_tiled_size(sizes: Sequence[Size], cell: int, max_pixels: int) -> Size | None:
    """Return the smallest of the sizes that are one cell longer than one of `sizes` and are decoded in tiles.

    None if all of them have more than `max_pixels`.
    """
    longer = [Size(height + down, width + right) for height, width in sizes for down, right in ((cell, 0), (0, cell))]
    tiled = [size for size in longer if size not in sizes and tiles_of(size, sizes, cell, max_pixels) is not None]
    return min(tiled, key=lambda size: size.area, default=None)


def tiles_of(image: Size, sizes: Sequence[Size], cell: int, max_pixels: int) -> TilePlan | None:
    """Return the tiles of an image, see `plan_tiles`; None too if it is larger than `max_pixels` or `MAX_SIDE`."""
    if image.area > max_pixels or max(image) > MAX_SIDE:
        return None
    return plan_tiles(image, sizes, cell)


def _cost(plan: TilePlan) -> float:
    """Predict the relative cost of a step. The attention of a tile grows with the square of its area."""
    return len(plan) * plan.tile.area * (1 + plan.tile.area / ATTENTION_AREA)


def _edges(side: int, length: int, cell: int) -> tuple[int, ...]:
    """Return where tiles of a length begin along one side of the image; none if they do not fit or cannot overlap."""
    if side == length:
        return (0,)
    overlap = min(-(-OVERLAP // cell) * cell, length // cell // 2 * cell)
    if side < length or not overlap:
        return ()
    gaps = -(-(side - length) // (length - overlap))
    return tuple(i * (side - length) // cell // gaps * cell for i in range(gaps + 1))


def _weights(edges: tuple[int, ...], number: int, length: int) -> list[float]:
    """Return the weights of a tile along one axis: ramps over all of the overlap with the tile before and after it.

    Each is the difference of two ramps that begin where tiles begin, so that the sum over all tiles telescopes to 1.
    """
    edge = edges[number]
    return [
        _ramp(edges, number, length, edge + i + 0.5) - _ramp(edges, number + 1, length, edge + i + 0.5)
        for i in range(length)
    ]


def _ramp(edges: tuple[int, ...], number: int, length: int, position: float) -> float:
    """Return how far a position is in the overlap of a tile and the one before it, 0 to 1."""
    if number == 0:
        return 1.0
    if number == len(edges):
        return 0.0
    start, stop = edges[number], edges[number - 1] + length
    return min(1.0, max(0.0, (position - start) / (stop - start)))
