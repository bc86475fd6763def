"""Conversion between 8-bit pixels and images in [-1, 1], the range that the networks use."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(image: Tensor) -> Tensor:
    """Round an image in [-1, 1] to uint8 in [0, 255]; same shape and device. Values outside [-1, 1] are clipped."""
    return to_levels_(image.clone()).to(torch.uint8)


def to_levels_(image: Tensor) -> Tensor:
    """Replace an image in [-1, 1] with what `to_uint8` returns, in the dtype of the image, and return it."""
    return image.clamp_(-1, 1).add_(1).mul_(127.5).round_()


def from_uint8(pixels: Tensor) -> Tensor:
    """Map uint8 pixels [..., H, W, C] to a float32 image [..., C, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1
