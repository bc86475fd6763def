"""Luma and chroma of images, and sharpening."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.bundled import dct

STRENGTH = 1.0  # of sharpening
CENTRE, SURROUND = 0.6, 2.0  # standard deviations of its two Gaussian windows, in pixels
_RADIUS = 6


def to_ycbcr(image: Tensor) -> Tensor:
    """Convert RGB images [B, 3, H, W] to YCbCr, in their dtype."""
    return torch.einsum("ij,bjhw->bihw", dct.ycbcr().to(image), image)


def luma(image: Tensor) -> Tensor:
    """Return the luma of RGB images: [B, 3, H, W] -> [B, 1, H, W]."""
    return to_ycbcr(image)[:, :1]


def sharpen(image: Tensor) -> Tensor:
    """Sharpen the luma of images [B, 3, H, W]; their chroma does not change.

    STRENGTH times the difference of both windows is added to the luma under the narrow window. The narrow window
    removes the steps between low-resolution pixels, which the mean of many possible images has and a photo has not.
    """
    values = luma(image)
    centre, surround = (_blur(values, deviation) for deviation in (CENTRE, SURROUND))
    return image + (centre + STRENGTH * (centre - surround) - values)


def _blur(values: Tensor, deviation: float) -> Tensor:
    """Convolve planes [B, 1, H, W] with a Gaussian window."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=values.dtype, device=values.device)
    window = torch.softmax(-offsets.square() / (2 * deviation**2), dim=0)
    padded = F.pad(values, (_RADIUS,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
