"""Initial weights: the network computes the best linear velocity, and training keeps x_t gated by t."""

from __future__ import annotations

import pytest
import torch

from engines.bundled import dct
from engines.bundled.decoder import CONFIG
from engines.pid import PidDecoder
from engines.training import flow
from engines.training.flow import expected_error
from engines.training.initialise import XT, XT_CHANNELS, decode_mean, freeze_noise_paths
from engines.training.learner import Learner
from engines.training.linear_velocity import RESIDUAL_RMS, velocity_gate, velocity_scale


def expected(t: float) -> float:
    """Mean square error of the linear velocity if that of the linear decode is RESIDUAL_RMS²."""
    return expected_error(torch.tensor(t), torch.tensor(RESIDUAL_RMS**2)).item()


@pytest.mark.parametrize("t", [1.0, 0.999, 0.866, 0.634, 0.342, 0.1, 0.03])
@torch.no_grad()
def test_an_initial_network_computes_the_linear_velocity(decoder: PidDecoder, image: torch.Tensor, t: float) -> None:
    latent, times = torch.randn(2, dct.CHANNELS, 4, 4), torch.full((2,), t)
    x = flow.diffuse(image, times, torch.randn_like(image))
    velocity = decoder.velocity(x, times, flow.condition(decoder, latent), 0.0)
    f = decode_mean(decoder, latent, torch.zeros(2))
    expected_velocity = x + velocity_gate(times[0]) * ((1 + velocity_scale(times[0])) * x - f)
    assert (velocity - expected_velocity).square().mean() < 0.05 * expected(t)


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1, 0.03])
def test_the_formula_is_the_best_linear_velocity(t: float) -> None:
    time, residual = torch.tensor(t), RESIDUAL_RMS * torch.randn(200_000)  # of x0 around the linear decode, here 0
    noise = torch.randn_like(residual)
    x = (1 - time) * residual + time * noise

    def error(gate: float, scale: float) -> float:
        return (x + gate * (1 + scale) * x - (noise - residual)).square().mean().item()

    gate, scale = velocity_gate(time).item(), velocity_scale(time).item()
    assert error(gate, scale) == pytest.approx(expected(t), rel=0.02)
    assert error(gate, scale) < min(error(gate, scale + 0.1), error(gate, scale - 0.1))


def test_patches_see_frequencies_of_x_that_the_latent_lacks(decoder: PidDecoder) -> None:
    seen = decoder.s_embedder.proj.weight[XT].detach()  # [32, 3·256]
    torch.testing.assert_close(seen @ seen.T, torch.eye(XT_CHANNELS), atol=1e-5, rtol=0)
    encoded = dct.encode(dct.downscale(seen.view(XT_CHANNELS, 3, 16, 16)))  # [32, 16, 1, 1]
    assert (torch.tensor(dct.SCALES) * encoded.flatten(1)).abs().max() < 0.1


def test_training_keeps_noise_out_of_the_image_channels(decoder: PidDecoder, image: torch.Tensor) -> None:
    freeze_noise_paths(decoder, pixel_modulation=True)
    learner = Learner(decoder, 1e-3)
    latent, times = dct.encode(dct.downscale(image)), torch.full((2,), 0.1)
    for _ in range(3):
        noise = torch.randn_like(image)
        velocity = decoder.velocity(flow.diffuse(image, times, noise), times, flow.condition(decoder, latent), 0.0)
        learner.update((velocity - noise + image).square().mean(), 1.0)
    rows = decoder.s_embedder.proj.weight.abs().amax(dim=1)  # [D]
    assert rows[XT].min() > 0
    assert rows[: XT.start].max() == rows[XT.stop :].max() == 0
    modulation = decoder.pixel_blocks[0].adaLN_modulation[0].weight.unflatten(0, (256, 6, CONFIG.pixel_channels))
    scale_and_gate = modulation[:, 4:, :3]  # [256, 2, 3, D]
    assert scale_and_gate[..., : XT.start].abs().max() == 0
    assert scale_and_gate[..., XT].abs().max() > 0
