"""Luma, and the sharpening of the student's target."""

from __future__ import annotations

import torch

from engines.bundled import dct
from engines.training import metrics
from engines.training.luma import CENTRE, STRENGTH, SURROUND, luma, sharpen


def test_luma_is_that_of_the_latent_space(image: torch.Tensor) -> None:
    ycbcr = torch.einsum("ij,bjhw->bihw", dct.ycbcr().float(), image)
    torch.testing.assert_close(luma(image), ycbcr[:, :1])
    grey = image[:, :1].expand_as(image)
    torch.testing.assert_close(luma(grey), image[:, :1])


def test_sharpening_keeps_chroma_and_flat_areas(image: torch.Tensor) -> None:
    torch.testing.assert_close(sharpen(image) - luma(sharpen(image)), image - luma(image), atol=1e-5, rtol=0)
    flat = torch.full_like(image, 0.3)
    torch.testing.assert_close(sharpen(flat), flat)


def test_sharpening_has_the_stated_frequency_response() -> None:
    """On a wave along one axis, a Gaussian window of deviation d has the response exp(−(2π·f·d)²/2)."""
    for frequency in (1 / 32, 1 / 16, 1 / 8):
        wave = torch.cos(2 * torch.pi * frequency * torch.arange(96)).expand(1, 3, 96, 96)
        centre, surround = (torch.tensor(-((2 * torch.pi * frequency * d) ** 2) / 2).exp() for d in (CENTRE, SURROUND))
        inside = (..., slice(32, 64), slice(32, 64))
        expected = (centre + STRENGTH * (centre - surround)) * wave
        torch.testing.assert_close(sharpen(wave)[inside], expected[inside], atol=0.02, rtol=0)


def test_a_sharpened_blur_is_sharper_and_the_steps_of_large_pixels_disappear() -> None:
    blocks = torch.rand(1, 3, 16, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert metrics.grid(sharpen(blocks)) < 0.5 * metrics.grid(blocks + 1e-3 * torch.randn_like(blocks))
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), scale_factor=4, mode="bicubic")
    assert metrics.gradient_energy(sharpen(smooth)) > 1.2 * metrics.gradient_energy(smooth)
