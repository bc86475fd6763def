"""The closed-form start of the pixel network is a good linear decoder that uses sigma."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from engines.bundled import dct
from engines.training import flow, metrics, photos
from engines.training.pixel_network import PixelNetwork


@pytest.fixture
def crops(smooth_photos: list[np.ndarray]) -> torch.Tensor:
    """Crops that were not in the fit, [4, 3, 128, 128]."""
    return photos.random_crops(smooth_photos, 4, (128, 128), np.random.default_rng(1))


@torch.no_grad()
def test_it_beats_bicubic(linear_network: PixelNetwork, crops: torch.Tensor) -> None:
    latent = dct.encode(dct.downscale(crops))
    decoded = linear_network(latent, torch.zeros(4))
    assert metrics.psnr(decoded, crops) > metrics.psnr(metrics.bicubic(latent), crops)


@torch.no_grad()
def test_the_true_sigma_improves_noised_images(linear_network: PixelNetwork, crops: torch.Tensor) -> None:
    latent = dct.encode(dct.downscale(crops))
    noisy = flow.diffuse(latent, 0.4, torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)))
    right, zero = (metrics.psnr(linear_network(noisy, torch.full((4,), sigma)), crops) for sigma in (0.4, 0.0))
    assert right > zero + 3


@torch.no_grad()
def test_the_coarse_part_has_the_best_strength_behind_its_gate(
    linear_network: PixelNetwork, smooth_photos: list[np.ndarray]
) -> None:
    """That is for all noise levels together, with errors in YCbCr, relative to what is expected."""
    image = photos.random_crops(smooth_photos, 16, (128, 128), np.random.default_rng(1), photos.CANDIDATES)
    latent, sigma = dct.encode(dct.downscale(image)), torch.linspace(0.2, flow.SIGMA_MAX, 16)
    noisy = flow.diffuse(latent, sigma, torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)))
    network = copy.deepcopy(linear_network)
    network.fine.zero_()
    unit = flow.pixel_residual(noisy, sigma).sqrt()
    part, best = (
        torch.einsum("ij,bjhw->bihw", dct.ycbcr().float(), pixels / unit) for pixels in (network(noisy, sigma), image)
    )
    assert (part * best).sum() / part.square().sum() == pytest.approx(1, abs=0.045)


@torch.no_grad()
def test_it_is_linear_and_residual_blocks_do_nothing(linear_network: PixelNetwork) -> None:
    one, other = torch.randn(2, 1, dct.CHANNELS, 2, 3)
    torch.testing.assert_close(
        linear_network.features(one) + linear_network.features(other),
        linear_network.features(one + other),
        atol=1e-4,
        rtol=0,
    )
    for block in linear_network.blocks:
        features = torch.randn(1, 16, 8, 12)
        assert torch.equal(block(features), features)
