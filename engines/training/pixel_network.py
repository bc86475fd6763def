"""A small convolutional network that fits into the adapter, and from which training starts.

It works on single pixels of the low-resolution image. The decoder's adapter works on cells of 4×4 such pixels, and its
convolutions have separate weights for every position in a cell, so it would need far more photos to learn the same.
Each layer here is a special case of a layer there: a convolution over pixels within a radius of four is also a
convolution over 3×3 cells (`cell_kernel`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.bundled import dct
from engines.bundled.decoder import CONFIG
from engines.training.luma import to_ycbcr

CELL = dct.BLOCK
CELL_PIXELS = CELL * CELL
CHANNELS = CONFIG.adapter_width // CELL_PIXELS  # per pixel
FIRST_RADIUS, SECOND_RADIUS, RADIUS = 2, 4, 1  # of the first two convolutions, and of those in residual blocks
SUBPIXELS = 3 * dct.UPSCALE * dct.UPSCALE  # output values of a pixel, in YCbCr


class Gate(NamedTuple):
    """Initial parameters of a sigma-aware gate, sigmoid(bias − exp(log_alpha)·sigma)."""

    bias: float
    log_alpha: float

    def openness(self, sigma: Tensor) -> Tensor:
        """Return the value of the gate relative to that at sigma 0."""
        logit = torch.as_tensor(self.bias)
        return torch.sigmoid(logit - math.exp(self.log_alpha) * sigma) / torch.sigmoid(logit)


FINE_GATE, COARSE_GATE = Gate(3.0, 2.7), Gate(2.0, 0.0)


def planes(latent: Tensor) -> Tensor:
    """Decode a latent [B, 16, h, w] to the YCbCr planes of its low-resolution image, [B, 3, 4h, 4w]."""
    return to_ycbcr(dct.decode(latent))


def pad_cells(x: Tensor, radius: int) -> Tensor:
    """Pad by repeating the outer cells, not the outer pixels, because the adapter does so."""
    after = slice(-CELL, radius - CELL or None)  # the first pixels of the last cell
    x = torch.cat((x[..., CELL - radius : CELL, :], x, x[..., after, :]), dim=-2)
    return torch.cat((x[..., CELL - radius : CELL], x, x[..., after]), dim=-1)


class PixelConv(nn.Module):
    """Convolution whose bias depends on the position of the pixel in its cell."""

    def __init__(self, inputs: int, outputs: int, radius: int) -> None:
        super().__init__()
        side = 2 * radius + 1
        self.radius = radius
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side) / math.sqrt(inputs * side * side))
        self.bias = nn.Parameter(torch.zeros(outputs, CELL, CELL))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H, W]."""
        x = F.conv2d(pad_cells(x, self.radius), self.weight)
        return x + self.bias.tile(1, x.shape[2] // CELL, x.shape[3] // CELL)


class PixelResidualBlock(nn.Module):
    """The adapter's residual block, over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(4, CHANNELS),
            nn.SiLU(),
            PixelConv(CHANNELS, CHANNELS, RADIUS),
            nn.GroupNorm(4, CHANNELS),
            nn.SiLU(),
            PixelConv(CHANNELS, CHANNELS, RADIUS),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return x + self.block(x)


class PixelNetwork(nn.Module):
    """Estimates an image from its latent: the sum of a fine and a coarse part, each behind a sigma-aware gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PixelConv(3, CHANNELS, FIRST_RADIUS)
        self.second = PixelConv(CHANNELS, CHANNELS, SECOND_RADIUS)
        self.blocks = nn.Sequential(*(PixelResidualBlock() for _ in range(CONFIG.adapter_depth)))
        self.fine, self.coarse = (nn.Parameter(torch.randn(SUBPIXELS, CHANNELS)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(SUBPIXELS, CELL, CELL))

    def features(self, latent: Tensor) -> Tensor:
        """Return the features of all pixels, before the gates: [B, 16, h, w] -> [B, C, 4h, 4w]."""
        return self.blocks(self.second(F.silu(self.first(planes(latent)))))

    def forward(self, latent: Tensor, sigma: Tensor) -> Tensor:
        """Map latents [B, 16, h, w] with noise levels [B] to images [B, 3, 16h, 16w]."""
        return self.decode(self.features(latent), sigma)

    def decode(self, features: Tensor, sigma: Tensor) -> Tensor:
        """Map features [B, C, H, W] of latents with noise levels [B] to images [B, 3, 4H, 4W]."""
        fine, coarse = (gate.openness(sigma).view(-1, 1, 1, 1) for gate in (FINE_GATE, COARSE_GATE))
        both = torch.cat((fine * features, coarse * features), dim=1)
        values = F.conv2d(both, torch.cat((self.fine, self.coarse), dim=1)[..., None, None])
        return to_image(values + self.bias.tile(1, features.shape[2] // CELL, features.shape[3] // CELL))


def to_image(values: Tensor) -> Tensor:
    """Arrange the output values of pixels [B, 48, H, W] to an RGB image [B, 3, 4H, 4W]."""
    to_rgb = torch.linalg.inv(dct.ycbcr()).to(values)
    return torch.einsum("ij,bjhw->bihw", to_rgb, F.pixel_shuffle(values, dct.UPSCALE))


def cell_kernel(weight: Tensor) -> Tensor:
    """Return the convolution over 3×3 cells that equals one over pixels: [O, I, k, k] -> [16·O, 16·I, 3, 3].

    Channels of a cell are in the order of `F.pixel_unshuffle`, so that groups of a group norm stay together.
    """
    radius = weight.shape[-1] // 2
    position, offset = torch.arange(CELL), torch.arange(-radius, radius + 1)
    # taps[p, q, n, k]: whether pixel p reads, with tap k, pixel q of the neighbouring cell n.
    distance = position[:, None, None] * -1 + position[:, None] + CELL * torch.arange(-1, 2)
    taps = (distance[..., None] == offset).to(weight)
    kernel = torch.einsum("oiyx,pqny,rsmx->opriqsnm", weight, taps, taps)
    return kernel.flatten(3, 5).flatten(0, 2)


def plane_patches() -> Tensor:
    """Return the maps from the latent of a cell to its pixels in YCbCr, [3·16, 16 channels]."""
    latents = torch.eye(dct.CHANNELS, dtype=torch.float64)[..., None, None]
    return planes(latents).flatten(1).T


def output_map(head: Tensor) -> Tensor:
    """Return the map from the features of a cell to its patch of the image: head [48, C] -> [16·C, 3·256]."""
    features = torch.eye(CELL_PIXELS * head.shape[1], dtype=head.dtype).unflatten(1, (-1, CELL, CELL))
    return to_image(torch.einsum("vc,ncij->nvij", head, features)).flatten(1)
