"""Regression: it learns, resumes exactly, and its result is a decoder."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch

from engines.bundled import dct
from engines.pid import PidDecoder
from engines.training import flow, photos, regression
from engines.training.initialise import decode_mean
from engines.training.linear_start import start_linear
from engines.training.regression import Regression

CPU = torch.device("cpu")


@pytest.fixture
def crops(smooth_photos: list[np.ndarray]) -> torch.Tensor:
    return photos.random_crops(smooth_photos, 2, (128, 128), np.random.default_rng(1))


def step(trainer: Regression, image: torch.Tensor, seed: int = 0) -> float:
    torch.manual_seed(seed)
    (loss,) = trainer.step(image, 1.0).values()
    return loss


def test_it_learns_one_batch(crops: torch.Tensor) -> None:
    torch.manual_seed(0)
    trainer = Regression(None, CPU)
    losses = [step(trainer, crops) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_it_resumes_exactly(crops: torch.Tensor) -> None:
    trainer = Regression(None, CPU)
    step(trainer, crops)
    resumed = Regression(None, CPU)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert [step(trainer, crops, seed) for seed in (1, 2)] == [step(resumed, crops, seed) for seed in (1, 2)]
    assert torch.equal(trainer.moments, resumed.moments)
    noise = torch.zeros_like(crops)
    latent = dct.encode(dct.downscale(crops))
    assert torch.equal(trainer.decode(latent, noise, 0.2), resumed.decode(latent, noise, 0.2))


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.0, 0.003), (0.3, 0.015)])
def test_the_average_is_a_decoder_with_the_networks_mean(
    initial_decoder: PidDecoder,
    smooth_photos: list[np.ndarray],
    crops: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    sigma: float,
    tolerance: float,
) -> None:
    """It is one after a few steps already, although the moments of the features are an average over all steps."""
    monkeypatch.setattr(regression, "start_linear", partial(start_linear, batches=2))
    monkeypatch.setattr(
        regression, "initialise_velocity", lambda decoder: decoder.load_state_dict(initial_decoder.state_dict())
    )
    torch.manual_seed(0)
    trainer = Regression(smooth_photos, CPU)
    for seed in range(5):
        step(trainer, crops, seed)
    latent = flow.diffuse(dct.encode(dct.downscale(crops)), sigma, torch.randn(2, dct.CHANNELS, 8, 8))
    decoder = trainer.average
    assert isinstance(decoder, PidDecoder)
    with torch.no_grad():
        mean = decode_mean(decoder, latent, torch.full((2,), sigma))
    difference = mean - trainer.decode(latent, torch.zeros_like(crops), sigma)
    assert difference.square().mean().sqrt() < tolerance
