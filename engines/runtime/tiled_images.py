"""Images that are decoded in tiles: what the step of a tile reads from the whole image, and what it adds to it.

A step ends in x' = (1 − t')·(x − t·v) + t'·ε, which is affine in the velocity v. With ε = 0, the weighted sum of the
results of all tiles is therefore what blended velocities would give: (1 − t')·x0. The noise of the whole image is added
to that sum, so that it is the noise of an image that is decoded as a whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engines.pid.sampler import STEP_TRANSITIONS, NoiseSource
from engines.pixels import to_levels_
from engines.runtime.buffers import DeviceBuffers
from engines.runtime.protocol import RuntimeInfo, Slot, preview_factor
from engines.runtime.staging import StagedInput
from engines.runtime.tiles import TilePlan


class TileBuffers(NamedTuple):
    """Memory of one image in tiles: float32 values, at least as many as the largest image has."""

    x: Tensor
    total: Tensor
    latent: Tensor
    caption: Tensor
    weights: StagedInput  # of the current tile

    @classmethod
    def of_slot(cls, buffers: DeviceBuffers, slot: Slot) -> TileBuffers:
        """Return the memory of a slot."""
        x, total, latent, caption = (
            buffers.tensor(name)[slot] for name in ("tile x", "tile total", "tile latent", "tile caption")
        )
        return cls(x, total, latent, caption, buffers.staged("tile weights"))


class TiledImage:
    """An image in tiles between start and release. Its methods allocate at most a few scalars on the device.

    Attributes:
        plan: The tiles.
        next_tile: Number of the next tile in this step; `len(plan)` if only `end_step` is missing.
        caption: [1, T, E].
    """

    def __init__(self, plan: TilePlan, info: RuntimeInfo, buffers: TileBuffers) -> None:
        self.plan, self.next_tile, self.buffers, self._cell = plan, 0, buffers, info.cell_side
        shape = (info.latent_channels, *info.latent_size(plan.image))
        self._latent = buffers.latent[: torch.Size(shape).numel()].view(shape)
        shape = (1, info.caption_tokens, info.caption_width)
        self.caption = buffers.caption[: torch.Size(shape).numel()].view(shape)
        self._x, self._total = (
            values[: 3 * plan.image.area].view(3, *plan.image) for values in (buffers.x, buffers.total)
        )

    def start(self, noise: NoiseSource, latent: Tensor, caption: Tensor) -> None:
        """Draw the starting noise; store the latent of the whole image [c, h, w] and the caption [1, T, E]."""
        noise.draw_into(self._x)
        self._latent.copy_(latent)
        self.caption.copy_(caption)

    def read_tile(self, x: Tensor, latent: Tensor) -> None:
        """Copy the next tile of the image to `x` [3, H, W], and that of its latent to `latent` [c, h, w]."""
        x.copy_(self._tile(self._x))
        top, left = (edge // self._cell for edge in self.plan.corner(self.next_tile))
        _, height, width = latent.shape
        latent.copy_(self._latent[:, top : top + height, left : left + width])

    def add_tile(self, next_x: Tensor) -> None:
        """Add the result of a step without noise, [3, H, W], which is overwritten, and go to the next tile."""
        rows, columns = self.plan.weights(self.next_tile)
        weights = self.buffers.weights
        weights.write(torch.tensor([*rows, *columns]))
        by_row, by_column = weights.view((len(rows) + len(columns),)).split((len(rows), len(columns)))
        if self.next_tile == 0:
            self._total.zero_()
        self._tile(self._total).add_(next_x.mul_(by_row[:, None]).mul_(by_column))
        self.next_tile += 1

    def end_step(self, index: int, noise: NoiseSource) -> None:
        """Compute the next x from the sum of all tiles and the noise of the whole image, for a step index."""
        _, next_t = STEP_TRANSITIONS[index]
        if next_t > 0:
            noise.draw_into(self._x)
            self._x.mul_(next_t).add_(self._total)
        else:
            self._x.copy_(self._total)
        self.next_tile = 0

    def write_preview(self, index: int, pixels: Tensor, scratch: Tensor) -> None:
        """Write the preview after the step with this index to `pixels` [h, w, 3] uint8, as `previews.preview` does.

        Args:
            index: The step index.
            pixels: Buffer of the size `preview_size`.
            scratch: Float32 values, at least one row of the preview; they are 0 afterwards.
        """
        _, next_t = STEP_TRANSITIONS[index]
        height, width, _ = pixels.shape
        factor = preview_factor(self.plan.image)
        rows = len(scratch) // width  # at a time; a preview can be higher than a tile
        try:
            for top in range(0, height, rows):
                for colour, values in enumerate(self._total):
                    strip = values[None, top * factor : (top + rows) * factor]  # contiguous: pooling does not copy it
                    target = pixels[top : top + rows, :, colour]
                    small = scratch[: target.numel()].view(1, *target.shape)
                    torch.ops.aten.avg_pool2d(strip, (factor, factor), ceil_mode=True, out=small)
                    target.copy_(to_levels_(small.div_(1 - next_t))[0])
        finally:
            scratch.zero_()  # NaN in the noise of a last step, which multiplies it by 0, would spoil that image

    def write_pixels(self, pixels: Tensor, finite: Tensor) -> None:
        """Write the image to `pixels` [H, W, 3] uint8, and whether all its values are finite to `finite`, a bool."""
        lowest_and_highest = torch.stack(self._x.aminmax())  # NaN if one value is
        finite.copy_(lowest_and_highest.isfinite().all())
        pixels.copy_(to_levels_(self._total.copy_(self._x)).permute(1, 2, 0))

    def _tile(self, values: Tensor) -> Tensor:
        """Return the part of the next tile in values [3, H, W] of the whole image."""
        (top, left), (height, width) = self.plan.corner(self.next_tile), self.plan.tile
        return values[:, top : top + height, left : left + width]
