"""The latent space `dct`: low frequencies of a block DCT as in JPEG, on 4×4 blocks of the low-resolution image.

A latent cell holds one block: 10 luma and 3 + 3 chroma coefficients, 16 channels, each scaled to about unit variance.
At upscale 4, each cell decodes to one 16×16 patch. The transform replaces a learned autoencoder: it keeps a
third of the image's values and needs no weights.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.errors import InputError

BLOCK = 4  # side of a cell, in pixels of the low-resolution image
UPSCALE = 4  # side of a low-resolution pixel, in output pixels
# (vertical, horizontal) frequencies in zigzag order: all with a sum below BLOCK for luma, the first three for chroma.
_ZIGZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
_KEPT = (_ZIGZAG, _ZIGZAG[:3], _ZIGZAG[:3])  # frequencies kept of Y, Cb, Cr
CHANNELS = sum(map(len, _KEPT))
DC_CHANNELS = (0, 10, 13)  # the block's mean of Y, Cb and Cr
# Root mean square of each coefficient, which `engines.training.photos --measure` prints for the training photos. These
# values are part of the latent space and stay as they are if the photos change.
SCALES = (
    *(1.85, 0.27, 0.279, 0.134, 0.135, 0.13, 0.073, 0.085, 0.086, 0.075),
    *(0.962, 0.096, 0.088),
    *(0.864, 0.083, 0.088),
)


@cache
def basis(side: int = BLOCK) -> Tensor:
    """Return the orthonormal DCT-II matrix [frequency, position] for `side` values, float64."""
    position = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    rows = torch.cos(math.pi * torch.arange(side, dtype=torch.float64)[:, None] * position)
    rows[0] /= math.sqrt(2)
    return rows * math.sqrt(2 / side)


@cache
def ycbcr() -> Tensor:
    """Return the RGB to YCbCr matrix [3, 3], float64: BT.601 full range as in JPEG, chroma centred on 0."""
    red, blue = 0.299, 0.114
    luma = torch.tensor([red, 1 - red - blue, blue], dtype=torch.float64)
    unit = torch.eye(3, dtype=torch.float64)
    return torch.stack((luma, (unit[2] - luma) / (2 * (1 - blue)), (unit[0] - luma) / (2 * (1 - red))))


@cache
def _analysis() -> Tensor:
    """Return the map from an RGB block to unscaled coefficients, [CHANNELS, 3, BLOCK, BLOCK]."""
    waves, colour = basis(), ycbcr()
    return torch.stack(
        [
            colour[plane][:, None, None] * waves[v][:, None] * waves[u]
            for plane, kept in enumerate(_KEPT)
            for v, u in kept
        ]
    )


@cache
def _synthesis() -> Tensor:
    """Return the map from unscaled coefficients to an RGB block, [CHANNELS, 3, BLOCK, BLOCK]."""
    waves, colour = basis(), torch.linalg.inv(ycbcr())
    return torch.stack(
        [
            colour[:, plane][:, None, None] * waves[v][:, None] * waves[u]
            for plane, kept in enumerate(_KEPT)
            for v, u in kept
        ]
    )


def _scales() -> Tensor:
    return torch.tensor(SCALES, dtype=torch.float64)[:, None, None, None]


def downscale(image: Tensor) -> Tensor:
    """Average 4×4 pixels: image [B, 3, H, W] -> low-resolution image [B, 3, H/4, W/4]."""
    return F.avg_pool2d(image, UPSCALE)


def encode(image: Tensor) -> Tensor:
    """Encode a low-resolution RGB image [B, 3, H, W] in [-1, 1] to a latent [B, 16, H/4, W/4] of the same dtype.

    Raises:
        InputError: The shape is different, or a side is not a multiple of 4.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % BLOCK or image.shape[3] % BLOCK:
        raise InputError(
            f"An image for the dct latent space must be [B, 3, H, W] with sides that are multiples of {BLOCK}, "
            f"got {list(image.shape)}."
        )
    return F.conv2d(image, (_analysis() / _scales()).to(image), stride=BLOCK)


def decode(latent: Tensor) -> Tensor:
    """Decode a latent [B, 16, h, w] to low-resolution RGB [B, 3, 4h, 4w], not clamped. Dropped coefficients are zero.

    Raises:
        InputError: The shape is different.
    """
    if latent.ndim != 4 or latent.shape[1] != CHANNELS:
        raise InputError(f"A dct latent must be [B, {CHANNELS}, h, w], got {list(latent.shape)}.")
    return F.conv_transpose2d(latent, (_synthesis() * _scales()).to(latent), stride=BLOCK)
