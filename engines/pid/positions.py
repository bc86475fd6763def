"""Position tables: rotary for tokens, sine-cosine for pixels. They depend only on the sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engines.pid.config import PATCH, ROW_LIMIT, PidConfig
from engines.size import Size

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each [N, head width / 2], float32
PixelPositions = tuple[Tensor, Tensor]  # by row [rows, 1, 16, 1, C/2] and by column [columns, 1, 16, C/2], float32


def image_rotary(
    grid: tuple[int, int], head_width: int, reference: Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute rotary angles of the image tokens: channel pairs alternately rotate by column and row.

    Positions span 0..16 inclusive for any grid. The base grows with the grid, separately per axis (NTK-aware scaling).

    Args:
        grid: Rows and columns of tokens.
        head_width: Channels per attention head.
        reference: Image size in pixels at which the base is 10000.
        device: Device of the tables.

    Returns:
        Cosines and sines, each [rows, columns, head_width/2] float32.
    """
    rows, columns = grid
    half = head_width // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float64, device=device) / half  # [d/4], = 4j/d

    def axis(count: int, reference_pixels: int) -> Tensor:
        base = 10000.0 * (count * PATCH / reference_pixels) ** (half / (half - 2))
        positions = torch.linspace(0, 16, count, dtype=torch.float64, device=device)
        return positions[:, None] * base**-exponents  # [count, d/4]

    by_row = axis(rows, reference.height)[:, None].expand(rows, columns, -1)
    by_column = axis(columns, reference.width)[None].expand(rows, columns, -1)
    angles = torch.stack((by_column, by_row), dim=-1).flatten(-2)  # [rows, columns, d/2]
    return angles.cos().float(), angles.sin().float()


def caption_rotary(tokens: int, head_width: int, device: torch.device) -> Rotary:
    """Compute rotary angles of the caption tokens, [tokens, head_width/2], at positions 0, 1, 2, …."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float64, device=device) / head_width
    angles = torch.arange(tokens, dtype=torch.float64, device=device)[:, None] * 10000.0**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate adjacent channel pairs of x [B, N, heads, d] by their angles, in float32; keeps the dtype of x."""
    cos, sin = (table[:, None] for table in rotary)  # [N, 1, d/2]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, heads, d/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def pixel_axis(count: int, channels: int, device: torch.device) -> Tensor:
    """Compute sine-cosine positions of the pixels along one axis, [count, channels] float32: sines, then cosines.

    Coordinates are clamped to the trained range, because the network shifts colours beyond it.
    """
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64, device=device) / (channels // 2))
    positions = torch.arange(count, dtype=torch.float64, device=device).clamp(max=ROW_LIMIT)
    angles = positions[:, None] * frequencies  # [count, channels/2]
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def pixel_positions(positions: PixelPositions, dtype: torch.dtype) -> Tensor:
    """Combine the positions of pixels by row and by column, [L, 256, C].

    The result is as large as the pixel features of one image; compiled, it is computed where it is used.
    """
    by_row, by_column = (table.to(dtype) for table in positions)
    by_both = torch.broadcast_tensors(by_column, by_row)  # each [rows, columns, 16, 16, C/2]
    return torch.cat(by_both, dim=-1).flatten(2, 3).flatten(0, 1)


class Geometry(NamedTuple):
    """Position tables of one output size, float32: inputs of the step graph, which therefore serves all sizes."""

    image_cos: Tensor  # [R, C, d/2], rotary angles of the image tokens in the patch blocks
    image_sin: Tensor
    pixel_cos: Tensor  # [R, C, d/2], the same for the pixel blocks, whose heads have another width
    pixel_sin: Tensor
    row_positions: Tensor  # [H, C/2], of the pixels
    column_positions: Tensor  # [W, C/2]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, columns, _ = self.image_cos.shape
        return rows, columns

    @property
    def image(self) -> Rotary:
        """Rotary tables of the patch blocks, [R·C, d/2]."""
        return self.image_cos.flatten(0, 1), self.image_sin.flatten(0, 1)

    @property
    def pixel_tokens(self) -> Rotary:
        """Rotary tables of the pixel blocks, [R·C, d/2]."""
        return self.pixel_cos.flatten(0, 1), self.pixel_sin.flatten(0, 1)

    @property
    def pixels(self) -> PixelPositions:
        """Positions of the pixels by row and by column."""
        by_row, by_column = (table.unflatten(0, (-1, PATCH)) for table in (self.row_positions, self.column_positions))
        return by_row[:, None, :, None], by_column[:, None]


def make_geometry(config: PidConfig, size: Size, device: torch.device) -> Geometry:
    """Compute the position tables of an output size."""
    grid, half = (size.height // PATCH, size.width // PATCH), config.pixel_channels // 2
    return Geometry(
        *image_rotary(grid, config.head_width, config.rope_reference, device),
        *image_rotary(grid, config.pixel_head_width, config.rope_reference, device),
        pixel_axis(size.height, half, device),
        pixel_axis(size.width, half, device),
    )
