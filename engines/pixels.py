"""Conversion between 8-bit pixels and images in [-1, 1], the range that the networks use."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(image: Tensor) -> Tensor:
    """Round an image in [-1, 1] to uint8 in [0, 255]; same shape and device. Values outside [-1, 1] are clipped."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round_().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Map uint8 pixels [..., H, W, C] to a float32 image [..., C, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1
