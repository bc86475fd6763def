"""The latent space `dct`: the low frequencies of JPEG's transform, on 4×4 blocks of the low-resolution picture.

A latent cell holds one block: 10 luma and 3 + 3 chroma coefficients, 16 channels, each scaled to about unit variance.
Decoding at upscale 4 makes one 16×16 patch of every cell. It stands in for a learned autoencoder: a real latent, a
third of the picture's numbers, that needs no weights.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.errors import InputError

BLOCK = 4  # pixels of the low-resolution picture along one cell
UPSCALE = 4  # output pixels along one of those
# (vertical, horizontal) frequencies in zigzag order: all with a sum below BLOCK for luma, the first three for chroma.
_ZIGZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
_KEPT = (_ZIGZAG, _ZIGZAG[:3], _ZIGZAG[:3])  # of Y, Cb, Cr
CHANNELS = sum(map(len, _KEPT))
MEANS = (0, 10, 13)  # the channels that hold a block's mean: of Y, Cb, Cr
# Root mean square of each coefficient over the training photos, by `python -m engines.training.photos --measure`.
SCALES = (
    *(1.85, 0.27, 0.279, 0.134, 0.135, 0.13, 0.073, 0.085, 0.086, 0.075),
    *(0.962, 0.096, 0.088),
    *(0.864, 0.083, 0.088),
)


@cache
def basis(side: int = BLOCK) -> Tensor:
    """Orthonormal DCT-II of that many values, [frequency, position] float64."""
    position = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    rows = torch.cos(math.pi * torch.arange(side, dtype=torch.float64)[:, None] * position)
    rows[0] /= math.sqrt(2)
    return rows * math.sqrt(2 / side)


@cache
def ycbcr() -> Tensor:
    """RGB to YCbCr, BT.601 full range as in JPEG, [3, 3] float64; chroma is centred on 0, so there is no offset."""
    red, blue = 0.299, 0.114
    luma = torch.tensor([red, 1 - red - blue, blue], dtype=torch.float64)
    unit = torch.eye(3, dtype=torch.float64)
    return torch.stack((luma, (unit[2] - luma) / (2 * (1 - blue)), (unit[0] - luma) / (2 * (1 - red))))


@cache
def _analysis() -> Tensor:
    """Block of RGB to unscaled coefficients, [CHANNELS, 3, BLOCK, BLOCK]; its rows are orthogonal within a plane."""
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
    """Unscaled coefficients back to a block of RGB, [CHANNELS, 3, BLOCK, BLOCK]."""
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
    """A full-size picture [B, 3, H, W] to the low-resolution one [B, 3, H/4, W/4], by averaging 4×4 pixels."""
    return F.avg_pool2d(image, UPSCALE)


def encode(image: Tensor) -> Tensor:
    """RGB in [-1, 1], low resolution, float [B, 3, H, W] -> latent of the same dtype [B, 16, H/4, W/4].

    Raises InputError where a side is not a multiple of 4.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % BLOCK or image.shape[3] % BLOCK:
        raise InputError(
            f"The dct latent space takes pictures [B, 3, H, W] with sides that are multiples of {BLOCK}, "
            f"got {list(image.shape)}."
        )
    return F.conv2d(image, (_analysis() / _scales()).to(image), stride=BLOCK)


def decode(latent: Tensor) -> Tensor:
    """Latent [B, 16, h, w] -> low-resolution RGB [B, 3, 4h, 4w], not clamped; the dropped coefficients are zero."""
    if latent.ndim != 4 or latent.shape[1] != CHANNELS:
        raise InputError(f"The dct latent space has latents [B, {CHANNELS}, h, w], got {list(latent.shape)}.")
    return F.conv_transpose2d(latent, (_synthesis() * _scales()).to(latent), stride=BLOCK)
