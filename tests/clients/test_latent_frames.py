"""The conversions of `pid_client.frames`, compared with the functions of diffusers that they invert or repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
)

from pid_client import frames
from tests.clients.tiny_pipelines import create

pytestmark = pytest.mark.clients

HEIGHT, WIDTH = 48, 80  # pixels; 6×10 cells


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def assert_equal(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (HEIGHT + 9, WIDTH + 15)])
class TestPacking:
    def test_flux(self, height: int, width: int):
        tokens = random(2, 15, 64)
        assert_equal(frames.unpack(tokens, height, width), FluxPipeline._unpack_latents(tokens, height, width, 8))

    def test_qwenimage(self, height: int, width: int):
        tokens = random(2, 15, 64)
        video = QwenImagePipeline._unpack_latents(tokens, height, width, 8)
        assert_equal(frames.unpack(tokens, height, width), video[:, :, 0])
        assert_equal(frames.drop_frame(video), video[:, :, 0])

    def test_flux2(self, height: int, width: int):
        latents = random(2, 128, 3, 5)
        tokens, ids = Flux2Pipeline._pack_latents(latents), Flux2Pipeline._prepare_latent_ids(latents)
        assert_equal(frames.unpack_cells(tokens, height, width), latents)
        assert_equal(frames.unpack_cells(tokens, height, width), Flux2Pipeline._unpack_latents_with_ids(tokens, ids))


@pytest.mark.parametrize("pipeline", [Flux2Pipeline, Flux2KleinPipeline])
def test_patchify(pipeline: Any):
    raw = random(2, 32, 6, 10)
    assert_equal(frames.patchify(raw), pipeline._patchify_latents(raw))


def test_batch_norm():
    vae = create("FLUX.2 klein").pipe.vae
    latents = random(2, 128, 3, 5)
    expected = vae.bn(latents)  # in evaluation mode
    assert_equal(frames.batch_norm(latents, vae.bn.running_mean, vae.bn.running_var), expected)
    assert vae.config.batch_norm_eps == vae.bn.eps == 1e-4


def scaled(z: torch.Tensor, config: Any) -> torch.Tensor:
    return (z - (config.shift_factor or 0)) * config.scaling_factor


def standardised(z: torch.Tensor, config: Any) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return (z - mean) / std


@pytest.mark.parametrize(
    ("name", "space", "channels", "expected"),
    [
        ("FLUX.1", "flux", 16, scaled),
        ("SD3", "sd3", 16, scaled),
        ("SDXL", "sdxl", 4, scaled),
        ("Qwen-Image", "qwenimage", 16, standardised),
    ],
)
def test_normalisation(name: str, space: str, channels: int, expected: Callable[..., torch.Tensor]):
    raw = random(2, channels, 6, 10)
    assert_equal(frames.normalise(raw, space), expected(raw, create(name).pipe.vae.config))


def test_the_euler_frame_is_scaled_as_the_input_of_the_network():
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for step in range(30):
        scheduler.set_timesteps(30)
        scheduler.set_begin_index(step)
        sigma = float(scheduler.sigmas[step])
        latents = random(1, 4, 6, 10) * (1 + sigma)
        converted, vp_sigma = frames.vp_from_euler(latents, sigma)
        assert_equal(converted, scheduler.scale_model_input(latents, scheduler.timesteps[step]))
        assert vp_sigma == pytest.approx(sigma / (sigma**2 + 1) ** 0.5)
