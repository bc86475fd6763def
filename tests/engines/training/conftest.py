"""Networks with their initial weights, and images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from engines.bundled.decoder import CONFIG
from engines.pid import PidDecoder
from engines.training.initialise import initialise_velocity
from engines.training.linear_start import start_linear
from engines.training.pixel_network import PixelNetwork


@pytest.fixture(scope="session")
def initial_decoder() -> PidDecoder:
    torch.manual_seed(0)
    decoder = PidDecoder(CONFIG)
    initialise_velocity(decoder)
    return decoder


@pytest.fixture
def decoder(initial_decoder: PidDecoder) -> PidDecoder:
    """A copy that the test may train."""
    return copy.deepcopy(initial_decoder)


@pytest.fixture
def image() -> torch.Tensor:
    """Two images of uniform noise, [2, 3, 64, 64]."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="session")
def smooth_photos() -> list[np.ndarray]:
    """Four photos without detail, uint8 [400, 400, 3]."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(4)]
    return [np.asarray(photo.resize((400, 400), Image.Resampling.BICUBIC)) for photo in coarse]


@pytest.fixture(scope="session")
def linear_network(smooth_photos: list[np.ndarray]) -> PixelNetwork:
    """A pixel network as the best linear decoder of the smooth photos; tests must not change it."""
    torch.manual_seed(0)
    network = PixelNetwork()
    start_linear(network, smooth_photos, np.random.default_rng(0), batches=4)
    return network


class ConstantEstimate:
    """A network whose estimate of x0 is always the same image, so that its trajectories are straight lines to it."""

    def __init__(self, image: torch.Tensor, decoder: PidDecoder) -> None:
        self.image, self.decoder = image, decoder

    def __getattr__(self, name: str) -> object:
        return getattr(self.decoder, name)

    def velocity(self, x: torch.Tensor, t: torch.Tensor | float, *_: object) -> torch.Tensor:
        return ((x - self.image) / torch.as_tensor(t).view(-1, 1, 1, 1)).requires_grad_()
