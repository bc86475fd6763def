"""Losses weigh errors by what is expected, and noise and times cover the trained range."""

from __future__ import annotations

import pytest
import torch

from engines.bundled import dct
from engines.training import flow
from engines.training.flow import SIGMA_MAX, expected_error


def test_errors_across_patch_borders_count_more() -> None:
    def error(column: int) -> float:
        step = torch.zeros(1, 3, 64, 64)
        step[..., column:] = 1.0
        return flow.image_error(step - step.mean()).item()

    assert error(32) > 1.2 * error(31)


def test_the_residual_is_larger_in_texture_and_under_noise(image: torch.Tensor) -> None:
    rough, flat, zero = dct.encode(dct.downscale(image)), torch.zeros(2, dct.CHANNELS, 4, 4), torch.zeros(2)
    assert (flow.residual(rough, zero) > 20 * flow.residual(flat, zero)).all()
    assert (flow.residual(flat, zero + 0.4) > flow.residual(rough, zero)).all()
    half = torch.cat((rough[..., :2], flat[..., :2]), dim=3)
    steps = flow.pixel_residual(half, zero).diff(dim=3).abs()
    assert steps.max() < 0.1 * flow.residual(half, zero).max()  # no steps between cells


def test_an_error_of_the_expected_size_costs_the_same_everywhere() -> None:
    """The cost is the same in a sky and in a lawn, at small and at large t."""
    losses = []
    for t, residual in ((0.1, 1e-3), (0.1, 1e-1), (0.9, 1e-3), (0.9, 1e-1)):
        time, pixels = torch.full((1,), t), torch.full((1, 1, 64, 64), residual)
        error = expected_error(time, pixels).sqrt() * torch.ones(1, 3, 64, 64)
        losses.append(flow.velocity_loss(error, time, pixels).item())
    assert losses == pytest.approx([1.0] * 4)


def test_noise_and_timesteps_cover_the_trained_range() -> None:
    torch.manual_seed(0)
    latent, sigma = flow.noise_random_share(torch.ones(1000, dct.CHANNELS, 2, 2))
    assert 0 < sigma.max() <= SIGMA_MAX
    assert 0.6 < (sigma == 0).float().mean() < 0.8
    assert torch.equal(latent[sigma == 0], torch.ones_like(latent[sigma == 0]))
    assert (latent[sigma > 0.7] - 1).std() > 0.5
    t = flow.random_timesteps(1000, torch.device("cpu"))
    assert t.min() >= 0.02
    for used in (0.999, 0.866, 0.634, 0.342, 1.0):
        assert 0.03 < (t == used).float().mean() < 0.08
