"""The chroma noise metric: known values, and what it ignores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engines.bundled import dct
from engines.training import metrics


def rgb(ycbcr: Tensor) -> Tensor:
    """Convert [B, 3, H, W] from YCbCr."""
    return torch.einsum("cy,byhw->bchw", torch.linalg.inv(dct.ycbcr()), ycbcr.double()).float()


def ycbcr_image(luma_noise: float, chroma_noise: float, seed: int = 0) -> Tensor:
    """Return YCbCr noise of these standard deviations, [1, 3, 64, 64]."""
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([luma_noise, chroma_noise, chroma_noise])[:, None, None]


def test_three_times_the_chroma_is_nine_times_the_energy() -> None:
    original, louder = ycbcr_image(0.005, 0.01), ycbcr_image(0.005, 0.03)
    assert metrics.chroma_noise(rgb(original), rgb(original)) == 1
    assert metrics.chroma_noise(rgb(louder), rgb(original)) == pytest.approx(9, rel=1e-3)


def test_luma_noise_and_slow_changes_of_chroma_do_not_count() -> None:
    original = ycbcr_image(0.005, 0.01)
    changed = original + ycbcr_image(0.2, 0, seed=1)
    changed[:, 1] += torch.linspace(-0.3, 0.3, 64)
    changed[:, 2] += torch.linspace(-0.3, 0.3, 64)[:, None]
    assert metrics.chroma_noise(rgb(changed), rgb(original)) == pytest.approx(1, rel=1e-3)


def test_only_flat_areas_of_the_original_count() -> None:
    original = ycbcr_image(0.005, 0.01)
    original[..., 32:] += ycbcr_image(0.2, 0, seed=1)[..., 32:]
    in_texture, in_flat = original.clone(), original.clone()
    in_texture[:, 1:, :, 36:] *= 10  # boxes of flat pixels end before column 35
    in_flat[:, 1:, :, :28] *= 10
    assert metrics.chroma_noise(rgb(in_texture), rgb(original)) == pytest.approx(1, rel=1e-3)
    assert metrics.chroma_noise(rgb(in_flat), rgb(original)) > 50


def test_an_image_without_noise_does_not_make_the_ratio_infinite() -> None:
    original = torch.cat((torch.zeros(1, 3, 64, 64), ycbcr_image(0.005, 0.01)))
    decoded = torch.cat((ycbcr_image(0.005, 0.01, seed=1), original[1:]))
    assert metrics.chroma_noise(rgb(decoded), rgb(original)) == pytest.approx(2, rel=0.1)


def test_it_is_nan_if_nothing_is_flat(image: Tensor) -> None:
    assert math.isnan(metrics.chroma_noise(image, image))
